"""Waits for room for a batch job's actors on the cluster, after asking an autoscaler for it."""

import logging
import time
from collections.abc import Mapping

import ray
from ray.autoscaler.sdk import request_resources

from d2f_core.resources import InsufficientResourcesError

logger = logging.getLogger(__name__)


def await_resources(
    actors: int, each: Mapping[str, float], *, others: Mapping[str, float] | None = None, least: int = 1, seconds: float
) -> None:
    """Wait until the cluster has room for `least` of the actors; logs it when there is no room for all.

    The autoscaler is asked once for all of them and given up to `seconds`; later, Ray Data's pending actors request the
    rest.

    Args:
        each: resources of one actor by Ray's names, e.g. `{"CPU": 1, "GPU": 0}`.
        others: resources of the job's tasks in addition to the actors.

    Raises:
        InsufficientResourcesError: there was no room in time; says what is missing.
    """
    each, others = {name: amount for name, amount in each.items() if amount}, others or {}
    began, asked = time.monotonic(), False
    try:
        while True:
            there = ray.cluster_resources()
            fit = min(int((there.get(name, 0) - others.get(name, 0)) // amount) for name, amount in each.items())
            waited = time.monotonic() - began
            if fit >= least or waited >= seconds:
                break
            if not asked:
                request_resources(bundles=[dict(each)] * actors + ([dict(others)] if others else []))
                asked = True
                logger.info("waiting up to %g s for nodes: %s", seconds, _sizes(each, there))
            time.sleep(1)
    finally:
        if asked:
            request_resources(bundles=[])  # a request is valid until the next one, and would keep the nodes forever
    if fit < least:
        wanted = {name: least * amount + others.get(name, 0) for name, amount in each.items()}
        who = "An actor needs" if least == 1 and not others else f"{least} actors and their readers need"
        raise InsufficientResourcesError(
            f"{who} {_sizes(wanted)}, and the cluster has {_sizes({name: there.get(name, 0) for name in each})}. Lower "
            "num_actors, cpus_per_actor or gpus_per_actor, add nodes, or give them time with node_wait_seconds."
        )
    if fit < actors:
        logger.warning("the cluster has room for %d of %d actors: those run until it grows", max(fit, 0), actors)


def _sizes(amounts: Mapping[str, float], there: Mapping[str, float] | None = None) -> str:
    if there is None:
        return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
    return ", ".join(f"{amount:g} {name} an actor, {there.get(name, 0):g} there" for name, amount in amounts.items())
