"""When workers save out of turn, and what SIGTERM does to the driver; with workers and nodes in tests/chaos."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import ray.train

from d2f_core.train import interruption
from d2f_core.train.interruption import NOTHING, POLL, STOP, Interruptions, describe, terminable, terminated


def preempted(*nodes: str) -> ray.train.PreemptionError:
    info = ray.train.PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={node: [0] for node in nodes})
    return ray.train.PreemptionError(info)


def test_the_first_worker_says_when_to_look_and_when_to_stop(monkeypatch):
    heartbeat = SimpleNamespace(stop_asked=False)
    first, other = (Interruptions(heartbeat, first=one) for one in (True, False))  # type: ignore[arg-type]
    assert [first.signal(), first.signal(), other.signal()] == [POLL, NOTHING, NOTHING]
    monkeypatch.setattr(interruption, "POLL_SECONDS", 0.0)
    assert first.signal() == POLL
    heartbeat.stop_asked = True
    assert [first.signal(), other.signal()] == [STOP, NOTHING]
    assert first.agreed(STOP, 7) and first.stopping and other.agreed(STOP, 7) and other.stopping


def test_a_notice_calls_for_one_checkpoint(monkeypatch):
    notices = [
        None,
        preempted("a").preemption_info,
        preempted("a").preemption_info,
        preempted("b", "a").preemption_info,
    ]
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: notices.pop(0))
    worker = Interruptions(SimpleNamespace(), first=False)  # type: ignore[arg-type]
    assert not worker.agreed(NOTHING, 1) and len(notices) == 4, "it costs an exchange: only when the first one says so"
    assert [worker.agreed(POLL, step) for step in (2, 3, 4, 5)] == [False, True, False, True]


def test_a_notice_names_nodes_workers_and_time():
    info = ray.train.PreemptionInfo(deadline_ms=int(time.time() * 1000) + 60_400, preempted_node_to_ranks={"a": [0, 1]})
    assert describe(info, {"a"}) == "node a with worker 0, 1 will be taken away in 60 s"


def test_the_first_sigterm_asks_the_workers_and_the_handler_is_put_back(monkeypatch, caplog):
    monkeypatch.setattr(interruption, "ask", lambda method, default: method())
    before = signal.getsignal(signal.SIGTERM)
    with terminable() as termination:
        termination.pulse = SimpleNamespace(stop=lambda: True)
        assert not termination.asked
        signal.raise_signal(signal.SIGTERM)
        assert termination.asked
    assert signal.getsignal(signal.SIGTERM) is before
    assert "the workers save and stop" in caplog.text


def test_a_driver_that_gets_no_answer_asks_again(monkeypatch, caplog):
    answers = [None, None, True]
    monkeypatch.setattr(interruption, "ask", lambda method, default: answers.pop(0))
    monkeypatch.setattr(interruption, "time", SimpleNamespace(sleep=lambda _: None))
    with terminable() as termination:
        termination.pulse = SimpleNamespace(stop=None)
        signal.raise_signal(signal.SIGTERM)
    assert not answers and "the workers save and stop" in caplog.text


@pytest.mark.parametrize(
    ("answer", "why"),
    [(False, "no worker trains yet, so nothing has to be saved"), (None, "the list of workers does not answer")],
)
def test_sigterm_ends_the_driver_where_no_worker_will_save_and_says_why(monkeypatch, caplog, answer, why):
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(interruption, "ask", lambda method, default: answer)
    monkeypatch.setattr(interruption, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(interruption, "os", SimpleNamespace(kill=lambda *call: killed.append(call), getpid=os.getpid))
    with terminable() as termination:
        termination.pulse = SimpleNamespace(stop=None)
        signal.raise_signal(signal.SIGTERM)
    assert killed == [(os.getpid(), signal.SIGTERM)]
    assert f"SIGTERM: {why}. The same command again resumes." in caplog.text


def test_a_second_sigterm_ends_the_process_at_once(monkeypatch):
    raised: list[int] = []
    termination = interruption.Termination()
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(interruption.signal, "raise_signal", raised.append)
    try:
        termination.handle(signal.SIGTERM, None)
        assert not raised and termination.asked
        termination.handle(signal.SIGTERM, None)
        assert raised == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_first_worker_tells_the_driver_which_nodes_go(monkeypatch, caplog):
    told: list[list[str]] = []
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: preempted("b", "a").preemption_info)
    first, other = (Interruptions(SimpleNamespace(leave=told.append), first=one) for one in (True, False))  # type: ignore[arg-type]
    assert first.agreed(POLL, 5) and other.agreed(POLL, 5) and told == [["a", "b"]]
    assert caplog.text.count("node a with worker 0 and node b with worker 0 will be taken away soon") == 1


def test_a_training_without_workers_tells_of_its_end_before_it_is_ended(monkeypatch):
    order = []
    monkeypatch.setattr(interruption.os, "kill", lambda pid, number: order.append("killed"))
    with terminable(lambda: order.append("told")) as termination:
        signal.raise_signal(signal.SIGTERM)
        assert termination.asked
    assert order == ["told", "killed"]


def test_a_stopped_training_ends_as_sigterm_ends_a_process(tmp_path, caplog):
    assert terminated(str(tmp_path), "identity").code == 143
    assert "stopped by SIGTERM before the first checkpoint" in caplog.text


def test_in_a_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with terminable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
