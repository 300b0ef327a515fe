"""Where a registered model's lease is kept: the same place for every job that moves one of its aliases.

A tag of the registered model names the directory. The model is created with it, beside the outputs of the training
that its first version is of; one that was created without it gets it by the first promotion.

A local directory has an id, in a file, and another tag names it: a machine with another directory of the same name, or
none, is refused. Whoever names another place (`given`) ends what others hold at the old one: they read the tags again
before each request.
"""

import contextlib
import logging
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from d2f_core.compare_and_swap import read, swap
from d2f_core.lease import Lease, LeaseLostError, lease, unwritable
from d2f_core.storage import filesystem, is_s3, join
from d2f_core.tracking.runs import RUN_KEY_TAG
from d2f_core.tracking.server import TrackingError, attempt

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

logger = logging.getLogger(__name__)

LEASES_TAG = "d2f.leases"
"""Tag of a registered model: the directory of its lease."""
ID_TAG, ID_FILE = "d2f.leases_id", "directory-id"
"""Tag of a registered model whose directory of leases is local: what this file there says."""
OLDEST = 10
"""Versions, from the first one on, among which one is looked for whose training is known."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A directory of leases."""

    uri: str
    id: str
    """Of a local directory: the machine that made it, and a token; "" on S3."""

    def __str__(self) -> str:
        return f"{self.uri} of the machine {self.id.partition(' ')[0]}" if self.id else self.uri


class ModelLease:
    """The lease of a registered model that this process holds; `alone` makes it."""

    def __init__(self, client: "MlflowClient", name: str, place: Place, lease: Lease) -> None:
        self._client, self._name, self._place, self._lease = client, name, place, lease

    def check(self) -> None:
        """Return if this is the model's lease still, and nobody else can hold it soon (`Lease.check`).

        Raises:
            LeaseLostError: as of `Lease.check`, or the model's lease is kept at another place by now.
            UnreachableTrackingError: MLflow does not say where it is kept.
        """
        now = _tagged(_read(self._client, self._name))
        if now != self._place:
            raise LeaseLostError(
                f"the lease of {self._name} was lost: it is kept at {now} by now, and this job holds that at "
                f"{self._place}. Give --leases only while no job promotes; the same command goes on from there."
            )
        self._lease.check()


def leases_beside(output: str) -> str:
    """The directory of leases for jobs that write where `output` is: s3://b/runs/x and /data/runs/x have s3://b/leases
    and /data/leases.
    """
    if is_s3(output):
        bucket, *parts = [part for part in output.removeprefix("s3://").split("/") if part]
        return join(f"s3://{bucket}", *parts[:-2], "leases")
    path = Path(filesystem(output)[1])
    # Directly below the root nobody may write: the output itself or its parent is taken there.
    return str(Path(*path.parts[: max(2, len(path.parts) - 2)], "leases"))


def find_leases(client: "MlflowClient", model: "RegisteredModel", output: str, given: str = "") -> str:
    """The directory of a registered model's lease.

    Args:
        output: of the job that asks; used when the model has no tag, and no version's training is known.
        given: a directory that goes before all others; empty: none.

    Raises:
        TrackingError: nothing tells it, or it is a local directory that this machine does not have.
        LeaseError: it is a local directory that this process may not read.
    """
    if not given:
        _check_shared(model)
    found = given or model.tags.get(LEASES_TAG) or _beside_its_training(client, model.name)
    if found or output:
        return found or leases_beside(output)
    raise TrackingError(
        f"Nothing tells where jobs that promote versions of {model.name} can meet: no training of it is known. Give "
        "--leases DIRECTORY, s3:// or local, to which all of them may write."
    )


def _check_shared(model: "RegisteredModel") -> None:
    place = _tagged(model)
    if place and place.id and place.id != _id_of(place.uri):
        raise TrackingError(
            f"The leases of {model.name} are kept in {place}, and this machine does not share that directory, as all "
            "jobs that promote its versions must. Run this on that machine; or give --leases s3://BUCKET/leases to "
            "`python -m pipelines.promote` once, while none of them runs."
        )


def _tagged(model: "RegisteredModel") -> Place | None:
    uri = model.tags.get(LEASES_TAG)
    return Place(uri=uri, id="" if is_s3(uri) else model.tags.get(ID_TAG, "")) if uri else None


def _id_of(directory: str, *, create: bool = False) -> str:
    """The id of a local directory of leases; "" when it has none and none is created."""
    file = join(directory, ID_FILE)
    try:
        while (there := read(file)) is None and create:
            swap(file, f"{socket.gethostname()} {secrets.token_hex(8)}".encode(), None)
    except OSError as error:
        raise unwritable(f"the lease's directory {directory}", error) from error
    return there.data.decode(errors="replace") if there else ""


def _beside_its_training(client: "MlflowClient", name: str) -> str:
    """Of the oldest version that has one, so that jobs that ask at the same time find the same; "" if none has."""
    order = ["version_number ASC"]
    versions = attempt(
        f"list the versions of {name}",
        lambda: client.search_model_versions(f"name = '{name}'", max_results=OLDEST, order_by=order),
    )
    for version in versions:
        if output := trained_at(client, version.run_id or ""):
            return leases_beside(output)
    return ""


def trained_at(client: "MlflowClient", run_id: str) -> str:
    """The output of the training with this run; "" if the run is gone or another program's."""
    if not run_id:
        return ""
    from mlflow.exceptions import MlflowException

    def look() -> str:
        try:
            return str(client.get_run(run_id).data.tags.get(RUN_KEY_TAG, ""))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""

    return attempt("look up the training", look)


@contextlib.contextmanager
def alone(
    client: "MlflowClient", name: str, purpose: str, *, output: str = "", given: str = ""
) -> Iterator[ModelLease]:
    """Hold the lease of the registered model `name`; other arguments as of `find_leases`.

    Raises:
        TrackingError: there is no such model, or no place for its lease that this machine shares.
        LeaseError: another job holds the lease for too long, or it cannot be written.
    """
    place = _settle(client, name, output, given)
    while True:
        with lease(join(place.uri, f"{quote(name, safe='')}.json"), purpose) as held:
            now = _settle(client, name, output)
            if now == place:  # else another job named another place at the same time
                yield ModelLease(client, name, place, held)
                return
        place = now


def _settle(client: "MlflowClient", name: str, output: str, given: str = "") -> Place:
    """The model's directory of leases, which its tags name from now on."""
    model = _read(client, name)
    there, uri = _tagged(model), find_leases(client, model, output, given)
    wanted = Place(uri=uri, id="" if is_s3(uri) else _id_of(uri, create=True))
    if there != wanted:
        if wanted.id:
            _keep(client, name, ID_TAG, wanted.id)
        _keep(client, name, LEASES_TAG, uri)
        logger.info("leases of %s are kept at %s (before: %s)", name, wanted, there)
    return wanted


def _keep(client: "MlflowClient", name: str, tag: str, value: str) -> None:
    attempt("keep the place of leases", lambda: client.set_registered_model_tag(name, tag, value))


def _read(client: "MlflowClient", name: str) -> "RegisteredModel":
    return attempt(f"read {name}", lambda: client.get_registered_model(name))
