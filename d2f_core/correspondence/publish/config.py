"""Configs of registering and of exporting a matcher. Imports neither MLflow nor torch."""

from dataclasses import dataclass

from d2f_core.registration import RegistrationConfig


@dataclass(frozen=True, kw_only=True)
class RegisterMatcherConfig(RegistrationConfig):
    """Which training's matcher becomes a version of which registered model."""

    name: str = "matcher"
    """Name of the registered model; each call adds a version, unless one with the same content exists."""
    experiment: str = "distilldift"
    """MLflow experiment of the training's run."""
