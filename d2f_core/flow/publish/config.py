"""Configs of registering a model and of moving an alias. Imports neither MLflow nor torch."""

from dataclasses import dataclass

from d2f_core.registration import RegisterError, RegistrationConfig, check_name


@dataclass(frozen=True, kw_only=True)
class RegisterConfig(RegistrationConfig):
    """Which training's flow model becomes a version of which registered model."""

    name: str = "emoji-flow"
    """Name of the registered model; each call adds a version, unless one with the same content exists."""
    experiment: str = "diff2flow"
    """MLflow experiment of the training's run."""


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    name: str = "emoji-flow"
    """Name of the registered model."""
    version: str = ""
    """Version to point the alias at."""
    alias: str = "champion"
    """Alias to move; `candidate` is moved automatically when a model is registered."""
    rollback: bool = False
    """Point the alias back at the version before the one that it names; repeating it goes back further."""
    leases: str = ""
    """Directory (s3:// or local) of the lease by which one job at a time moves the aliases. All jobs that promote
    versions of this model use it from now on: give it while none of them runs. A local one serves the machines that
    share it. Empty: the model's own, beside the outputs of its first training."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.alias:
            raise RegisterError("alias is empty. Use 'champion'.")
        if self.version and not self.version.isdecimal():
            raise RegisterError(f"version={self.version!r} is no number. Give one that the registry shows, such as 3.")
        if self.version and self.rollback:
            raise RegisterError(f"version={self.version!r} with rollback: the alias remembers its versions. Give one.")
