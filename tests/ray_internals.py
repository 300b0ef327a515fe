"""Names of Ray that only the tests use and that Ray does not promise to keep, with what it must be told by none other.

    python -m tests.ray_internals PLACE DELAY start ...

is `ray start ...` after DELAY seconds, for a further node on 127.0.0.1; its sockets' names begin with PLACE, or are
Ray's own when that is empty.
"""

import functools
import sys
import time
from typing import Any

from d2f_core.ray_internals import PrivateName, found

LOCALHOST = PrivateName(
    module="ray._private.services",
    name="resolve_ip_for_localhost",
    parameters=("host",),
    use="start a further node that looks for its head on 127.0.0.1",
)
PARAMETERS = PrivateName(
    module="ray._private.parameter",
    name="RayParams",
    attributes=("plasma_store_socket_name", "raylet_socket_name"),
    use="name a node's sockets: of nodes that start at the same moment, and choose the same names, one dies",
)
COMMAND = PrivateName(module="ray.scripts.scripts", name="main", use="start a further node as `ray start` does")
DEPLOYMENT = PrivateName(
    module="ray.serve._private.common",
    name="DeploymentID",
    attributes=("name", "app_name"),
    use="make the error of a service whose replicas are gone",
)
NAMES = (LOCALHOST, PARAMETERS, COMMAND, DEPLOYMENT)
VARIABLES = {
    "RAY_AUTH_MODE": "ray.exceptions",
    "RAY_AUTH_TOKEN_PATH": "ray.exceptions",
    "RAY_CLOUD_INSTANCE_ID": "ray.autoscaler.v2.instance_manager.ray_installer",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "ray._private.ray_constants",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "ray._private.ray_constants",
    "RAY_JOB_STOP_WAIT_TIME_S": "ray.dashboard.modules.job.job_supervisor",
    "RAY_NODE_TYPE_NAME": "ray.autoscaler.v2.instance_manager.ray_installer",
    "RAY_TMPDIR": "ray._common.utils",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "ray.train.v2._internal.constants",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "ray.train.v2._internal.constants",
    "RAY_USAGE_STATS_ENABLED": "ray._common.usage.usage_constants",
    "RAY_enable_autoscaler_v2": "ray.scripts.scripts",
}
"""Environment variables of Ray that the local stack, the tests or the documentation set -> the module that reads it."""


def deployment_id(name: str) -> Any:
    return found(DEPLOYMENT)(name)


def node_command(*arguments: str, place: str = "", delay: float = 0.0) -> list[str]:
    """Argument vector of a further node; run it in the repository's root."""
    return [sys.executable, "-m", __name__, place, str(delay), "start", *arguments]


def _start(place: str, delay: float) -> None:
    time.sleep(delay)
    if place:
        sockets = {"plasma_store_socket_name": f"{place}.plasma", "raylet_socket_name": f"{place}.raylet"}
        parameters = found(PARAMETERS)
        parameters.__init__ = functools.partialmethod(parameters.__init__, **sockets)
    found(LOCALHOST)
    sys.modules[LOCALHOST.module].resolve_ip_for_localhost = lambda host: host  # type: ignore[attr-defined]
    found(COMMAND)()


if __name__ == "__main__":
    _, where, seconds, *sys.argv[1:] = sys.argv
    _start(where, float(seconds))
