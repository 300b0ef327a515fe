"""How much longer a training takes to its first step on nodes that have just come than on nodes that are there.

    python -m benchmarks.start_on_new_nodes --results start_on_new_nodes.json

The training of docs/cluster.md with two workers, at the toy size of tests/test_cluster_path.py, through the job server
of a fake cluster. Each round has a new cluster: its first training has its nodes started, the second finds them there.
The clock runs from the moment when both nodes are there and workers are asked for, whichever is later, until MLflow has
the first step's metrics (their own time); it is read ten times a second.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlflow
import tyro

from benchmarks.streaming import heading
from d2f_core import storage
from tests import test_cluster_path as path
from tests.image_tables import write_images
from tests.model.tiny_sd import write_tiny
from tests.own_servers import own_servers

NODES = 2
WATCH = """
import sys, time, ray
ray.init(log_to_driver=False, logging_level="error")
asked = there = None
before = set(ray.util.placement_group_table())
print("WATCHING", flush=True)
while not (asked and there):
    there = there or (sum(n["Alive"] and n["Resources"].get("GPU", 0) > 0 for n in ray.nodes()) >= 2 and time.time())
    asked = asked or (bool(set(ray.util.placement_group_table()) - before) and time.time())
    time.sleep(0.1)
print(max(asked, there), flush=True)
"""
"""Says when two nodes with GPUs are there and room for workers was asked for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path
    """File for the raw figures, JSON; written anew after every round."""
    rounds: int = 3


def seconds_to_first_step(at: path.Cluster, output: str) -> float:
    """Of one training that is run to its end."""
    watch = subprocess.Popen(
        [sys.executable, "-c", WATCH], env={**path.os.environ, **at.cluster.environment}, cwd=path.ROOT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watch.stdout is not None
    try:
        assert watch.stdout.readline() == "WATCHING\n"
        finetune = path.jobs()[3]
        at.run(finetune, "--output", output, "--name", output.rpartition("/")[2], "--train.log-every", "1")
        began = float(watch.stdout.readline())
    finally:
        watch.kill()
        watch.wait()
    client = mlflow.MlflowClient()
    names = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(names, f"attributes.run_name = '{output.rpartition('/')[2]}'")
    (first,) = [one for one in client.get_metric_history(runs[0].info.run_id, "loss") if one.step == 1]
    return first.timestamp / 1000 - began


def main(options: Options) -> None:
    found: dict[str, list[float]] = {"new": [], "there": []}
    with tempfile.TemporaryDirectory() as directory, own_servers(Path(directory, "servers")) as servers:
        storage.upload_tree(write_tiny(Path(directory, "base"), "sd15"), f"s3://{path.BUCKET}/models/sd15")
        write_images(f"s3://{path.BUCKET}/datasets/photos", path.IMAGES, side=path.SIDE)
        with path.cluster(servers, NODES, Path(directory, "first")) as at:
            at.run(path.jobs()[1])
        for number in range(options.rounds):
            with path.cluster(servers, NODES, Path(directory, f"cluster-{number}")) as at:
                for name, seconds in found.items():
                    seconds.append(seconds_to_first_step(at, f"s3://{path.BUCKET}/runs/{name}-{number}"))
                    print(f"round {number}  {name:5}  {seconds[-1]:.2f} s", flush=True)
            report = {**heading(options), "seconds": found}
            options.results.write_text(json.dumps(report, indent=1, default=str))
    ratios = [new / there for new, there in zip(found["new"], found["there"], strict=True)]
    print(f"median of {len(ratios)} ratios {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
