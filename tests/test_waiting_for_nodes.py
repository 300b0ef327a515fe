"""Nodes are asked for, waited for and shared, on a cluster whose autoscaler starts them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fake_cluster import FakeCluster, NodeKind
from tests.slow import slow
from tests.waiting_jobs import ESTIMATE

pytestmark = [pytest.mark.starts_cluster, pytest.mark.timeout(400)]
DELAY = 12
"""Seconds until the node with a GPU comes; longer than a job is told to wait, for it has begun to start."""


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    kinds = {
        "small": NodeKind(resources={"CPU": 2, "memory": 3e9}, most=2),
        "gpu": NodeKind(resources={"CPU": 2, "GPU": 1}, most=1, delay=DELAY),
    }
    cluster = FakeCluster(tmp_path_factory.mktemp("growing") / "cluster", kinds)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()


def ended(process: psutil.Popen, log: Path, seconds: float) -> tuple[int, str]:
    """Exit status and what was printed; AssertionError with it when the job takes longer."""
    try:
        return process.wait(seconds), log.read_text()
    except psutil.TimeoutExpired:
        raise AssertionError(f"no end in {seconds} s:\n{log.read_text()}") from None


def times(name: str, text: str) -> list[float]:
    return [float(word) for line in re.findall(rf"^{name} (.*)$", text, re.MULTILINE) for word in line.split()]


def test_a_local_path_is_refused_while_no_node_is_there_that_could_share_it(growing: FakeCluster, tmp_path) -> None:
    """First of all, for nodes stay."""
    log = tmp_path / "log"
    with growing.job("paths", tmp_path / "run", 0, log=log) as job:
        status, text = ended(job, log, 90)
    assert status == 0 and "is on a disk of this job's node, which has no CPUs for work" in text, text


def test_a_batch_job_starts_when_its_node_comes_though_it_was_told_to_wait_less(growing: FakeCluster, tmp_path) -> None:
    log = tmp_path / "log"
    with growing.job("generate", 1, 1, 1, DELAY // 2, log=log) as job:
        status, text = ended(job, log, 120)
    assert status == 0, text
    assert "waiting for room" in text and "no node has room for 1 actor of 1 CPU, 1 GPU" in text
    (there,), (row,) = times("THERE", text), times("ROW", text)
    assert 0 < row - there < 20, "an actor's start included"


def test_a_worker_that_fits_on_no_node_is_refused_in_one_line(growing: FakeCluster, tmp_path) -> None:
    log = tmp_path / "log"
    with growing.job("train", tmp_path / "run", 1, 3, 3, 1, log=log) as job:
        status, text = ended(job, log, 90)
    (line,) = re.findall(r"^REFUSED (.*)$", text, re.MULTILINE)
    assert status == 2 and "no node has room for 1 worker of 3 CPU; waited" in line, text
    assert re.search(r"\d nodes? \(127\.0\.0\.1\) with 2 of 2 CPU free", line) and "--train.node-wait-seconds" in line
    assert "Traceback" not in text and not [*(tmp_path / "run").glob("began-*")]


def test_a_worker_whose_memory_fits_on_no_node_is_refused_in_one_line(growing: FakeCluster, tmp_path) -> None:
    log = tmp_path / "log"
    with growing.job("train", tmp_path / "run", 1, 1, 3, 1, "", 999, log=log) as job:
        status, text = ended(job, log, 90)
    (line,) = re.findall(r"^REFUSED (.*)$", text, re.MULTILINE)
    assert status == 2 and "no node has room for 1 worker of 1 CPU, 999.0 GB memory; waited" in line, text
    assert re.search(r" [\d.]+ of [\d.]+ GB memory free", line) and "--train.worker-memory-gb, add" in line


def test_two_trainings_share_a_cluster_and_a_third_says_who_holds_it(growing: FakeCluster, tmp_path) -> None:
    """Each takes two of three nodes whole, and its evaluation a part of the third."""
    logs = [tmp_path / f"{name}.log" for name in ("first", "second", "third")]
    with (
        growing.job("train", tmp_path / "run-1", 2, 2, 150, 8, log=logs[0]) as first,
        growing.job("train", tmp_path / "run-2", 2, 2, 150, 8, log=logs[1]) as second,
        growing.job("train", tmp_path / "unborn", 2, 2, 0, 1, tmp_path / "run-*", log=logs[2]) as third,
    ):
        status, refused = ended(third, logs[2], 150)
        assert status == 2 and re.search("REFUSED .* of which other jobs hold [45] CPU: .*; waited [0-4] s", refused)
        results = [ended(job, log, 150) for job, log in zip((first, second), logs[:2], strict=True)]
    for status, text in results:
        assert status == 0, text
        assert "FailurePolicy" not in text and "Traceback" not in text, text
    (begin, end), (other_begin, other_end) = (times("RAN", text) for _, text in results)
    assert end < other_begin or other_end < begin, "one after the other"
    assert all("waiting for room" in text for _, text in results)
    for run in ("run-1", "run-2"):
        (bundles, again) = (json.loads(file.read_text()) for file in (tmp_path / run).glob("began-*"))
        assert bundles == again == [{"CPU": 2, "memory": ESTIMATE}] * 2


def test_nodes_that_share_the_disk_say_so(growing: FakeCluster, tmp_path) -> None:
    log = tmp_path / "log"
    with growing.job("paths", tmp_path / "run", 2, log=log) as job:
        status, text = ended(job, log, 150)
    (seconds,) = times("SHARED", text)
    assert status == 0 and seconds < 30 and not (tmp_path / "run").exists()


def test_a_training_whose_place_was_taken_waits_again(growing: FakeCluster, tmp_path) -> None:
    """Two of three nodes are held, so one worker has room and its group has none."""
    log = tmp_path / "log"
    with growing.job("lose", tmp_path / "run", log=log) as job:
        status, text = ended(job, log, 200)
    assert status == 0 and times("RAN", text), text
    assert "the attempt ended, failure 1 in a row: " in text and "startup timed out" in text, text


@pytest.mark.parametrize("seconds", [50, pytest.param(130, marks=slow("3 minutes: 50 s are two of its periods"))])
def test_nodes_are_still_asked_for_after_ray_data_has_sent_its_own_requests(
    growing: FakeCluster, tmp_path: Path, seconds: int
) -> None:
    """Its coordinator sends them every 20 s."""
    log = tmp_path / "log"
    with growing.job("ask", 3, seconds, log=log) as job:
        status, text = ended(job, log, seconds + 70)
    seen = [[int(word) for word in line.split()] for line in re.findall(r"^SEEN (.*)$", text, re.MULTILINE)]
    assert status == 0 and seen, text
    first = next(second for second, group, requested in seen if group and requested)
    assert all(group for second, group, _ in seen if first <= second <= seconds - 5), "the group stays a demand"
    assert not any(requested for *_, requested in seen[-20:]), "the other is gone, or this shows nothing"
    waited = re.search(r"REFUSED .*; waited (\d+) s", text)
    assert (
        waited
        and seconds <= int(waited[1]) < seconds + 20
        and "3 need 3 GPU (3 workers of 1 GPU), and the cluster has" in text
    )
