"""Promote and roll back in processes that meet, die or lose the registry, and look after each round at what is left.

    python -m benchmarks.promotions --rounds 20 --seed 0 --results docs/results/promotions.json

Servers of its own: MLflow and S3. The rounds: two evaluations that end at once; one that is killed by SIGKILL while it
promotes, and repeated; a rollback that is killed and repeated, after which the evaluation that had promoted the version
is repeated too; one whose registry is cut off, with answers that are lost. A round is right when the alias names what
it must, rollbacks would go back through all promotions one by one, what was rolled back from is marked, and each report
says what is.
"""

import collections
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from benchmarks.fault_proxy import FaultProxy
from benchmarks.promotion_process import ALIAS, REPORT, Act, Moment, Process
from d2f_core.storage import join, read_bytes
from d2f_core.tracking import NewVersion, RunHandle, get_alias, promote, register_model, start_run
from d2f_core.tracking.aliases import ROLLED_BACK_TAG
from d2f_core.tracking.registry import PREVIOUS_TAG
from d2f_core.tracking.server import client_for, tracking_uri
from infra.local.stack import Stack

HOME, NAME = "s3://d2f/promotions", "promotions"
REQUESTS, FIRST, LATER = 3, 0.1, 0.02
"""A process is disturbed when it begins or at one of so many requests, up to so many seconds after that."""
ARRIVES = 0.3
"""Seconds for what a killed process had sent."""
OUTAGES = (1.0, 6.0)
PATIENCE = 4.5
"""Seconds for which a registry is asked again that is cut off for `OUTAGES`: some of them are too long."""
LOST_ANSWERS = 0.15
"""Share of the answers that are lost in such a round."""


@dataclass(frozen=True, kw_only=True)
class PromotionsConfig:
    rounds: int = 20
    seed: int = 0
    stale: float = 5.0
    """Seconds after which a lease that is not renewed is taken over; 20 in use, so that rounds take less long here."""
    results: Path | None = None
    """Where to write the figures as JSON."""


@dataclass(kw_only=True)
class World:
    """The registered model, and what must be true of it."""

    config: PromotionsConfig
    variables: Mapping[str, str]
    directory: Path
    draw: random.Random
    chain: list[str] = field(default_factory=list)
    """The versions that were promoted and not rolled back from, the champion last."""
    marked: set[str] = field(default_factory=set)
    promoted_by: dict[str, str] = field(default_factory=dict)
    """Outputs of the evaluations that promoted them, by version."""

    def new_version(self) -> str:
        content = self.directory / str(len(list(self.directory.iterdir())))
        content.mkdir()
        (content / "weights.safetensors").write_bytes(os.urandom(16))
        return register_model(self.run(), NewVersion(
            model_dir=content, name=NAME, model_type="toy", tags={}, description="")).version  # fmt: skip

    def run(self) -> RunHandle:
        return start_run(
            experiment=NAME, run_key=f"{HOME}/runs/training", name="training", config_yaml="", params={}, tags={}
        )

    def evaluation(self, version: str, **changes: Any) -> Act:
        return Act(**{
            "name": NAME, "candidate": version, "output": f"{HOME}/evaluations/{version}", "variables": self.variables,
            "stale": self.config.stale, **changes,
        })  # fmt: skip

    def moment(self) -> Moment:
        request = self.draw.randrange(REQUESTS + 1)
        return Moment(request=request, seconds=self.draw.uniform(0.0, LATER if request else FIRST))

    def check(self) -> None:
        """Raise AssertionError unless alias, history and marks are what they must be."""
        client = client_for(tracking_uri())
        tags, named = client.get_registered_model(NAME).tags, get_alias(NAME, ALIAS)
        expect(named, self.chain[-1], "the alias names")
        history = tags.get(PREVIOUS_TAG + ALIAS, "").split()
        while history[-1:] == [named]:
            history.pop()
        expect(history, self.chain[:-1], "before it came")
        versions = client.search_model_versions(f"name = '{NAME}'", max_results=1000)
        marked = {str(version.version) for version in versions if version.tags.get(ROLLED_BACK_TAG + ALIAS)}
        expect(marked, self.marked, "rolled back from are")


def expect(found: Any, wanted: Any, what: str) -> None:
    if found != wanted:
        raise AssertionError(f"{what} {found}, not {wanted}")


def report(act: Act) -> str:
    return json.loads(read_bytes(join(act.output, REPORT)))["promotion"]


def check_moved(act: Act, before: str, found: str) -> None:
    """The report of an evaluation that has ended well, which found the alias at version `found`."""
    moved = f"{NAME}@{ALIAS} moved to version {act.candidate} (before: version {before})"
    already = f"{NAME}@{ALIAS} is version {act.candidate} already"
    expect(report(act), already if found == act.candidate else moved, "the report says")


def at_once(world: World) -> str:
    """Two evaluations end at once: one promotes, the other says that it did not."""
    champion = world.chain[-1]
    acts = [world.evaluation(world.new_version()) for _ in range(2)]
    processes = [Process(act) for act in acts]
    for process in processes:
        process.go()
    codes = [process.end()[0] for process in processes]
    expect(sorted(codes), [0, 1], "the exit codes are")
    winner, loser = acts[codes.index(0)], acts[codes.index(1)]
    check_moved(winner, champion, champion)
    refusal = f"Not promoted: {NAME}@{ALIAS} moved to version {winner.candidate} while this evaluation ran"
    expect(report(loser)[: len(refusal)], refusal, "the report says")
    world.chain.append(winner.candidate)
    world.promoted_by[winner.candidate] = winner.output
    return f"version {winner.candidate} won, version {loser.candidate} was refused"


