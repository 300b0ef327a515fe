"""The generate job, on a cluster and in this process: the same images however it runs, none lost or doubled."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from PIL import Image

from d2f_core.batch.output import OutputError, read_index
from d2f_core.data.manifest import Manifest, manifest_exists, read_manifest
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.job import check_generate, generate
from d2f_core.storage import exists, join, list_names, read_bytes, write_bytes
from d2f_core.tracking import find_run
from tests.flow.here import here
from tests.slow import slow

pytestmark = pytest.mark.usefixtures("cluster")
ROOT = Path(__file__).parents[2]
HOME = "s3://d2f/tests/generate"


def prompts(name: str, rows: list[dict[str, Any]]) -> str:
    uri = f"{HOME}/{name}.jsonl"
    write_bytes(uri, "\n".join(json.dumps(row) for row in rows).encode())
    return uri


@pytest.fixture(scope="module")
def config(base: str) -> GenerateConfig:
    """11 prompts, two of them equal, in chunks of 4 and batches of 3."""
    rows = [{"prompt": f"cat {number % 10}", "sample_id": f"id{number}"} for number in range(11)]
    return GenerateConfig(
        prompts=prompts("eleven", rows),
        model=base,
        output=f"{HOME}/reference",
        steps=(1, 2),
        batch_size=3,
        chunk_size=4,
        num_actors=1,
    )


@pytest.fixture(scope="module")
def reference(config: GenerateConfig) -> Manifest:
    with here():
        return generate(check_generate(config))


def hashes(uri: str) -> dict[tuple[str, int], str]:
    return {(row["sample_id"], row["steps"]): row["image_sha256"] for row in read_index(uri).to_pylist()}


def test_every_prompt_and_step_has_an_image_and_an_index_row(config: GenerateConfig, reference: Manifest) -> None:
    rows = read_index(config.output).to_pylist()
    assert [(row["sample_id"], row["steps"]) for row in rows[:8]] == [(f"id{n}", s) for s in (1, 2) for n in range(4)]
    assert len({(row["sample_id"], row["steps"]) for row in rows}) == len(rows) == reference.num_rows == 22
    assert reference.counts == {"prompts": 11, "images": 22, "failed": 0} and reference.kind == "generations"
    assert len({row["image_sha256"] for row in rows}) == 22, "equal prompts have noise of their own"
    for row in rows:
        assert row["image_uri"] == f"{config.output}/images/{row['sample_id']}-{row['steps']}.png"
        assert hashlib.sha256(read_bytes(row["image_uri"])).hexdigest() == row["image_sha256"]
        assert (row["solver"], row["guidance"], row["seed"], row["error"]) == ("ddim", 3.0, 0, None)
        assert row["num_evaluations"] == row["steps"]
    assert len(list_names(f"{config.output}/images")) == 22


def test_images_do_not_depend_on_the_cluster_nor_on_the_number_of_actors(
    config: GenerateConfig, reference: Manifest
) -> None:
    several = replace(config, num_actors=2, output=f"{HOME}/several")
    generate(check_generate(several))
    assert hashes(several.output) == hashes(config.output)


def test_a_finished_job_does_nothing(
    config: GenerateConfig, reference: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert generate(check_generate(config)).digest == reference.digest
    assert "all 22 images are there, nothing to do" in caplog.text


def test_an_output_of_another_job_is_refused(config: GenerateConfig, reference: Manifest) -> None:
    with pytest.raises(OutputError, match=r"another job \(seed was 0, now 1; batch_size was 3, now 2\)"):
        generate(check_generate(replace(config, seed=1, batch_size=2)))


def test_missing_chunks_are_made_again_and_no_others(config: GenerateConfig, reference: Manifest) -> None:
    from d2f_core.storage import filesystem

    part = replace(config, output=f"{HOME}/partial")
    with here():
        complete = generate(check_generate(part))
    fs, path = filesystem(part.output)
    fs.rm([f"{path}/manifest.json", f"{path}/index/part-000001.parquet"])
    kept = {name: fs.info(f"{path}/images/{name}")["LastModified"] for name in list_names(f"{part.output}/images")}
    time.sleep(1.1)  # LastModified counts in seconds
    with here():
        assert generate(check_generate(part)).digest == complete.digest
    assert hashes(part.output) == hashes(config.output)
    again = {
        name.split("-")[0] for name, when in kept.items() if fs.info(f"{path}/images/{name}")["LastModified"] != when
    }
    assert again == {"id4", "id5", "id6", "id7"}


@slow("65 s; missing chunks are made again above, and a killed head node's job is benchmarks.generate_kills")
def test_a_killed_job_goes_on_and_ends_with_the_same_images(config: GenerateConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"dog {number}", "sample_id": f"id{number}"} for number in range(24)]
    whole = replace(
        config, prompts=prompts("many", rows), output=f"{HOME}/whole", steps=(30,), chunk_size=1, batch_size=1
    )
    killed = replace(whole, output=f"{HOME}/killed")
    code = (
        "import sys, json; from pipelines.generate import main\n"
        "from d2f_core.flow.generate.config import GenerateConfig\n"
        "c = json.loads(sys.argv[1]); c['steps'] = tuple(c['steps']); main(GenerateConfig(**c))"
    )
    arguments = [sys.executable, "-c", code, json.dumps(killed.__dict__)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 150
        while len(list_names(f"{killed.output}/index")) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not manifest_exists(killed.output), "killed too late to prove anything"
    generate(check_generate(killed))
    generate(check_generate(whole))
    assert hashes(killed.output) == hashes(whole.output) and len(hashes(whole.output)) == 24
    assert len(list_names(f"{killed.output}/images")) == 24


def test_a_row_has_its_own_seed_and_negative_prompt(config: GenerateConfig, reference: Manifest) -> None:
    rows = [
        {"prompt": "cat 0", "sample_id": "id0"},
        {"prompt": "cat 1", "sample_id": "id1", "seed": 5},
        {"prompt": "cat 2", "sample_id": "id2", "negative_prompt": "a dog"},
    ]
    own = replace(config, prompts=prompts("own", rows), output=f"{HOME}/own", steps=(2,))
    with here():
        generate(check_generate(own))
    made, plain = hashes(own.output), hashes(config.output)
    assert [made[f"id{n}", 2] == plain[f"id{n}", 2] for n in range(3)] == [True, False, False]
    assert [row["seed"] for row in read_index(own.output).to_pylist()] == [0, 5, 0]


def test_rows_have_steps_guidance_and_size_of_their_own(config: GenerateConfig, reference: Manifest) -> None:
    rows = [
        {"prompt": "cat 0", "sample_id": "id0"},
        {"prompt": "cat 1", "sample_id": "id1", "steps": 3},
        {"prompt": "cat 2", "sample_id": "id2", "guidance": 1.0, "height": 32, "width": 8},
    ]
    own = replace(config, prompts=prompts("overrides", rows), output=f"{HOME}/overrides", format="webp")
    with here():
        counts = generate(check_generate(own)).counts
    assert counts["images"] == 5, "two numbers of steps, but for the row with its own"
    made = {(row["sample_id"], row["steps"]): row for row in read_index(own.output).to_pylist()}
    assert sorted(made) == [("id0", 1), ("id0", 2), ("id1", 3), ("id2", 1), ("id2", 2)]
    assert (made["id2", 1]["guidance"], made["id0", 1]["guidance"]) == (1.0, 3.0)
    sizes = {key: Image.open(io.BytesIO(read_bytes(row["image_uri"]))) for key, row in made.items()}
    assert sizes["id2", 2].size == (8, 32) and sizes["id0", 2].size == (16, 16)
    assert {image.format for image in sizes.values()} == {"WEBP"}


def test_the_job_has_an_mlflow_run_of_its_own(config: GenerateConfig, reference: Manifest) -> None:
    handle = find_run(experiment=config.experiment, run_key=config.output)
    assert handle
    run = mlflow.MlflowClient().get_run(handle.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["images"] == 22 and run.data.metrics["failed"] == 0
    assert run.data.tags["d2f.prompts"] == config.prompts and run.data.params["seed"] == "0"


def test_an_image_that_is_not_finite_is_a_reason_not_a_picture(config: GenerateConfig) -> None:
    broken = replace(config, guidance=1e38, output=f"{HOME}/broken", steps=(2,))
    with here():
        manifest = generate(check_generate(broken))
    rows = read_index(broken.output).to_pylist()
    assert manifest.counts == {"prompts": 11, "images": 0, "failed": 11}
    assert all("not finite" in row["error"] and row["image_uri"] is None for row in rows)
    assert not exists(f"{broken.output}/images")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "eulr"}, "solver='eulr' is not known"),
        ({"resolution": 17}, "resolution=17: height=17 must be a multiple of the autoencoder's 2 pixels"),
        ({"emit": "pairs"}, "emit='pairs' makes one latent per prompt"),
        ({"model": "s3://d2f/none"}, "holds no files"),
        ({"model": "models:/none@candidate"}, "alias candidate not found|not found"),
        ({"prompts": "s3://d2f/none.csv"}, "No prompt file"),
        ({"output": "s3://nobucket/x"}, "no bucket 'nobucket'|not writable"),
        ({"output": ""}, "output is empty"),
        ({"cpus_per_actor": 99, "node_wait_seconds": 0}, "An actor needs 99 CPU .* and the cluster has 8 CPU"),
    ],
)
def test_bad_settings_are_refused(config: GenerateConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        generate(check_generate(replace(config, **{"output": f"{HOME}/bad", **change})))
    assert "\n" not in str(caught.value)


def test_the_index_lists_its_parts(config: GenerateConfig, reference: Manifest) -> None:
    there = read_manifest(config.output)
    assert [file.path for file in there.files] == [f"index/part-00000{n}.parquet" for n in range(3)]
    for file in there.files:
        data = read_bytes(join(config.output, file.path))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)
