"""Refuses local paths that not all of a cluster's nodes share, before a job writes where nobody else can read.

What is read must hold the same files on each node, at the path as it was given or in the project's directory, which
Ray copies to all nodes. What is written must show on each node a file that this process has just put there. Nodes are
asked side by side by tasks that take no CPU, so that 128 of them take as long as the slowest. With a single node, which
is all a laptop has, nobody is asked.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2f_core.file_systems import network_type
from d2f_core.nodes import SHOWN_ADDRESSES, Node, living_nodes

logger = logging.getLogger(__name__)

SHARED = "D2F_SHARED_PATHS"
"""Environment variable: directories, separated by colons, that all nodes share although it cannot be seen."""
ASK_SECONDS = 60.0
"""Given to the nodes to answer; a worker process has to start on each."""
SEEN_SECONDS = 5.0
"""Given to a shared disk to show a new file on another node."""
SAMPLE_FILES, SAMPLE_ENTRIES, SAMPLE_BYTES = 16, 2000, 65536
"""Of a directory that is read, so many of its files are compared, found among so many entries; of each file its size
and so many bytes of its beginning and of its end."""
PROJECT_ROOT = Path(__file__).parents[1]


class NotSharedError(ValueError):
    """A local path on several nodes that they do not share; names the path, the rule and the fix."""


@dataclass(frozen=True)
class Question:
    """What a node is to look for."""

    path: str
    """As it was given."""
    files: tuple[tuple[str, int, str], ...]
    """Relative name, size and digest of each; a name of "" is the path itself."""
    seconds: float = 0.0
    """For how long it is looked for again."""


def check_shared(*, reads: Mapping[str, str], writes: Mapping[str, str]) -> None:
    """Refuse local paths that the nodes that may work do not share; connect to Ray before.

    Args:
        reads: field of the config -> URI or path that workers read; empty ones, other schemes than `file` and what does
            not exist are left out.
        writes: the same of what is written.

    Raises:
        NotSharedError: one line.
    """
    inputs = {name: path for name, path in reads.items() if path and not _is_known(path) and _found(path)}
    outputs = {name: path for name, path in writes.items() if path and not _is_known(path)}
    if not inputs and not outputs:
        return
    works_here, others = _workers()
    if others:
        _ask_all(others, inputs, outputs)
    elif not works_here:
        _refuse_unseen(inputs | outputs)


def _is_known(path: str) -> bool:
    """Whether nobody needs to be asked: no local path, or one that is said to be shared."""
    if path.startswith("models:/") or ("://" in path and not path.startswith("file://")):
        return True
    trusted = [Path(one).resolve() for one in os.environ.get(SHARED, "").split(":") if one]
    return any(_plain(path).resolve().is_relative_to(one) for one in trusted)


def _plain(path: str) -> Path:
    return Path(path.removeprefix("file://")).expanduser()


def _found(path: str) -> Path | None:
    """Where it is on this machine: as given, or in the project's directory; None: nowhere."""
    return next((place for place in (_plain(path), PROJECT_ROOT / _plain(path)) if place.exists()), None)


def _workers() -> tuple[bool, list[Node]]:
    """Whether there is work for this process's node, and the other nodes for which there is."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    working = [node for node in living_nodes() if node.total.get("CPU") or node.total.get("GPU")]
    return any(node.id == here for node in working), [node for node in working if node.id != here]


def _ask_all(nodes: Sequence[Node], inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    questions = {name: Question(path, tuple(_sample(path))) for name, path in inputs.items()}
    with contextlib.ExitStack() as stack:
        questions |= {name: stack.enter_context(_marked(path)) for name, path in outputs.items()}
        answers = _ask(nodes, list(questions.values()), ASK_SECONDS)
    for number, (name, question) in enumerate(questions.items()):
        if blind := {node.address for node in nodes if node.id in answers and not answers[node.id][number]}:
            shown = ", ".join(sorted(blind)[:SHOWN_ADDRESSES])
            raise NotSharedError(
                f"{name}={question.path!r} is on this job's node, and other nodes do not see the same there: "
                f"{shown}{', ...' * (len(blind) > SHOWN_ADDRESSES)}. {_rule()}"
            )
    if silent := len(nodes) - len(answers):
        paths = [question.path for question in questions.values()]
        logger.warning(
            "%d of %d nodes did not say in %.0f s whether they see %s", silent, len(nodes), ASK_SECONDS, paths
        )


def _refuse_unseen(paths: Mapping[str, str]) -> None:
    """For nodes that are to come: whatever a network's file system holds, they are taken to mount too."""
    for name, path in paths.items():
        if not network_type(_plain(path).absolute()):
            raise NotSharedError(
                f"{name}={path!r} is on a disk of this job's node, which has no CPUs for work, and no other node is "
                f"there yet that could be asked whether it sees the same. {_rule()}"
            )


