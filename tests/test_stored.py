"""What the code of 7e49dc7 stored is used by today's: a table, a generation, a checkpoint, registered versions.

tests/stored holds a tiny one of each, made by that commit's own jobs on a stack of servers, and the configs of those.
"""

import dataclasses
import io
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from d2f_core import storage
from d2f_core.batch.output import OutputError, read_index
from d2f_core.batch.table_job import make_table
from d2f_core.data.manifest import read_manifest
from d2f_core.flow.encode.check import check_encode
from d2f_core.flow.encode.config import EncodeConfig
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.job import check_generate, generate
from d2f_core.train import checkpoint
from pipelines import finetune
from pipelines.checkpoint_export import export_checkpoint
from pipelines.cli import from_yaml
from pipelines.configs import FinetuneConfig
from pipelines.export_config import CheckpointExportConfig
from tests.depth_tables import picture
from tests.slow import slow

STORED = Path(__file__).parent / "stored"
HOME = "s3://d2f/stored"


@pytest.fixture(scope="module")
def there(s3: object) -> None:
    """Everything on S3, at the places where it was."""
    del s3
    for name in ("images", "latents", "generations", "run"):
        storage.upload_tree(STORED / name, f"{HOME}/{name}")
    storage.upload_tree(STORED / "version-image/artifacts/model", f"{HOME}/run/model")
    storage.write_bytes(f"{HOME}/prompts.jsonl", (STORED / "prompts.jsonl").read_bytes())
    storage.write_bytes(f"{HOME}/run/config.yaml", (STORED / "finetune.yaml").read_bytes())


def stored_config(kind: type, name: str):
    return from_yaml(kind, (STORED / f"{name}.yaml").read_text(), source=name)


def test_a_latent_table_is_complete_for_the_same_command(there: None) -> None:
    config = stored_config(EncodeConfig, "encode")
    manifest = make_table(check_encode(config))
    assert manifest.digest == (STORED / "latents.digest").read_text().strip()
    assert read_manifest(config.output).digest == manifest.digest and manifest.num_rows == 14


def test_a_generation_is_complete_for_the_same_command_and_another_is_refused(there: None) -> None:
    config = stored_config(GenerateConfig, "generate")
    assert generate(check_generate(config)).counts == {"prompts": 3, "images": 6, "failed": 0}
    with pytest.raises(OutputError, match=r"another job \(seed was 0, now 1\)"):
        generate(check_generate(dataclasses.replace(config, seed=1)))
    rows = read_index(config.output).to_pylist()
    assert [(row["sample_id"], row["steps"]) for row in rows[:4]] == [("id0", 1), ("id1", 1), ("id0", 2), ("id1", 2)]


def test_a_run_is_known_by_its_config_and_its_checkpoint_becomes_a_model(there: None, stack: object) -> None:
    del stack
    config = stored_config(FinetuneConfig, "finetune")
    (found,) = checkpoint.candidates(config.output, finetune.check(config).identity)
    for kind in checkpoint.KINDS:  # each tensor's hash is compared
        assert checkpoint.read_tensors(found, kind).keys() == found.manifest.tensors[kind].keys()
    exported = export_checkpoint(CheckpointExportConfig(run=config.output, step=2, output=f"{HOME}/exported"))
    assert storage.exists(f"{exported}/diff2flow.json")


@slow("20 s: that the checkpoint belongs to the run, and that all its tensors are read, stays above")
def test_a_run_goes_on_to_the_weights_that_it_had(there: None, cluster: None) -> None:
    config = stored_config(FinetuneConfig, "finetune")
    finetune.main(config)
    last = checkpoint.list_checkpoints(config.output)[-1]
    assert last.manifest.step == 4
    expected = load_file(STORED / "weights-of-step-4.safetensors")
    for name, weight in checkpoint.read_tensors(last, "weights").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-4)  # another processor rounds otherwise


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    shutil.copytree(STORED / f"version-{request.param}", tmp_path / "version")
    return mlflow.pyfunc.load_model(str(tmp_path / "version"))


@pytest.mark.parametrize("version", ["image"], indirect=True)
def test_a_registered_version_draws_the_images_that_it_drew(version) -> None:
    asked = {"prompt": ["thing 1", "thing 2"], "seed": [3, 4], "num_inference_steps": [2, 1]}
    for number, png in enumerate(version.predict(pd.DataFrame(asked))):
        now, then = (np.asarray(Image.open(file), int) for file in (io.BytesIO(png), STORED / f"image-{number}.png"))
        assert now.shape == then.shape == (16, 16, 3) and np.abs(now - then).max() <= 1


@pytest.mark.parametrize("version", ["depth"], indirect=True)
def test_a_registered_depth_version_sees_the_depth_that_it_saw(version) -> None:
    asked = {"image": [picture(0), picture(1)], "num_inference_steps": [2, 1], "ensemble": [2, 2]}
    for number, depth in enumerate(version.predict(pd.DataFrame(asked))["depth"]):
        np.testing.assert_allclose(np.load(io.BytesIO(depth)), np.load(STORED / f"depth-{number}.npy"), atol=1e-3)
