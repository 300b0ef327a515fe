"""The mathematics of Diff2Flow: torch, and torchdiffeq where an adaptive solver asks for it.

Read in this order: `schedule` (what a network was trained on), `path`, `alignment`, `loss`, `solver`, `guidance`.
"""
