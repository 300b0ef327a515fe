"""Leases: one holder at a time, on the session's S3 server and on local paths; a dead one is succeeded by one other."""

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.fault_proxy import FaultProxy
from d2f_core import compare_and_swap, s3_calls, storage
from d2f_core import lease as leases
from d2f_core.lease import Lease, LeaseError, LeaseLostError, LeaseTimes, lease
from infra.local.stack import StackEnv

TIMES = LeaseTimes(renew=0.1, stale=1.2, confirm=0.3, wait=20.0)
NEVER = LeaseTimes(renew=60.0, stale=1.2, confirm=0.1, wait=20.0)
"""Of a holder that is dead, or stopped."""


class Promises:
    """What holds at any place; `root` is a directory of the test's own."""

    def test_of_many_that_swap_the_same_object_one_wins(self, root: str) -> None:
        uri, tag = f"{root}/object", None
        assert compare_and_swap.read(uri) is None and compare_and_swap.swap(uri, b"too early", "tag") is None
        with ThreadPoolExecutor(6) as pool:
            for number in range(5):
                contents = [f"{number} {writer}".encode() for writer in range(6)]
                tags = list(pool.map(lambda data, tag=tag: compare_and_swap.swap(uri, data, tag), contents))
                (winner,) = [writer for writer, won in enumerate(tags) if won]
                stored, tag = compare_and_swap.read(uri), tags[winner]
                assert stored is not None and (stored.data, stored.tag) == (contents[winner], tag)

    def test_one_at_a_time(self, root: str) -> None:
        inside, most = [], []

        def work(number: int) -> None:
            with lease(f"{root}/busy.json", f"work {number}", times=TIMES) as held:
                held.check()
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.05)
                inside.remove(number)

        with ThreadPoolExecutor(5) as pool:
            list(pool.map(work, range(5)))
        assert most == [1] * 5

    def test_a_holder_that_renews_is_waited_for_and_named_once(
        self, root: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        uri, ended = f"{root}/long.json", []

        def hold() -> None:
            with lease(uri, "a long job", times=TIMES) as held:
                time.sleep(2 * TIMES.stale)
                held.check()
                ended.append(time.monotonic())

        thread = threading.Thread(target=hold)
        thread.start()
        time.sleep(0.3)
        with pytest.raises(LeaseError, match=r"was held for 0 s: .* process \d+ \(a long job, since"):
            with lease(uri, "impatient", times=LeaseTimes(wait=0.0)):
                pass
        caplog.clear()
        with lease(uri, "next", times=TIMES):
            assert ended and time.monotonic() >= ended[0]
        thread.join()
        assert [record.message for record in caplog.records if "a long job" in record.message] == [
            next(record.message for record in caplog.records if record.message.startswith("waiting for the lease"))
        ]

    def test_a_dead_holder_is_succeeded_by_one_and_leaves_the_successor_alone(
        self, root: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        uri, began, holders = f"{root}/dead.json", time.monotonic(), []
        first = leases._acquire(uri, "then it died", NEVER)
        first.check()

        def succeed(number: int) -> None:
            with lease(uri, f"successor {number}", times=TIMES) as held:
                holders.append((number, time.monotonic() - began))
                if len(holders) == 1:
                    with pytest.raises(LeaseLostError, match=r"was lost: .*The same command goes on"):
                        first.check()
                    first.start()
                    first._write({"beat": 1})  # it is no dead one, but was stopped for long
                    first.release()
                held.check()
                time.sleep(0.2)
                held.check()

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(succeed, range(2)))
        assert len(holders) == 2 and TIMES.stale <= holders[0][1] < holders[1][1] - 0.2
        assert caplog.text.count("took over the lease") == 1 and "it is left alone" in caplog.text

    def test_what_is_no_lease_is_taken_over_as_that_of_a_dead_holder(self, root: str) -> None:
        for number, text in enumerate((b"", b"[1]", b"{", json.dumps({"free": "yes"}).encode())):
            storage.write_bytes(f"{root}/{number}.json", text)
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            for held in pool.map(lambda n: leases._acquire(f"{root}/{n}.json", "x", TIMES), range(4)):
                held.check()
        assert time.monotonic() - began >= TIMES.stale


class TestLocally(Promises):
    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return str(tmp_path / "leases")


class TestOnS3(Promises):
    @pytest.fixture
    def root(self, s3: StackEnv, request: pytest.FixtureRequest) -> str:
        return f"s3://d2f/test-lease/{request.node.name}"


@pytest.fixture
def proxy(s3: StackEnv, monkeypatch: pytest.MonkeyPatch):
    with FaultProxy.before(s3.variables["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setattr(s3_calls, "RETRY_SECONDS", 10.0)
        yield running


def test_a_swap_whose_answer_is_lost_is_its_own(proxy: FaultProxy) -> None:
    uri = "s3://d2f/test-lease/lost"
    proxy.upcoming.extend(["reset", "reset"])
    tag = compare_and_swap.swap(uri, b"1", None)
    proxy.upcoming.extend(["error", "reset"])
    after = compare_and_swap.swap(uri, b"2", tag)
    assert tag and after and proxy.counts["reset"] == 3
    proxy.upcoming.append("reset")
    assert compare_and_swap.swap(uri, b"3", tag) is None
    stored = compare_and_swap.read(uri)
    assert stored is not None and (stored.data, stored.tag) == (b"2", after)


def test_a_holder_whose_storage_is_away_does_nothing_more_until_it_is_back(proxy: FaultProxy) -> None:
    with lease("s3://d2f/test-lease/away.json", "x", times=TIMES) as held:
        proxy.outage = True
        time.sleep(TIMES.stale)
        with pytest.raises(LeaseLostError, match="its storage confirms no renewal"):
            held.check()
        proxy.outage = False
        deadline = time.monotonic() + 10
        while not certain(held) and time.monotonic() < deadline:
            pass
        held.check()


def certain(held: Lease) -> bool:
    try:
        held.check()
    except LeaseLostError:
        return False
    return True


def test_a_holder_that_slept_is_not_certain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`time.monotonic` stands still while a machine sleeps."""
    held, clock = leases._acquire(f"{tmp_path}/asleep.json", "x", NEVER), time.clock_gettime
    held.check()
    slept = {time.CLOCK_BOOTTIME: 30.0}
    monkeypatch.setattr(time, "clock_gettime", lambda which: clock(which) + slept.get(which, 0.0))
    with pytest.raises(LeaseLostError, match="confirms no renewal"):
        held.check()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, s3: StackEnv) -> None:
    (tmp_path / "file").write_text("")
    for place in (f"{tmp_path}/file", "s3://no-such-bucket-here"):
        with pytest.raises(LeaseError, match=r"the lease .*/m\.json cannot be written .*Give leases a directory"):
            with lease(f"{place}/m.json", "x", times=TIMES):
                pass