def _rule() -> str:
    return (
        "On several nodes a local path must lie on a disk that all of them share. Give s3://..., or a shared disk at "
        f"the same path everywhere; {SHARED}=DIRECTORY names one that is shared although nothing shows it."
    )


@contextlib.contextmanager
def _marked(path: str) -> Iterator[Question]:
    """Put a new file there, to be seen on the other nodes, and leave nothing of it."""
    place, name, text = _plain(path).absolute(), f".seen-{secrets.token_hex(8)}", secrets.token_bytes(16)
    made = list(itertools.takewhile(lambda parent: not parent.exists(), (place, *place.parents)))
    file = place / name
    try:
        try:
            place.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text)
        except OSError as error:
            raise NotSharedError(f"{path!r} cannot be written to ({error}). Choose another place.") from None
        yield Question(path, ((name, *_describe(file)),), SEEN_SECONDS)
    finally:
        with contextlib.suppress(NotADirectoryError):
            file.unlink(missing_ok=True)
        for directory in made:
            with contextlib.suppress(OSError):  # another process has put something there meanwhile
                directory.rmdir()


def _sample(path: str) -> Iterator[tuple[str, int, str]]:
    root = _found(path)
    assert root is not None
    if root.is_file():
        yield "", *_describe(root)
        return
    files = (Path(where, name) for where, _, names in os.walk(root) for name in names)
    plain = (file for file in itertools.islice(files, SAMPLE_ENTRIES) if file.is_file())
    for file in itertools.islice(plain, SAMPLE_FILES):
        with contextlib.suppress(OSError):  # gone meanwhile, or not for everybody
            yield str(file.relative_to(root)), *_describe(file)


def _describe(file: Path) -> tuple[int, str]:
    """Size, and digest of beginning and end; the times of copies differ, and so would say nothing."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        digest = hashlib.sha256(handle.read(SAMPLE_BYTES))
        handle.seek(max(0, size - SAMPLE_BYTES))
        digest.update(handle.read(SAMPLE_BYTES))
    return size, digest.hexdigest()


def _ask(nodes: Sequence[Node], questions: Sequence[Question], seconds: float) -> dict[str, list[bool]]:
    """The answers of each node by its id, in the order of the questions; a node that gives none is left out."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
        asked[remote.options(scheduling_strategy=strategy).remote(questions)] = node.id
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
    for reference in late:
        ray.cancel(reference, force=True)
    answers = {}
    for reference in done:
        with contextlib.suppress(RayError):  # a node that went away meanwhile
            answers[asked[reference]] = ray.get(reference)
    return answers


def look(questions: Sequence[Question]) -> list[bool]:
    """On a node: whether it sees what each question names."""
    return [_sees(question) for question in questions]


def _sees(question: Question) -> bool:
    deadline = time.monotonic() + question.seconds
    while not any(_same(place, question) for place in (_plain(question.path), PROJECT_ROOT / _plain(question.path))):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def _same(place: Path, question: Question) -> bool:
    try:
        files = [(place / name if name else place, size, digest) for name, size, digest in question.files]
        return place.exists() and all(_describe(file) == (size, digest) for file, size, digest in files)
    except OSError:
        return False
