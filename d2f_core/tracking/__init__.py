"""MLflow: one run per training, its metrics and pictures, and the registry of models.

The only package that imports mlflow, and only inside functions. The server is named by `MLFLOW_TRACKING_URI`.
"""

from d2f_core.tracking.aliases import (
    HeldAlias,
    check_leases,
    complete_version,
    earlier_version,
    get_alias,
    holding,
    promote,
    rollback,
    rolled_back_to,
)
from d2f_core.tracking.logged_models import log_checkpoint_model
from d2f_core.tracking.metric_log import MetricLog
from d2f_core.tracking.model_files import resolve_model
from d2f_core.tracking.pyfunc_files import Loader
from d2f_core.tracking.registry import ModelVersionInfo, NewVersion, model_version, pin_model, register_model
from d2f_core.tracking.runs import RunHandle, ending, find_run, run_file, run_metrics, run_tags, start_run
from d2f_core.tracking.server import TrackingError, check_tracking, tracking_uri

__all__ = [
    "HeldAlias",
    "Loader",
    "MetricLog",
    "ModelVersionInfo",
    "NewVersion",
    "RunHandle",
    "TrackingError",
    "check_leases",
    "check_tracking",
    "complete_version",
    "earlier_version",
    "ending",
    "find_run",
    "get_alias",
    "holding",
    "log_checkpoint_model",
    "model_version",
    "pin_model",
    "promote",
    "register_model",
    "resolve_model",
    "rollback",
    "rolled_back_to",
    "run_file",
    "run_metrics",
    "run_tags",
    "start_run",
    "tracking_uri",
]
