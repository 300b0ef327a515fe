"""Where a registered model's lease is kept: the same place for every job that moves one of its aliases.

A tag of the registered model names the directory. The model is created with it, beside the outputs of the training
that its first version is of; one that was created without it gets it by the first promotion.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from d2f_core.lease import Lease, lease
from d2f_core.storage import filesystem, is_s3, join
from d2f_core.tracking.runs import RUN_KEY_TAG
from d2f_core.tracking.server import TrackingError, attempt

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

logger = logging.getLogger(__name__)

LEASES_TAG = "d2f.leases"
"""Tag of a registered model: the directory of its lease."""
OLDEST = 10
"""Versions, from the first one on, among which one is looked for whose training is known."""


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
        TrackingError: nothing tells it.
    """
    found = given or model.tags.get(LEASES_TAG) or _beside_its_training(client, model.name)
    if found or output:
        return found or leases_beside(output)
    raise TrackingError(
        f"Nothing tells where jobs that promote versions of {model.name} can meet: no training of it is known. Give "
        "--leases DIRECTORY, s3:// or local, to which all of them may write."
    )


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
def alone(client: "MlflowClient", name: str, purpose: str, *, output: str = "", given: str = "") -> Iterator[Lease]:
    """Hold the lease of the registered model `name`; other arguments as of `find_leases`.

    Raises:
        TrackingError: there is no such model, or no place for its lease.
        LeaseError: another job holds the lease for too long, or it cannot be written.
    """
    place = _settle(client, name, output, given)
    while True:
        with lease(join(place, f"{quote(name, safe='')}.json"), purpose) as held:
            now = _settle(client, name, output)
            if now == place:  # else another job named another place at the same time
                yield held
                return
        place = now


def _settle(client: "MlflowClient", name: str, output: str, given: str = "") -> str:
    """The model's directory of leases, which its tag names from now on."""
    model = attempt(f"read {name}", lambda: client.get_registered_model(name))
    there, wanted = model.tags.get(LEASES_TAG), find_leases(client, model, output, given)
    if there != wanted:
        attempt("keep the place of leases", lambda: client.set_registered_model_tag(name, LEASES_TAG, wanted))
        logger.info("leases of %s are kept at %s (before: %s)", name, wanted, there)
    return wanted
