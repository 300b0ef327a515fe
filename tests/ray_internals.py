"""Names of Ray that only the tests use and that Ray does not promise to keep, with what it must be told by none other.

    python -m tests.ray_internals PLACE DELAY CLOSED start ...

is `ray start ...` after DELAY seconds, and not while the file CLOSED exists, for a further node on 127.0.0.1. The names
of its sockets and of its directory for jobs' code begin with PLACE, or are Ray's own when that is empty.
"""

import functools
import sys
import time
from pathlib import Path
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
    attributes=("plasma_store_socket_name", "raylet_socket_name", "runtime_env_dir_name"),
    use="name a node's sockets and directory: of nodes that start at the same moment with the same sockets one dies, "
    "and where they unpack a job's code at one place, each deletes what the others still use",
)
COMMAND = PrivateName(module="ray.scripts.scripts", name="main", use="start a further node as `ray start` does")
DEPLOYMENT = PrivateName(
    module="ray.serve._private.common",
    name="DeploymentID",
    attributes=("name", "app_name"),
    use="make the error of a service whose replicas are gone",
)
DATA_COORDINATOR = PrivateName(
    module="ray.data._internal.cluster_autoscaler",
    name="get_or_create_autoscaling_coordinator",
    use="see what Ray Data would leave to another execution",
)
NAMES = (LOCALHOST, PARAMETERS, COMMAND, DEPLOYMENT, DATA_COORDINATOR)
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


def data_coordinator() -> Any:
    return found(DATA_COORDINATOR)()


def deployment_id(name: str) -> Any:
    return found(DEPLOYMENT)(name)


def node_command(*arguments: str, place: str = "", delay: float = 0.0, closed: str = "") -> list[str]:
    """Argument vector of a further node; run it in the repository's root."""
    return [sys.executable, "-m", __name__, place, str(delay), closed, "start", *arguments]


def _start(place: str, delay: float, closed: str) -> None:
    time.sleep(delay)
    while closed and Path(closed).exists():
        time.sleep(0.5)
    if place:
        own = {
            "plasma_store_socket_name": f"{place}.plasma",
            "raylet_socket_name": f"{place}.raylet",
            "runtime_env_dir_name": f"runtime-{Path(place).name}",
        }
        parameters = found(PARAMETERS)
        parameters.__init__ = functools.partialmethod(parameters.__init__, **own)
    found(LOCALHOST)
    sys.modules[LOCALHOST.module].resolve_ip_for_localhost = lambda host: host  # type: ignore[attr-defined]
    found(COMMAND)()


if __name__ == "__main__":
    _, where, seconds, gate, *sys.argv[1:] = sys.argv
    _start(where, float(seconds), gate)
