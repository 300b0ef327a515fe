"""Identities, plans and stage keys: those of stored work stay what they are, whatever fields come."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from d2f_core.batch.output import OutputError, refuse_other
from d2f_core.data.datasets.config import MakeDatasetConfig, MakeDepthConfig
from d2f_core.data.manifest import Manifest, TableFile
from d2f_core.flow.depth.config import EvaluateDepthConfig, PredictDepthConfig
from d2f_core.flow.depth.plan import DepthPlan
from d2f_core.flow.encode.config import EncodeConfig, EncodeDepthConfig
from d2f_core.flow.evaluate.config import EvaluateConfig
from d2f_core.flow.generate.config import ContactSheetConfig, GenerateConfig
from d2f_core.flow.generate.plan import Plan
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.identity import differences, identity_values, since, stage_key
from d2f_core.model.config import ModelConfig
from pipelines.cli import from_yaml, to_yaml
from pipelines.configs import FinetuneConfig, TrainAutoencoderConfig
from pipelines.workflow_config import DepthConfig, ReflowConfig, WorkflowConfig

STORED = json.loads((Path(__file__).parent / "reference/identities.json").read_text())
"""Config files, and what the code of 7e49dc7 made of them."""
KINDS = {
    kind.__name__: kind
    for kind in (
        ContactSheetConfig, DepthConfig, EncodeConfig, EncodeDepthConfig, EvaluateConfig, EvaluateDepthConfig,
        FinetuneConfig, GenerateConfig, MakeDatasetConfig, MakeDepthConfig, PredictDepthConfig, ReflowConfig,
        RegisterConfig, TrainAutoencoderConfig, WorkflowConfig,
    )
}  # fmt: skip
TABLE = Manifest(
    kind="latents",
    files=(TableFile(path="part-0.parquet", rows=40, size=1000, sha256="a" * 64, row_groups=((16, 2), (8, 1))),),
    fingerprint={"autoencoder": "c" * 64},
    inputs={"source": "s3://x"},
    counts={"written": 40},
)


@pytest.mark.parametrize("number", range(len(STORED["configs"])))
def test_a_config_file_of_old_has_the_keys_that_it_had(number: int) -> None:
    entry = STORED["configs"][number]
    config = from_yaml(KINDS[entry["kind"]], entry["yaml"], source="stored")
    assert stage_key(config, {"base": "b" * 64, "latents": "d" * 64}) == entry["stage_key"]
    if isinstance(config, FinetuneConfig):
        assert config.identity("b" * 64, [TABLE]) == entry["identity"]
    if isinstance(config, TrainAutoencoderConfig):
        assert config.identity({"vae": "e" * 64}, TABLE) == entry["identity"]


def test_every_kind_of_config_is_among_them() -> None:
    assert {entry["kind"] for entry in STORED["configs"]} == KINDS.keys()


def test_tables_and_plans_of_old_have_the_digests_that_they_had() -> None:
    assert TABLE.digest == STORED["table_digest"]
    for kind, name in ((Plan, "plan"), (DepthPlan, "depth_plan")):
        values = STORED[name]["values"]
        plan = kind(**values | {"steps": tuple(values["steps"])})
        assert json.loads(json.dumps(plan.identity())) == STORED[name]["identity"]


@dataclass(frozen=True, kw_only=True)
class Inner:
    rank: int = 4


@dataclass(frozen=True, kw_only=True)
class Old:
    name: str = "x"
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class LaterInner(Inner):
    scale: float = since(1.0, before=1.0)


@dataclass(frozen=True, kw_only=True)
class Later:
    name: str = "x"
    inner: LaterInner = field(default_factory=LaterInner)
    padded: bool = since(True, before=False)
    sizes: tuple[int, ...] = since((), before=())


def test_a_field_that_came_later_changes_nothing_where_it_says_what_held_before() -> None:
    assert stage_key(Later(padded=False), {}) == stage_key(Old(), {})
    changed: list[dict[str, Any]] = [
        {"padded": True}, {"padded": False, "sizes": (1,)}, {"padded": False, "inner": LaterInner(scale=2.0)}
    ]  # fmt: skip
    keys = {stage_key(Later(**values), {}) for values in changed}
    assert len(keys | {stage_key(Old(), {})}) == 4
    assert identity_values(Later()) == {"name": "x", "inner": {"rank": 4}, "padded": True}


def test_a_naive_target_is_part_of_what_is_trained_naively_and_of_nothing_else() -> None:
    naive = ModelConfig(base="b", objective="flow_matching")
    assert identity_values(naive)["naive_target"] == "noise_minus_data"
    assert "naive_target" not in identity_values(ModelConfig(base="b"))
    published = ModelConfig(base="b", objective="flow_matching", naive_target="data_minus_noise")
    assert "naive_target" not in identity_values(published)


def test_a_config_file_from_before_the_naive_target_means_the_published_one() -> None:
    text = to_yaml(FinetuneConfig(model=ModelConfig(base="b", objective="flow_matching"), latents="l", output="o"))
    assert from_yaml(FinetuneConfig, text, source="new").model.naive_target == "noise_minus_data"
    older = "".join(line for line in text.splitlines(keepends=True) if "naive_target" not in line)
    assert from_yaml(FinetuneConfig, older, source="old").model.naive_target == "data_minus_noise"


def test_a_difference_is_named_whichever_side_knows_the_field() -> None:
    assert differences({"a": 1, "b": [1]}, {"a": 1, "b": [1]}) == []
    assert differences({"a": 1}, {"a": 2, "c": 3}) == ["a was 1, now 2", "c was None, now 3"]
    with pytest.raises(OutputError, match=r"another job \(padded was True, now None\)"):
        refuse_other("s3://d2f/x", identity_values(Later()), identity_values(Later(padded=False)))
