"""The online service without its cluster: what is refused before it starts, and what clients get when it fails."""

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.requests import Request as HttpRequest

from d2f_core.flow.serve import deployments
from d2f_core.flow.serve import service as service_module
from d2f_core.flow.serve.config import ServeConfig, ServeError
from d2f_core.flow.serve.service import ServeJob, Token, check_serve, service
from d2f_core.resources import Demand, InsufficientResourcesError, Reservation
from tests.flow.tiny_base import write_tiny_base
from tests.ray_internals import deployment_id


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_steps": 3}, r"max_steps=3 is below the model's own steps of \d+\. Raise it"),
        ({"max_pixels": 255}, r"max_pixels=255 is below the model's own height x width of 256\. Raise it"),
    ],
)
def test_limits_below_what_the_model_does_by_itself_are_refused(tmp_path: Path, limits: dict, message: str) -> None:
    base = str(write_tiny_base(tmp_path))
    with pytest.raises(ServeError, match=message):
        check_serve(ServeConfig(model=base, **limits))
    assert check_serve(ServeConfig(model=base)).model_uri == base


def test_a_base_is_drawn_with_as_what_the_user_says_that_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "_listen_on_the_nodes_address_only", lambda: None)
    base = str(write_tiny_base(tmp_path))
    for told in ("", "flow_prediction"):
        job = check_serve(ServeConfig(model=base, base_prediction=told))
        replica = deployments.ImageReplica(job.model_uri, job.model_hash, job.config)
        assert replica.sampler.model.puts_out_velocity == bool(told)


class FakeServe(SimpleNamespace):
    """Ray Serve's calls on a cluster of one CPU, and which were made."""

    def __init__(self, running: bool = False) -> None:
        super().__init__(calls=[], running=running)

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(proxies={}, applications={"other": None} if self.running else {})

    def start(self, **_: Any) -> None:
        self.calls.append("start")
        raise RuntimeError("port 8000 is\nin use")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def room_for_one(demand: Demand, **_: Any) -> Reservation:
    (count,) = demand.counts
    if count > 1:
        raise InsufficientResourcesError(f"{demand.subject.format(count=count)} more than there is. {demand.advice}")
    return Reservation(count=count, group=None)


@pytest.mark.parametrize(
    ("running", "change", "message", "calls"),
    [
        (False, {"replicas": 3}, "replicas=3 need more than there is. Ask for fewer, .* or add nodes", []),
        (True, {"replicas": 1}, r"runs on this cluster already \(applications: other\).*give --replace", []),
        (False, {"replicas": 1}, "did not start or broke off at port 8000: port 8000 is in use", ["start", "shutdown"]),
        (True, {"replicas": 1, "replace": True}, "did not start", ["shutdown", "start", "shutdown"]),
    ],
)
def test_a_service_that_cannot_start_says_why_and_leaves_nothing_running(
    monkeypatch, running: bool, change: dict[str, Any], message: str, calls: list[str]
) -> None:
    fake = FakeServe(running)
    monkeypatch.setattr(service_module, "serve", fake)
    monkeypatch.setattr(service_module, "reserve", room_for_one)
    config = ServeConfig(model="x", cpus_per_replica=1, **change)
    job, token = ServeJob(config=config, model_uri="x", model_hash=""), Token(digest=b"", source="")
    with pytest.raises(ServeError, match=message) as caught, service(job, token):
        pass
    assert fake.calls == calls and "\n" not in str(caught.value)


def answer_of(monkeypatch, draw: Callable[[], Any], *, seconds: float = 5.0) -> tuple[Any, list[int]]:
    """What a client gets for two images while painters answer by `draw`, and how often each answer was called off."""
    monkeypatch.setattr(deployments, "_listen_on_the_nodes_address_only", lambda: None)
    body, asked = b'{"prompt": "a cat", "num_images": 2}', []

    def remote(_: dict[str, Any]) -> asyncio.Task:
        asked.append(asyncio.create_task(draw()))
        return asked[-1]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def ask() -> tuple[Any, list[int]]:
        painters: Any = SimpleNamespace(draw=SimpleNamespace(remote=remote))
        config = ServeConfig(model="x", request_seconds=seconds)
        ingress = deployments.Ingress(painters, hashlib.sha256(b"token").digest(), config)
        headers = [(b"authorization", b"Bearer token")]
        scope = {"type": "http", "method": "POST", "path": "/v1/images", "headers": headers}
        answer = await ingress(HttpRequest(scope, receive))
        await asyncio.sleep(0)
        return answer, [one.cancelling() for one in asked]

    return asyncio.run(ask())


def test_a_request_that_takes_too_long_is_given_up_and_nobody_goes_on_drawing_it(monkeypatch) -> None:
    answer, asked = answer_of(monkeypatch, lambda: asyncio.sleep(60), seconds=0.05)
    assert answer.status_code == 504 and answer.headers["retry-after"] == "2"
    assert b"Not done in 0.05 s" in answer.body and b"Ask for fewer steps" in answer.body
    assert all(asked) and len(asked) == 2


def test_a_failure_is_told_to_the_log_and_not_to_strangers(monkeypatch, caplog) -> None:
    turns = iter((0.0, 60.0))

    async def fail() -> None:
        await asyncio.sleep(next(turns))
        raise RuntimeError("/home/someone/secret")

    answer, asked = answer_of(monkeypatch, fail)
    assert asked == [0, 1], "nobody wants the other image any more"
    assert answer.status_code == 500 and b"its log says why" in answer.body and b"secret" not in answer.body
    assert "/home/someone/secret" in caplog.text


def test_a_service_whose_replicas_are_gone_asks_to_come_again(monkeypatch) -> None:
    async def fail() -> None:
        raise DeploymentUnavailableError(deployment_id("ImageReplica"))

    answer, _ = answer_of(monkeypatch, fail)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
    assert b"No replica is up. Try again later." in answer.body
