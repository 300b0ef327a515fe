"""Config of registering a trained model in MLflow. Imports neither MLflow nor torch."""

from dataclasses import dataclass


class RegisterError(ValueError):
    """A model cannot be registered; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class RegistrationConfig:
    """Which training's model becomes a version of which registered model."""

    run: str = ""
    """Output URI of the training, which is also the key of its MLflow run."""
    model: str = ""
    """Model directory; empty: the model that the training exported."""
    name: str = "model"
    """Name of the registered model; each call adds a version, unless one with the same content exists."""
    alias: str = "candidate"
    """Alias to point at this version; one that a gate or pipelines.promote moves is refused."""
    experiment: str = ""
    """MLflow experiment of the training's run."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.alias:
            raise RegisterError("alias is empty. Use 'candidate'.")
        if self.alias == "champion":
            raise RegisterError(
                "alias='champion' must not be moved by registering, which keeps no way back. Use 'candidate', then a "
                f"gate or `python -m pipelines.promote emoji-flow --name {self.name} --version N`."
            )


def check_name(name: str) -> None:
    """Raises RegisterError for a name that MLflow could not address."""
    if not name or any(character in name for character in "/@:'.%\""):
        raise RegisterError(f"name={name!r} must not be empty or hold any of / @ : ' . % \". Choose another.")
