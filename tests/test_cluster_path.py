"""A fresh user's path on a cluster: the commands of docs/cluster.md in their order, on one of the same shape.

The nodes and their GPUs are made up (`tests.fake_cluster`, `tests.made_up_gpus`), networks and images tiny. Job server,
autoscaler, Ray Data, Ray Train, DeepSpeed, S3 and MLflow are real.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlflow
import pytest
import yaml

from d2f_core import storage
from d2f_core.data.manifest import read_manifest
from d2f_core.train import checkpoint
from infra import docs_commands
from tests.fake_cluster import FakeCluster, NodeKind
from tests.image_tables import write_images
from tests.model.tiny_sd import write_tiny
from tests.own_servers import own_servers
from tests.slow import slow

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/cluster.md"
BUCKET = "d2f/test-cluster-path"
IMAGES, PROMPTS, SIDE = 48, 32, 64
DELAY = 3.0
"""Seconds until a node starts; on AWS minutes."""
pytestmark = [pytest.mark.starts_cluster, pytest.mark.timeout(900)]
TINY: dict[str, list[str]] = {
    "pipelines.encode_latents": ["--resolution", f"{SIDE}", "--rows-per-part", "8", "--min-side", "8"],
    "pipelines.finetune": [
        "--train.num-steps", "2", "--train.global-batch-size", "16", "--train.micro-batch-size", "1",
        "--train.checkpoint-every", "1", "--train.evaluate-every", "1", "--train.threads-per-worker", "1",
        "--train.learning-rate", "1e-3", "--train.lanes", "8", "--train.window-rows", "8", "--holdout-rows", "8",
        "--preview.steps", "2", "--preview.resolution", f"{SIDE}",
    ],
    "pipelines.register": [],
    "pipelines.evaluate": [
        "--evaluations", "2", "4", "--straightness-prompts", "2", "--straightness-steps", "2", "--chunk-size", "8",
        "--measure.replicates", "20", "--resolution", f"{SIDE}", "--generate-batch-size", "8",
    ],
    "pipelines.generate": ["--steps", "2", "--resolution", f"{SIDE}", "--chunk-size", "8"],
}  # fmt: skip
"""Flags that make a job small. All else is as the page prints it."""
OTHER_PAGES = [ROOT / "README.md", ROOT / "docs/real_checkpoints.md"]
OURS = {
    "s3://photos/train": f"s3://{BUCKET}/datasets/photos",
    "s3://BUCKET/images": f"s3://{BUCKET}/datasets/photos",
    "s3://models/sd15": f"s3://{BUCKET}/models/sd15",
    "s3://latents/train": f"s3://{BUCKET}/latents/photos",
    "s3://BUCKET/latents/sd15-512": f"s3://{BUCKET}/latents/photos",
    "s3://runs/one": f"s3://{BUCKET}/runs/one",
    "s3://BUCKET/prompts.parquet": f"s3://{BUCKET}/prompts.jsonl",
}
"""What the other pages' places are here; their outputs are only looked at."""
LOOKED = "inputs were checked, nothing was done"


def fewer(nodes: int) -> dict[str, list[str]]:
    """Flags for a cluster with fewer GPU nodes than the page's."""
    pool = ["--num-actors", f"{nodes}"]
    return {
        "pipelines.encode_latents": pool,
        "pipelines.finetune": ["--train.num-workers", f"{nodes}"],
        "pipelines.evaluate": ["--score.num-actors", f"{nodes}"],
        "pipelines.generate": pool,
    }


def kinds(gpu_nodes: int) -> dict[str, NodeKind]:
    """The groups of the cluster file, the head aside."""
    file = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    assert file["available_node_types"][file["head_node_type"]]["resources"] == {"CPU": 0}
    return {
        name: NodeKind(
            resources=kind["resources"],
            least=kind["min_workers"],
            most=min(kind["max_workers"], gpu_nodes),
            delay=DELAY,
        )
        for name, kind in file["available_node_types"].items()
        if name != file["head_node_type"]
    }


