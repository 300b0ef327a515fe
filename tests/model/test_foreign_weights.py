"""Weights under names or in dtypes that a network does not have: refused, and nothing is left at random."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_core.model import text_encoder as text_encoder_module
from d2f_core.model.base import BaseModel, BaseModelError, resolve_base
from d2f_core.model.text_encoder import describe_text_encoder, load_text_encoder
from tests.flow.tiny_base import write_tiny_base
from tests.model.test_fit import PARTS, TEXT, change, quantised, renamed
from tests.model.tiny_sd import write_tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base"), "sd15")


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> BaseModel:
    return resolve_base(str(shutil.copytree(whole, tmp_path / "base")))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            renamed("module."),
            r"it lacks \d+ tensors, such as \['\S+', '\S+', '\S+'\]\. The names in the file begin",
        ),
        (
            renamed("text_model."),
            r"lacks \d+ tensors, .*\. The names in the file begin with 'text_model\.': ",
        ),
        (
            quantised(torch.int8),
            r": 4 of its tensors are quantised, and not in float16, bfloat16 or float32, such",
        ),
        (quantised(torch.float8_e4m3fn), r": 4 of its tensors are quantised, and not in float16, bfloat16 or float32"),
    ],
)
def test_weights_under_other_names_or_without_their_scales_are_refused(
    base: BaseModel, name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(base.path / name)
    for look in PARTS[name]:
        with pytest.raises(BaseModelError, match=message):
            look(base)


def test_an_encoder_under_other_names_is_refused_or_equal_but_never_random(tmp_path: Path) -> None:
    """The library adds and removes prefixes by itself; what it does not find it would draw."""
    whole = resolve_base(str(write_tiny(tmp_path / "whole", "sdxl")))
    expected, loaded = load_text_encoder(whole).encode(["a cat"]), 0
    for number, part in enumerate(("text_encoder", "text_encoder_2")):
        for prefix in ("text_model.", "clip.", "text_model.text_model.", "model.", ""):
            other = resolve_base(str(shutil.copytree(whole.path, tmp_path / f"{number} {prefix}")))
            cut = lambda tensors: [  # noqa: E731
                tensors.update({name.removeprefix("text_model."): tensors.pop(name)}) for name in list(tensors)
            ]
            file = other.path / part / "model.safetensors"
            change(file, cut) if not prefix else renamed(prefix)(file)
            try:
                found = load_text_encoder(other).encode(["a cat"])
            except BaseModelError as error:
                assert "it lacks" in str(error)
            else:
                assert torch.equal(found, expected), (part, prefix)
                loaded += 1
    assert loaded, "some of them are read"


def test_lists_of_positions_of_older_releases_are_no_weights(base: BaseModel) -> None:
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    expected = load_text_encoder(base).encode(["a cat"])
    change(base.path / TEXT, lambda tensors: tensors.update(positions))
    assert torch.equal(load_text_encoder(base).encode(["a cat"]), expected)


def test_an_encoder_in_a_package_is_compared_with_its_config_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = resolve_base(str(write_tiny_base(tmp_path / "base")))
    describe_text_encoder(base)
    directory = Path(text_encoder_module._referenced(base)[0])
    copied = shutil.copytree(directory, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    change_into(directory / "model.safetensors", copied / "model.safetensors")
    reference = {"package": "its.package", "max_length": 8}
    monkeypatch.setattr(text_encoder_module, "_referenced", lambda _: (copied, reference))
    for look in (describe_text_encoder, load_text_encoder):
        with pytest.raises(BaseModelError, match=r"package 'its.package', named by text_encoder/ .* lacks 1 te"):
            look(base)


def change_into(source: Path, target: Path) -> None:
    """Copy the weights of a network but for one of its layers."""
    tensors = load_file(source)
    del tensors[min(name for name in tensors if ".layer.0." in name)]
    save_file(tensors, target, {"format": "pt"})
