"""Which worker keeps the others waiting is said, and a list of workers that is gone disturbs nobody."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from d2f_core.train import heartbeat
from d2f_core.train.heartbeat import Heartbeat, HeartbeatMonitor, ask, watched


@pytest.fixture
def monitor() -> Any:
    """The list of workers in this process, without its actor."""
    return cast(Any, HeartbeatMonitor).__ray_metadata__.modified_class()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_list_says_where_each_worker_is_and_who_fell_silent(monitor: Any, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monitor.beat(1, "node b, process 2", "reading data", 7, 3.2)
    assert monitor.stop(), "one trains"
    now[0] = 120.0
    assert monitor.beat(0, "node a, process 1", "starting", None, 0.4), "and each is told at its next word"
    assert monitor.report() == [
        "worker 0 (node a, process 1): starting for 0 s",
        "worker 1 (node b, process 2): step 7, reading data for 3 s",
    ]
    assert monitor.silent(15.0) == {
        1: "worker 1 (node b, process 2) was last heard of 20 s ago: step 7, reading data",
    }
    monitor.leave(["x"])
    monitor.leave(["y"])
    assert monitor.leaving() == ["x", "y"]


def test_nothing_has_to_be_saved_while_no_worker_trains(monitor: Any):
    monitor.beat(0, "node a, process 1", "starting", None, 0.4)
    assert not monitor.stop()


@pytest.mark.parametrize("error", [GetTimeoutError("late"), ActorDiedError()], ids=["late", "gone"])
def test_a_list_that_does_not_answer_gives_the_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
):
    def get(*_: Any, **__: Any) -> None:
        raise error

    method = SimpleNamespace(remote=lambda *arguments: arguments)
    monkeypatch.setattr(heartbeat, "ray", SimpleNamespace(get=get))
    assert ask(method, 1, default="unknown") == "unknown"
    assert f"the list of workers does not answer: {type(error).__name__}" in caplog.text
    monkeypatch.setattr(heartbeat, "ray", SimpleNamespace(get=lambda answer, timeout: answer))
    assert ask(method, 1, 2, default=None) == (1, 2)


def test_a_worker_that_falls_silent_is_named_once_until_it_is_heard_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    answers = [{}, {1: "worker 1"}, {1: "worker 1"}, {}, {1: "worker 1"}]
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.003)
    monkeypatch.setattr(heartbeat, "ask", lambda *_, default: answers.pop(0) if answers else default)
    with watched(SimpleNamespace(silent=None)):
        until(lambda: not answers)
    assert [record.getMessage() for record in caplog.records] == ["worker 1; the others wait for it"] * 2


def test_the_first_worker_hears_that_the_training_is_to_stop_and_the_others_only_speak(
    monkeypatch: pytest.MonkeyPatch,
):
    said: list[tuple[Any, ...]] = []
    pulse = SimpleNamespace(
        beat=SimpleNamespace(remote=lambda *state: said.append(state)),
        leave=SimpleNamespace(remote=lambda nodes: said.append(("leave", nodes))),
    )
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 60.0)
    monkeypatch.setattr(heartbeat, "ask", lambda method, *state, default: state[3] == 4)
    first, other = (Heartbeat(pulse, rank) for rank in (0, 1))
    first.doing("training")
    first.begin(3)
    assert not first.stop_asked
    first.begin(4)
    other.begin(4)
    assert first.stop_asked and not other.stop_asked
    first.leave(["a"])
    until(lambda: len(said) == 3)
    assert [state[0] for state in said if state[0] != "leave"] == [1, 1] and ("leave", ["a"]) in said
    for one in (first, other):
        one.stop()
