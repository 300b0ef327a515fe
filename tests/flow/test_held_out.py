"""What an evaluation compares when it is told nothing: the rows that the candidate's training held out."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2f_core.data.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest, write_part
from d2f_core.data.table_reader import read_columns
from d2f_core.evaluation.config import GateConfig, Limit
from d2f_core.evaluation.pins import Pins
from d2f_core.flow.evaluate.compared_models import EvaluateJob, compared_models
from d2f_core.flow.evaluate.config import EvaluateConfig, EvaluateError, MeasureConfig, ScoreConfig
from d2f_core.flow.evaluate.feature_table import KnownRows, feature_schema, memorised
from d2f_core.flow.evaluate.held_out import filled, held_out_ids
from d2f_core.flow.evaluate.held_out_loss import losses_of, not_comparable
from d2f_core.flow.evaluate.job import check_evaluate
from d2f_core.flow.evaluate.memorisation import memorisation_rule
from d2f_core.flow.evaluate.metrics import chosen_rows
from d2f_core.model.artifact import describe, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.config import SamplingDefaults
from d2f_core.model.denoiser import load_unet
from pipelines.evaluate import check
from tests.flow.tiny_base import write_tiny_base
from tests.flow.tiny_vision import write_tiny_vit
from tests.image_tables import write_images
from tests.latent_tables import write_latents

IMAGES, HELD = 40, 8
NEAR = MeasureConfig(neighbours=1)
"""So few rows are enough for one neighbour."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images, and latents that say that they were made of these."""
    root = tmp_path_factory.mktemp("tables")
    write_images(str(root / "images"), IMAGES)
    write_latents(str(root / "latents"), "f", rows=IMAGES, rows_per_file=16, captions=3)
    latents = str(root / "latents")
    # The same samples, in another order.
    inputs = {"source": str(root / "images"), "source_kind": "parquet"}
    rename(latents, [f"{IMAGES - 1 - row:032d}" for row in range(IMAGES)], inputs=inputs)
    return root


def rename(uri: str, names: list[str], **changes: object) -> None:
    """Give the rows of a table other sample ids."""
    manifest, files, first = read_manifest(uri), [], 0
    for file in manifest.files:
        table = pq.read_table(Path(uri, file.path))
        its = pa.array(names[first : first + file.rows])
        files.append(write_part(uri, file.path, table.set_column(0, table.schema.field(0), its)))
        first += file.rows
    Path(uri, MANIFEST_NAME).unlink()
    write_manifest(uri, dataclasses.replace(manifest, files=tuple(files), **changes))


def model(base: Path, target: Path, **training: object) -> str:
    resolved = resolve_base(str(base))
    sampling = SamplingDefaults(guidance=1.0, steps=2)
    description = describe(resolved, objective="diff2flow", method="full", sampling=sampling, training=training)
    save_artifact(target, load_unet(resolved), description)
    return str(target)


def test_the_rows_that_were_held_out_are_those_of_the_version_that_was_trained_on(tables: Path, tmp_path: Path) -> None:
    latents = str(tmp_path / "latents")
    shutil.copytree(tables / "latents", latents)
    first = read_manifest(latents)
    training = {"latents": latents, "latents_digest": first.digest, "holdout_rows": HELD}
    held = held_out_ids(training)
    write_manifest(latents, dataclasses.replace(first, files=first.files[1:]), 2)
    assert held is not None and held == held_out_ids(training)
    assert held_out_ids({**training, "latents_digest": "another"}) is None


