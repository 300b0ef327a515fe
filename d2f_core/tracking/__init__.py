"""MLflow: one run per training, its metrics and pictures, and the registry of models.

The only package that imports mlflow, and only inside functions. The server is named by `MLFLOW_TRACKING_URI`.
"""

from d2f_core.tracking.metric_log import MetricLog
from d2f_core.tracking.registry import ModelVersionInfo, pin_model, register_model, resolve_model
from d2f_core.tracking.runs import RunHandle, find_run, start_run
from d2f_core.tracking.server import TrackingError, check_tracking, tracking_uri

__all__ = [
    "MetricLog",
    "ModelVersionInfo",
    "RunHandle",
    "TrackingError",
    "check_tracking",
    "find_run",
    "pin_model",
    "register_model",
    "resolve_model",
    "start_run",
    "tracking_uri",
]
