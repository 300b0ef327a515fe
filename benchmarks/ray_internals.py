"""Names of Ray that only benchmarks use and that Ray does not promise to keep."""

from typing import Any

from d2f_core.ray_internals import PrivateName, found

ACTORS = PrivateName(module="ray._private.state", name="actors", use="see how many actors the head has registered")
COORDINATOR = PrivateName(
    module="ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
    name="_AutoscalingCoordinatorActor",
    use="measure what many executions of Ray Data ask of their coordinator",
)
RESOURCE_TYPES = PrivateName(
    module="ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator",
    name="STANDARD_RESOURCE_TYPES",
    use="ask the coordinator as an execution of Ray Data does",
)
NAMES = (ACTORS, COORDINATOR, RESOURCE_TYPES)


def registered_actors() -> set[str]:
    """Ids of the actors that the head knows."""
    return set(found(ACTORS)())


def coordinator(nodes: list[dict[str, Any]]) -> Any:
    """Ray Data's coordinator in this process, for a cluster of these nodes, which sends nothing to an autoscaler."""
    return found(COORDINATOR)(send_resources_request=lambda *_, **__: None, get_cluster_nodes=lambda: nodes)


def resource_types() -> list[Any]:
    return list(found(RESOURCE_TYPES))
