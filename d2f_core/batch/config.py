"""The pool of actors in a batch job's config. Imports no Ray."""

from dataclasses import dataclass

from d2f_core.identity import since


@dataclass(frozen=True, kw_only=True)
class ActorPoolConfig:
    """Number of actors, and the resources that each reserves.

    A job's config lists this class first among its bases and the class of its work last: a dataclass begins with the
    fields of its last base, so in `--help` and YAML the work comes before the pool.
    """

    num_actors: int = 2
    cpus_per_actor: int = 1
    """Logical CPUs that Ray reserves per actor, and torch threads of a CPU actor."""
    gpus_per_actor: float = 0
    memory_gb_per_actor: float = since(0.0, before=0.0)
    """GB (1e9 bytes) of the host's memory that Ray reserves per actor, so that it places nothing else there; a node
    must have it. 0: none."""

    @property
    def each_actor(self) -> dict[str, float]:
        """What Ray reserves for an actor, by its names; memory in bytes."""
        memory = round(self.memory_gb_per_actor * 1e9)
        return {"CPU": self.cpus_per_actor, "GPU": self.gpus_per_actor, "memory": memory}

    def check_counts(self, *names: str, error: type[ValueError], where: str = "") -> None:
        """Refuse values below 1 in the fields `names` and in those of the pool.

        Args:
            where: prefix of the message.

        Raises:
            ValueError: of the type `error`.
        """
        for name in (*names, "num_actors", "cpus_per_actor"):
            if getattr(self, name) < 1:
                raise error(f"{where}{name}={getattr(self, name)} must be at least 1.")
        if self.memory_gb_per_actor < 0:
            raise error(f"{where}memory_gb_per_actor={self.memory_gb_per_actor} must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class AwaitedPoolConfig(ActorPoolConfig):
    """A pool on a cluster that may have to grow first."""

    node_wait_seconds: int = 60
    """How long a cluster without room is given to get it. An autoscaler is asked for all actors at once; nodes that it
    has begun to start are waited for longer, for up to half an hour. 0: room must be there."""
