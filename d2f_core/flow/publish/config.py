"""Configs of registering a model and of moving an alias. Imports neither MLflow nor torch."""

from dataclasses import dataclass


class RegisterError(ValueError):
    """A model cannot be registered; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    run: str = ""
    """Output URI of the training, which is also the key of its MLflow run."""
    model: str = ""
    """Model directory; empty: the model that the training exported."""
    name: str = "emoji-flow"
    """Name of the registered model; each call adds a version, unless one with the same content exists."""
    alias: str = "candidate"
    """Alias to point at this version."""
    experiment: str = "diff2flow"
    """MLflow experiment of the training's run."""

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not self.alias:
            raise RegisterError("alias is empty. Use 'candidate'.")


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    name: str = "emoji-flow"
    """Name of the registered model."""
    version: str = ""
    """Version to point the alias at."""
    alias: str = "champion"
    """Alias to move; `candidate` is moved automatically when a model is registered."""
    rollback: bool = False
    """Point the alias back at its previous version; repeating it goes back further."""

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not self.alias:
            raise RegisterError("alias is empty. Use 'champion'.")
        if self.version and not self.version.isdecimal():
            raise RegisterError(f"version={self.version!r} is no number. Give one that the registry shows, such as 3.")
        if self.version and self.rollback:
            raise RegisterError(f"version={self.version!r} with rollback: the alias remembers its versions. Give one.")


def _check_name(name: str) -> None:
    if not name or any(character in name for character in "/@:'.%\""):
        raise RegisterError(f"name={name!r} must not be empty or hold any of / @ : ' . % \". Choose another.")