def killed(world: World) -> str:
    """One is killed while it promotes, and repeated."""
    act, champion, moment = world.evaluation(world.new_version()), world.chain[-1], world.moment()
    found, when = kill(act, moment)
    world.chain.append(act.candidate)
    world.promoted_by[act.candidate] = act.output
    expect(finish(act), (0, ""), "the repeated one ended with")
    check_moved(act, champion, found)
    return f"killed {when}, {'after' if found == act.candidate else 'before'} the alias moved"


def rolled_back(world: World) -> str:
    """A rollback is killed, and repeated; then the evaluation is repeated that had promoted the version."""
    while len(world.chain) < 3:
        by_evaluation(world)
    gone, moment = world.chain[-1], world.moment()
    back = world.evaluation("")
    found, when = kill(back, moment)
    for _ in range(1 + (found == world.chain[-2])):  # each one goes to the version before the one that it finds
        world.marked.add(world.chain.pop())
    expect(finish(back), (0, ""), "the repeated one ended with")
    said = f"killed {when}, {'before' if found == gone else 'after'} the alias moved"
    if output := world.promoted_by.get(gone):
        again = world.evaluation(gone, output=output)
        code, error = finish(again)
        expect((code, error.split(":")[0]), (1, "PinError"), "the evaluation of what was rolled back from ended with")
        expect(report(again)[:13], "Not promoted:", "its report says")
        said += f"; version {gone} was not promoted again"
    return said


def cut_off(world: World) -> str:
    """The registry is cut off for some seconds, and some answers are lost; what gives up is repeated."""
    version, champion, moment = world.new_version(), world.chain[-1], world.moment()
    seconds = round(world.draw.uniform(*OUTAGES), 1)
    with FaultProxy.before(world.variables["MLFLOW_TRACKING_URI"], seed=world.draw.randrange(2**32)) as proxy:
        variables = {**world.variables, "MLFLOW_TRACKING_URI": proxy.url}
        act = world.evaluation(version, variables=variables, patience=PATIENCE)
        process = Process(act)
        proxy.reset_rate = LOST_ANSWERS
        process.go(until=moment)
        proxy.outage_for(seconds)
        code, _ = process.end()
    said = f"cut off {moment} for {seconds} s, {proxy.counts['reset']} answers lost"
    if code:
        found, text = str(get_alias(NAME, ALIAS)), report(act)
        if not text.startswith("Unknown whether"):
            expect((text[:13], found), ("Not promoted:", champion), "report and alias say")
        expect(finish(world.evaluation(version)), (0, ""), "the repeated one ended with")
        check_moved(act, champion, found)
        said += "; gave up, and went on"
    else:
        check_moved(act, champion, champion)
    world.chain.append(version)
    world.promoted_by[version] = act.output
    return said


KINDS = {
    "two at once": at_once,
    "killed": killed,
    "rollback killed": rolled_back,
    "registry cut off": cut_off,
}


def kill(act: Act, moment: Moment) -> tuple[str, str]:
    """Kill a process at a moment; returns the version that it left at the alias, and when that was."""
    process = Process(act)
    process.go(until=moment)
    process.kill()
    time.sleep(ARRIVES)
    held = not json.loads(read_bytes(f"{HOME}/leases/{NAME}.json"))["free"]
    return str(get_alias(NAME, ALIAS)), f"{moment}{', holding the lease' * held}"


def finish(act: Act) -> tuple[int, str]:
    process = Process(act)
    process.go()
    return process.end()


def by_evaluation(world: World) -> None:
    """An undisturbed promotion."""
    act = world.evaluation(world.new_version())
    expect(finish(act), (0, ""), "an undisturbed promotion ended with")
    world.chain.append(act.candidate)
    world.promoted_by[act.candidate] = act.output


def play(config: PromotionsConfig, variables: Mapping[str, str], directory: Path) -> list[dict[str, Any]]:
    """Play the rounds on running servers, which the environment names, and print each."""
    draw = random.Random(config.seed)
    world = World(config=config, variables=variables, directory=directory, draw=draw)
    promote(NAME, first := world.new_version())
    world.chain.append(first)
    by_evaluation(world)
    kinds = [list(KINDS)[number % len(KINDS)] for number in range(config.rounds)]
    draw.shuffle(kinds)
    rows = []
    for number, kind in enumerate(kinds, start=1):
        began = time.monotonic()
        try:
            said, right = KINDS[kind](world), True
            world.check()
        except AssertionError as error:
            said, right = f"WRONG: {error}", False
        row = {"kind": kind, "right": right, "seconds": round(time.monotonic() - began, 1), "what": said}
        rows.append(row)
        print(f"{number:3} {kind:17} {row['seconds']:5.1f} s  {said}", flush=True)
        if not right:
            break  # what comes after starts from a state that is not known
    return rows


def summary(rows: list[dict[str, Any]], rounds: int) -> str:
    right = collections.Counter(row["kind"] for row in rows if row["right"])
    of_kind = ", ".join(f"{kind} {count}" for kind, count in sorted(right.items()))
    return f"{sum(right.values())} of {rounds} rounds right ({of_kind})"


def main() -> None:
    config = tyro.cli(PromotionsConfig)
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(Path(directory, "stack"), parts=("s3", "mlflow"), tied=True)
        variables = dict(stack.up().variables)
        os.environ.update(variables)
        try:
            (content := Path(directory, "versions")).mkdir()
            rows = play(config, variables, content)
        finally:
            stack.down()
    print(summary(rows, config.rounds))
    if config.results:
        figures = {
            "command": f"python -m benchmarks.promotions {' '.join(sys.argv[1:])}", "cpus": os.cpu_count(),
            "machine": platform.machine(), "summary": summary(rows, config.rounds), "rounds": rows,
        }  # fmt: skip
        config.results.write_text(json.dumps(figures, indent=1) + "\n")
    if not all(row["right"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
