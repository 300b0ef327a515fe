"""A registered matcher against real servers: MLflow's tools and stock transformers answer as this project does."""

import io
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from d2f_core.correspondence.artifact import (
    MatcherDescription,
    MatcherError,
    load_matcher,
    load_student,
    upload_matcher,
)
from d2f_core.correspondence.config import MatcherConfig, StudentConfig
from d2f_core.correspondence.matching import Decoding
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.publish.config import RegisterMatcherConfig
from d2f_core.correspondence.publish.job import check_register, export_transformers, register
from d2f_core.correspondence.publish.merged import processor_config
from d2f_core.correspondence.student import add_adapters, load_network, trained
from d2f_core.model.base import described_copy
from d2f_core.registration import RegisterError
from d2f_core.tracking import ModelVersionInfo, resolve_model, start_run
from d2f_core.train.config import TrainConfig
from infra.local.stack import StackEnv
from pipelines import register_matcher
from pipelines.distill_config import DistillConfig
from pipelines.distill_job import check_distill
from pipelines.export import main as export
from pipelines.export_config import MatcherExportConfig
from tests.correspondence.features import write_features
from tests.correspondence.tiny_transformers import write

RUN, EXPERIMENT = "s3://d2f/tests/matcher", "matcher tests"
CONFIG = RegisterMatcherConfig(run=RUN, name="matcher-tests", experiment=EXPERIMENT)
TEACHERS = {"lite0": {"weights": "57934"}, "dino": {"weights": "a77ad"}}


def upload(base: Path, target: str, *, seed: int = 0, size: int = 28) -> str:
    """A matcher whose adapters change the network, as a training would leave it."""
    student = StudentConfig(base=str(write(base, "dinov2")), rank=2, dropout=0.0)
    drawn = torch.Generator().manual_seed(seed)
    network = add_adapters(load_network(student), student, seed=0)
    weights = {name: 0.3 * torch.randn(value.shape, generator=drawn) for name, value in trained(network)}
    description = MatcherDescription(
        student=student, base_hash=described_copy(student.base).hash(), preparation=Preparation(size=size),
        decoding=Decoding(),
        training={"step": 4, "features": "d1ge57", "teachers": TEACHERS, "distillation": {"weight": 1.0}},
    )  # fmt: skip
    return upload_matcher(target, weights, description)


@pytest.fixture(scope="module")
def model(stack: StackEnv, tmp_path_factory: pytest.TempPathFactory) -> str:
    del stack
    uri = upload(tmp_path_factory.mktemp("matcher") / "base", f"{RUN}/model")
    tags = {"d2f.pairs": "made views"}
    run = start_run(experiment=EXPERIMENT, run_key=RUN, name="run", config_yaml="a: 1\n", params={}, tags=tags)
    run.log_metrics(4, {"pck@0.1": 0.5})
    return uri


