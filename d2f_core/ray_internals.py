"""Every name of Ray that is used here without being part of its public interface, and what each is used for.

Ray may change such a name in any minor release, so pyproject.toml allows only the releases that were tested. After an
upgrade the tests go through `NAMES`, and whoever meets a missing one at run time gets a sentence that says which it is,
what it is for, and what to do. Importing this module does not import Ray.
"""

import functools
import inspect
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

TESTED = "2.60.0"
"""The release of Ray with which every name below was tried."""
HEAD = "node:__internal_head__"
"""A resource that the head alone has."""
HEALTH_CHECK_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
"""Environment variable of the driver: after how many seconds Ray Train gives up a worker that does not answer."""


@dataclass(frozen=True, kw_only=True)
class PrivateName:
    """A name that Ray does not promise to keep, and what it must be for this release of the project."""

    module: str
    name: str
    """Inside the module, with dots."""
    parameters: tuple[str, ...] | None = None
    """Of a function."""
    attributes: tuple[str, ...] = ()
    """That a class's instances must have: its fields, or what its `__init__` sets."""
    value: str | None = None
    """Of a constant."""
    use: str
    """What would not work without it; completes "needed to"."""


DRAINING = PrivateName(
    module="ray._private.state",
    name="GlobalState.get_draining_nodes",
    parameters=("self",),
    use="tell which nodes were announced to go; Ray Train's own watcher asks the same",
)
FREE = PrivateName(
    module="ray._private.state",
    name="available_resources_per_node",
    parameters=(),
    use="tell what each node has free, of which `ray.available_resources` is the sum",
)
STARTING = PrivateName(
    module="ray.autoscaler.v2.sdk",
    name="get_cluster_status",
    parameters=("gcs_address", "timeout"),
    use="tell how many nodes an autoscaler has begun to start",
)
CALLBACK = PrivateName(
    module="ray.data._internal.execution.execution_callback",
    name="ExecutionCallback.on_execution_step",
    parameters=("self", "executor"),
    use="give a held place back when the actors are queued",
)
BUNDLE = PrivateName(
    module="ray.data._internal.execution.interfaces",
    name="RefBundle",
    attributes=("blocks", "schema", "owns_blocks"),
    use="hand blocks that an actor has read to Ray Data's iterator",
)
ENTRY = PrivateName(
    module="ray.data._internal.execution.interfaces",
    name="BlockEntry",
    attributes=("ref", "metadata"),
    use="hand blocks that an actor has read to Ray Data's iterator",
)
BUNDLES = PrivateName(
    module="ray.data",
    name="DataIterator._to_ref_bundle_iterator",
    parameters=("self",),
    use="let Ray Data's iterator go over blocks that an actor reads",
)
CALLBACK_CLASSES = PrivateName(
    module="ray.data.context",
    name="DataContext",
    attributes=("custom_execution_callback_classes",),
    use="hand callbacks to an executor of Ray Data",
)
REPLICA_PORT = PrivateName(
    module="ray.serve._private.replica",
    name="add_port_to_grpc_server",
    parameters=("server", "address"),
    use="bind a replica's port to the node's address instead of every network interface",
)
HEAD_RESOURCE = PrivateName(
    module="ray._common.constants", name="HEAD_NODE_RESOURCE_NAME", value=HEAD, use="tell which node is the head"
)
WORKER_TIMEOUT = PrivateName(
    module="ray.train.v2._internal.constants",
    name="WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR",
    value=HEALTH_CHECK_TIMEOUT,
    use="let --train.worker-timeout-seconds reach Ray Train",
)
NAMES = (
    DRAINING, FREE, STARTING, CALLBACK, BUNDLE, ENTRY, BUNDLES, CALLBACK_CLASSES, REPLICA_PORT, HEAD_RESOURCE,
    WORKER_TIMEOUT,
)  # fmt: skip


class RayReleaseError(ImportError):
    """The installed Ray lacks a private name, or has another thing by it; says what it is for and what to do."""


def found(name: PrivateName) -> Any:
    """What Ray has by the name.

    Raises:
        RayReleaseError: this Ray has no such thing.
    """
    try:
        return functools.reduce(getattr, name.name.split("."), import_module(name.module))
    except (ImportError, AttributeError) as error:
        raise RayReleaseError(_sentence(name, f"is missing ({error})")) from None


def check(name: PrivateName) -> None:
    """Raise RayReleaseError unless what the installed Ray has by the name is what was tried."""
    there = found(name)
    if name.value is not None and there != name.value:
        raise RayReleaseError(_sentence(name, f"is {there!r}, not {name.value!r}"))
    if name.parameters is not None and (has := tuple(inspect.signature(there).parameters)) != name.parameters:
        raise RayReleaseError(_sentence(name, f"takes {has}, not {name.parameters}"))
    if lost := sorted({*name.attributes} - _attributes(there)):
        raise RayReleaseError(_sentence(name, f"has no {', '.join(lost)}"))


def leaving_nodes() -> set[str]:
    """Living nodes that Ray was told will go: it places nothing new on them."""
    found(DRAINING)
    return set(import_module(DRAINING.module).state.get_draining_nodes())


def free_by_node() -> dict[str, dict[str, float]]:
    """What each living node has free, by its id."""
    return found(FREE)()


def starting_nodes() -> int:
    """Nodes that an autoscaler has begun to start and that have not joined yet; 0 without an autoscaler."""
    import ray

    status = found(STARTING)(ray.get_runtime_context().gcs_address)
    return len(status.pending_nodes) + sum(launch.count for launch in status.pending_launches)


def execution_callback() -> type[Any]:
    """Base class of those whose `on_execution_step(executor)` Ray Data calls in each step of an execution."""
    found(CALLBACK)
    return import_module(CALLBACK.module).ExecutionCallback


def add_callback(dataset: Any, callback: type[Any]) -> None:
    """Let the data set's executions, and those of what is derived from it, make one of the callbacks and call it."""
    dataset.context.custom_execution_callback_classes = [*dataset.context.custom_execution_callback_classes, callback]


def bundle_of(block: Any, about: Any, schema: Any) -> Any:
    """What Ray Data's iterator goes over: a reference to a block, with its metadata and schema."""
    return found(BUNDLE)((found(ENTRY)(block, about),), schema=schema, owns_blocks=False)


def bind_replica_port(address: str) -> None:
    """Bind this replica's gRPC port to `address` instead of every network interface; call it before it is ready."""
    plain = found(REPLICA_PORT)
    replica: Any = import_module(REPLICA_PORT.module)

    def add_port(server: Any, wanted: str) -> int:
        return plain(server, wanted.replace("[::]", f"[{address}]" if ":" in address else address))

    replica.add_port_to_grpc_server = add_port


def _attributes(kind: Any) -> set[str]:
    """Fields of a dataclass; otherwise what a class's `__init__` sets, since instances need a running cluster."""
    if not isinstance(kind, type):
        return set()
    fields = getattr(kind, "__dataclass_fields__", None)
    return set(fields or re.findall(r"self\.(\w+)", inspect.getsource(kind.__init__)))


def _sentence(name: PrivateName, what: str) -> str:
    return (
        f"Ray {version('ray')}: {name.module}.{name.name} {what}. It is needed to {name.use}, and was tried with Ray "
        f"{TESTED}: install that, or look in d2f_core/ray_internals.py for what to change."
    )
