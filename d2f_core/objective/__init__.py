"""The mathematics: torch (torchdiffeq for adaptive solvers). Read schedule, path, alignment, loss, solver, guidance."""