@pytest.fixture(scope="module")
def version(model: str) -> ModelVersionInfo:
    del model
    return register_matcher.main(CONFIG)


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> tuple[bytes, np.ndarray]:
    """A PNG and its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="PNG")
    return sink.getvalue(), pixels


def test_mlflow_finds_the_points_that_this_project_finds(model: str, version: ModelVersionInfo) -> None:
    opened = mlflow.pyfunc.load_model(f"models:/{CONFIG.name}@candidate")
    (first, pixels), (second, others) = picture(1), picture(2, (50, 20))
    points = [[10.5, 20.0], [3.0, 4.0], [39.5, 29.5]]
    matcher = load_matcher(version.uri)
    source, target = matcher.embed([pixels])[0], matcher.embed([others])[0]
    wanted, confidence = matcher.match(source, target, torch.tensor(points))
    rows = [{"image0": first, "image1": second, "keypoints0": points}] * 2
    found = opened.predict(pd.DataFrame(rows))
    for row in range(2):
        np.testing.assert_allclose(found["keypoints1"][row], wanted.numpy(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["confidence"][row], confidence.numpy(), rtol=0, atol=1e-6)
    for change, message in (
        ({"image1": b"no image"}, "row 0: image1: "),
        ({"keypoints0": [[1.0], [2.0, 3.0]]}, "row 0: keypoints0 must be"),
        ({"keypoints0": [[1.0, 2.0, 2.0], [2.0, 3.0, 2.0]]}, "row 0: keypoints0 must be"),
    ):
        with pytest.raises(Exception, match=message):
            opened.predict(pd.DataFrame([{**rows[0], **change}]))


def test_the_version_says_what_it_is_and_what_it_was_made_of(version: ModelVersionInfo) -> None:
    info = mlflow.models.get_model_info(version.uri)
    assert info.signature.inputs.required_input_names() == ["image0", "image1", "keypoints0"]
    assert info.signature.outputs.input_names() == ["keypoints1", "confidence"]
    local = Path(resolve_model(version.uri))
    own = {"README.md", "config.yaml", "matcher.json", "adapter"}
    assert {each.name for each in local.iterdir()} == own and (local / "adapter/adapter_config.json").is_file()
    card = (local / "README.md").read_text()
    for fact in (
        "d1ge57",
        "| teachers | dino, lite0 |",
        "| teacher dino | a77ad |",
        "| pck_at_0.1 | 0.5 |",
        "made views",
    ):
        assert fact in card, fact
    assert version.tags["teachers"] == "dino, lite0" and version.tags["metric.pck_at_0.1"] == "0.5"
    requirements = Path(mlflow.artifacts.download_artifacts(f"{version.uri}/requirements.txt")).read_text()
    assert "\ndiff2flow" not in requirements and "transformers==" in requirements and "# And diff2flow" in requirements
    assert register(check_register(CONFIG)) == version, "a second time changes nothing"


def test_a_training_starts_with_a_registered_matcher(model: str, version: ModelVersionInfo, tmp_path: Path) -> None:
    student = StudentConfig(base=str(write(tmp_path / "base", "dinov2")), rank=2, dropout=0.0)
    made = DistillConfig(
        matcher=MatcherConfig(student=student), features=write_features(str(tmp_path / "features")),
        output=str(tmp_path / "run"), start=f"models:/{CONFIG.name}@candidate",
        train=TrainConfig(num_steps=1, global_batch_size=4, micro_batch_size=4, lanes=1, window_rows=4),
    )  # fmt: skip
    checked = check_distill(made)
    assert checked.config.start == version.uri
    wanted, found = dict(trained(load_student(model)[0])), dict(trained(checked.job().build_task("cpu").module))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_stock_transformers_opens_the_merged_network(model: str, version: ModelVersionInfo, tmp_path: Path) -> None:
    export(MatcherExportConfig(model=version.uri, output=str(tmp_path / "merged")))
    network, processor = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoModel, AutoImageProcessor))
    _, pixels = picture(3)
    with torch.inference_mode():
        found = network(**processor([Image.fromarray(pixels)], return_tensors="pt")).last_hidden_state
        same = network(pixel_values=Preparation(size=28).pixels([pixels])).last_hidden_state
    wanted = load_matcher(model).features([pixels])
    torch.testing.assert_close(same[:, -wanted.shape[1] :], wanted, rtol=1e-5, atol=1e-5)
    # Its resize rounds to whole grey levels, ours does not.
    cosine = torch.nn.functional.cosine_similarity(found[:, -wanted.shape[1] :], wanted, dim=-1)
    assert cosine.min() > 0.9995
    assert processor_config(Preparation(size=28, fit="pad")) == "", "stock transformers cannot do this one"
    assert "28 x 28 pixels" in (tmp_path / "merged/README.md").read_text()
    assert not any("lora" in name for name, _ in network.named_parameters())


def test_a_base_may_have_moved_but_not_changed(model: str, tmp_path: Path) -> None:
    moved = write(tmp_path / "moved", "dinov2")
    other = write(tmp_path / "other", "dinov2")
    (other / "config.json").write_text((other / "config.json").read_text().replace("1e-06", "1e-05"))
    _, pixels = picture(4)
    first, second = load_matcher(model), load_matcher(model, base_uri=str(moved))
    assert torch.equal(first.features([pixels]), second.features([pixels]))
    with pytest.raises(MatcherError, match="trained on a base with the hash"):
        export_transformers(model, str(tmp_path / "merged"), base_uri=str(other))


def test_what_cannot_be_registered_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(RegisterError, match="run is empty"):
        check_register(RegisterMatcherConfig())
    start_run(experiment=EXPERIMENT, run_key=f"{RUN}-none", name="run", config_yaml="", params={}, tags={})
    with pytest.raises(RegisterError, match=r"holds no matcher \(it has no matcher.json\)"):
        check_register(RegisterMatcherConfig(run=f"{RUN}-none", experiment=EXPERIMENT))