class Cluster:
    """One cluster on which the page's commands are run."""

    def __init__(self, cluster: FakeCluster, flags: dict[str, list[str]]) -> None:
        self.cluster, self.flags = cluster, flags

    def run(self, argv: Sequence[str], *more: str) -> str:
        """What the job printed; AssertionError when it fails."""
        words = [OURS.get(word, word).replace("BUCKET", BUCKET) for word in argv]
        words[words.index("--address") + 1] = self.cluster.environment["RAY_API_SERVER_ADDRESS"]
        words = [word.replace("http://YOUR-MLFLOW:5000", os.environ["MLFLOW_TRACKING_URI"]) for word in words]
        module = words[words.index("-m") + 1]
        words[0] = str(Path(sys.executable).parent / words[0])
        done = subprocess.run(
            [*words, *TINY[module], *self.flags.get(module, []), *more],
            env={**os.environ, **self.cluster.environment}, cwd=ROOT, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{argv}:\n{done.stdout}{done.stderr}"
        return done.stdout


def submitted(page: Path) -> list[tuple[str, ...]]:
    """The jobs that a page submits."""
    return [command.argv for command in docs_commands.commands(page) if command.argv[:3] == ("ray", "job", "submit")]


def jobs() -> list[tuple[str, ...]]:
    found = submitted(PAGE)
    assert len(found) == 7, "two looks, encode, finetune, register, evaluate, generate"
    return found


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """S3 and MLflow, with a base model, images and prompts."""
    with own_servers(tmp_path_factory.mktemp("servers")) as variables:
        base = write_tiny(tmp_path_factory.mktemp("base"), "sd15")
        storage.upload_tree(base, f"s3://{BUCKET}/models/sd15")
        write_images(f"s3://{BUCKET}/datasets/photos", IMAGES, side=SIDE)
        lines = [json.dumps({"prompt": f"thing {number}"}) for number in range(PROMPTS)]
        storage.write_bytes(f"s3://{BUCKET}/prompts.jsonl", "\n".join(lines).encode())
        yield variables


@contextlib.contextmanager
def cluster(servers: dict[str, str], nodes: int, directory: Path) -> Iterator[Cluster]:
    made_up = os.pathsep.join([str(ROOT / "tests/made_up_gpus"), str(ROOT)])
    fake = FakeCluster(directory, kinds(nodes), variables={**servers, "PYTHONPATH": made_up})
    try:
        fake.start()
        yield Cluster(fake, {} if nodes == 8 else fewer(nodes))
    finally:
        fake.end()


def encode_and_finetune(at: Cluster, nodes: int) -> None:
    look, encode, look_again, finetune, *_ = jobs()
    assert LOOKED in at.run(look)
    at.run(encode)
    assert read_manifest(f"s3://{BUCKET}/latents/photos").num_rows == IMAGES
    assert LOOKED in at.run(look_again)
    trained = at.run(finetune)
    assert f"training from step 0 to 2 on {nodes} workers" in trained
    assert "evaluation validation_flow_loss" in trained, "between steps, on a worker's device"
    (*_, last) = checkpoint.list_checkpoints(f"s3://{BUCKET}/runs/photos")
    assert (last.manifest.step, last.manifest.num_workers) == (2, nodes)


def test_images_are_encoded_and_a_model_is_finetuned_on_nodes_that_come_when_a_job_asks(
    servers: dict[str, str], tmp_path: Path
) -> None:
    with cluster(servers, 2, tmp_path / "cluster") as at:
        encode_and_finetune(at, 2)


@slow("10 minutes with eight nodes; two take the first half of the same path")
@pytest.mark.timeout(2400)
def test_the_pages_commands_lead_from_a_checkpoint_and_images_to_a_registered_model_and_pictures(
    servers: dict[str, str], tmp_path: Path
) -> None:
    register, evaluate, generate = jobs()[4:]
    with cluster(servers, 8, tmp_path / "cluster") as at:
        encode_and_finetune(at, 8)
        at.run(register)
        assert mlflow.MlflowClient().get_model_version_by_alias("photos", "candidate").version == "1"
        at.run(evaluate)
        assert storage.exists(f"s3://{BUCKET}/evaluations/photos/report.html")
        at.run(generate)
        assert read_manifest(f"s3://{BUCKET}/generations/photos").num_rows == PROMPTS
        for page in OTHER_PAGES:
            for command in submitted(page):
                if "pipelines.encode_depth" not in command:  # it wants a set of depth and a base of its own
                    assert LOOKED in at.run(command, "--dry-run"), command