def test_held_out_rows_are_the_reference_and_their_captions_the_prompts(
    base: Path, tables: Path, tmp_path: Path
) -> None:
    candidate = model(base, tmp_path / "model", latents=str(tables / "latents"), holdout_rows=HELD)
    empty = EvaluateConfig(candidate=candidate, output=str(tmp_path / "out"), measure=NEAR)
    config, known = filled(empty, candidate)
    assert config.training == str(tables / "images")
    expected = [f"{IMAGES - 1 - row:032d}" for row in range(0, IMAGES, IMAGES // HELD)]
    found = read_columns(config.reference, read_manifest(config.reference), ("sample_id", "image"))
    assert found.column("sample_id").to_pylist() == expected
    real = read_columns(config.training, read_manifest(config.training), ("image",)).column("image").to_pylist()
    assert found.column("image").to_pylist() == [real[int(name)] for name in expected]
    prompts = pq.read_table(config.prompts).to_pydict()
    assert prompts == {"sample_id": expected, "prompt": ["x"] * HELD}
    assert known.held_out.tolist() == expected and not len(known.overlap), "they are in the table, but not trained on"
    assert filled(empty, candidate).config == config
    elsewhere = filled(empty, candidate, str(tmp_path / "scratch")).config
    assert elsewhere.reference.startswith(str(tmp_path / "scratch")) and not (tmp_path / "scratch" / "out").exists()


def test_another_candidates_held_out_rows_are_another_reference(base: Path, tables: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(output=str(tmp_path / "out"), measure=NEAR)
    first, second = (
        filled(config, model(base, tmp_path / f"{held}", latents=str(tables / "latents"), holdout_rows=held)).config
        for held in (HELD, 10)
    )
    assert first.reference != second.reference and first.prompts != second.prompts
    assert [read_manifest(each.reference).num_rows for each in (first, second)] == [HELD, 10]
    gone = model(base, tmp_path / "gone", latents=str(tables / "latents"), holdout_rows=HELD, latents_digest="another")
    with pytest.raises(EvaluateError, match="Give --reference"):
        filled(config, gone)


def test_reference_images_that_were_trained_on_are_known(base: Path, tables: Path, tmp_path: Path) -> None:
    candidate = model(base, tmp_path / "model", latents=str(tables / "latents"), holdout_rows=HELD)
    config = EvaluateConfig(output=str(tmp_path / "out"), reference=str(tables / "images"))
    known = filled(config, candidate).known
    assert len(known.held_out) == HELD and len(known.overlap) == IMAGES - HELD
    assert not set(known.held_out) & set(known.overlap)


def test_a_copyist_is_found_out_on_the_rows_that_its_own_training_held_out(tmp_path: Path) -> None:
    """The held-out rows lie in the training's table too."""
    draw = np.random.default_rng(0)
    table = draw.normal(size=(200, 8)).astype(np.float32)
    ids = np.array([f"{number}" for number in range(200)], object)
    held = np.arange(0, 200, 4)
    copied = table[draw.choice(np.setdiff1d(np.arange(200), held), 80)] + 0.01
    places = []
    for name, rows, features in (
        ("made", np.arange(80), copied),
        ("all", np.arange(200), table),
        ("held", held, table[held]),
    ):
        uri = str(tmp_path / name)
        columns = {
            "row": np.arange(len(rows)), "sample_id": ids[rows], "steps": np.zeros(len(rows), np.int32),
            "features": list(features), "caption_score": [None] * len(rows), "clip_features": [None] * len(rows),
        }  # fmt: skip
        file = write_part(uri, "part-0.parquet", pa.table(columns, schema=feature_schema(8)))
        manifest = Manifest(kind="features", files=(file,), counts={"set": len(rows), "images": len(rows)})
        places.append((uri, manifest, 0))
    known = KnownRows(held_out=ids[held], overlap=np.empty(0, object))
    found = memorised(*places, known, 8, MeasureConfig())
    assert not isinstance(found, str) and (found.training, found.held_out) == (150, 50)
    assert not memorisation_rule(found, GateConfig()).holds


def test_what_cannot_be_known_is_asked_for(base: Path, tables: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(output=str(tmp_path / "out"))
    with pytest.raises(EvaluateError, match=r"held out no rows, or does not say which\. Give --reference"):
        filled(config, str(base))
    unheld = model(base, tmp_path / "unheld", latents=str(tables / "latents"), holdout_rows=0)
    with pytest.raises(EvaluateError, match=r"held out no rows, or does not say which\. Give --reference"):
        filled(config, unheld)
    few = model(base, tmp_path / "few", latents=str(tables / "latents"), holdout_rows=HELD)
    with pytest.raises(
        EvaluateError, match=r"the training held out 8 rows, .* it takes 16 at least\. Give --reference"
    ):
        filled(config, few)
    write_latents(str(tmp_path / "alone"), "f", rows=20, rows_per_file=16, captions=3)
    photos = model(base, tmp_path / "photos", latents=str(tmp_path / "alone"), holdout_rows=16)
    with pytest.raises(EvaluateError, match=r"was not on a table of images\. Give --reference"):
        filled(config, photos)
    given = dataclasses.replace(config, reference=str(tables / "images"), prompts="p.jsonl")
    assert filled(given, photos).config == dataclasses.replace(given, training=""), "the rule is then not applied"


def test_prompts_whose_images_have_no_usable_name_are_named_by_their_rows(
    base: Path, tables: Path, tmp_path: Path
) -> None:
    table = tmp_path / "odd"
    write_images(str(table), 20)
    rename(str(table), ["a name with blanks", *(f"{number}" for number in range(19))])
    config = EvaluateConfig(reference=str(table), output=str(tmp_path / "out"), training="")
    assert pq.read_table(filled(config, str(base)).config.prompts).column_names == ["prompt"]


def test_the_loss_is_that_of_the_same_images_noises_and_times_for_each_model(
    base: Path, tables: Path, tmp_path: Path
) -> None:
    images, rows = str(tables / "images"), np.arange(6)
    manifest = read_manifest(images)
    whole = losses_of(str(base), images, manifest, rows, 16, batch=6, base_prediction="")
    assert whole.shape == (6,) and (whole > 0).all()
    np.testing.assert_allclose(
        losses_of(str(base), images, manifest, rows, 16, batch=4, base_prediction=""), whole, rtol=1e-5
    )
    same = model(base, tmp_path / "same")
    np.testing.assert_allclose(
        losses_of(same, images, manifest, rows, 16, batch=6, base_prediction=""), whole, rtol=1e-5
    )


def test_losses_are_compared_where_they_can_be(base: Path, tables: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "cat"}))
    candidate = model(base, tmp_path / "model")
    config = EvaluateConfig(
        candidate=candidate, base=str(base), reference=str(tables / "images"), output=str(tmp_path / "out"),
        prompts=str(tmp_path / "prompts.jsonl"), evaluations=(2,),
    )  # fmt: skip
    pins = Pins(candidate=candidate, champion="", base=str(base))
    job = EvaluateJob(
        config=config, pins=pins, compared=compared_models(config, pins), network="n", width=1, dimensions=1,
        fingerprint={}, known=KnownRows(np.empty(0), np.empty(0)), reference=read_manifest(config.reference),
    )  # fmt: skip
    assert job.rival == "base" and not_comparable(job) == ""
    without = dataclasses.replace(job, config=dataclasses.replace(config, loss_rows=0))
    assert not_comparable(without) == "loss_rows is 0"
    generated = dataclasses.replace(job.reference, kind="generations")
    assert "is a generation" in not_comparable(dataclasses.replace(job, reference=generated))


def test_models_are_compared_on_the_prompts_that_both_made() -> None:
    mask = {name: np.ones(10, bool) for name in ("candidate", "champion", "base")}
    mask["candidate"][2] = mask["champion"][3] = mask["base"][4] = False
    usable = {(role, 4): each for role, each in mask.items()}
    found = chosen_rows(usable, "champion", most=100)
    assert np.flatnonzero(~found["candidate", 4]).tolist() == np.flatnonzero(~found["champion", 4]).tolist() == [2, 3]
    assert np.flatnonzero(~found["base", 4]).tolist() == [2, 3, 4]
    few = chosen_rows(usable, "champion", most=5)
    assert (few["candidate", 4] == few["champion", 4]).all() and few["champion", 4].sum() == 5
    alone = chosen_rows({("candidate", 4): mask["candidate"]}, None, most=100)
    assert (alone["candidate", 4] == mask["candidate"]).all()


def test_a_dry_run_leaves_nothing_at_the_output(base: Path, tables: Path, tmp_path: Path) -> None:
    candidate = model(base, tmp_path / "model", latents=str(tables / "latents"), holdout_rows=20)
    output = tmp_path / "out"
    config = EvaluateConfig(
        candidate=candidate, output=str(output), evaluations=(4,), experiment="",
        score=ScoreConfig(features=str(write_tiny_vit(tmp_path / "vit")), dimensions=4),
    )  # fmt: skip
    check(config)
    assert not output.exists() or not list(output.iterdir())
    job = check_evaluate(config)
    assert job.reference.num_rows == job.compared[0].job.prompts.num_rows == 20
    assert {name.name.split("-")[0] for name in output.iterdir()} == {"prompts", "reference"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": MeasureConfig(replicates=10**6)}, r"resampled covariances are .* GB for each set"),
        ({"gate": GateConfig(metric="flow_loss", must_not_regress=()), "loss_rows": 0}, "decides, and loss_rows is 0"),
        (
            {"gate": GateConfig(limits=(Limit(metric="cmmd@4", at_most=1),))},
            "'cmmd@4' is not measured here",
        ),
    ],
)
def test_rules_and_sizes_that_cannot_be_are_refused_at_the_door(
    change: dict, message: str, base: Path, tables: Path, tmp_path: Path
) -> None:
    candidate = model(base, tmp_path / "model", latents=str(tables / "latents"), holdout_rows=20)
    config = EvaluateConfig(
        candidate=candidate, output=str(tmp_path / "out"), evaluations=(4,), experiment="",
        score=ScoreConfig(features=str(write_tiny_vit(tmp_path / "vit")), dimensions=20),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        check_evaluate(dataclasses.replace(config, **change))
