"""Which model becomes a version of which name, and which version an alias points at. Light: no MLflow, no torch."""

from dataclasses import dataclass


class RegisterError(ValueError):
    """A model that cannot be registered, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    run: str = ""
    """Output URI of the training, which is also the key of its MLflow run."""
    model: str = ""
    """Model directory; empty: the one that the training exported."""
    name: str = "emoji-flow"
    """Registered model; each call adds a version, unless the same content is there."""
    alias: str = "candidate"
    """Alias that moves to this version."""
    experiment: str = "diff2flow"
    """MLflow experiment of the training's run."""

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not self.alias:
            raise RegisterError("alias is empty. Use 'candidate'.")


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    name: str = "emoji-flow"
    """Registered model."""
    version: str = ""
    """The version that the alias moves to."""
    alias: str = "champion"
    """Alias that moves; `candidate` moves by itself when a model is registered."""
    rollback: bool = False
    """Return to the version that the alias named before; once more: to the one before that."""

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
