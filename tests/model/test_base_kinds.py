"""Bases as people have them: what is no base is refused by its description, and whatever else is there is loaded."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_core.model.autoencoder import check_autoencoder, load_autoencoder
from d2f_core.model.base import BaseModelError, describe_base, resolve_base
from d2f_core.model.denoiser import check_unet, load_unet
from d2f_core.model.diffusers_layout import copy_base_parts
from d2f_core.model.text_encoder import describe_text_encoder, load_text_encoder
from d2f_core.model.weight_files import variant_of
from tests.model.refused_bases import REFUSED, Case, pickles
from tests.model.test_fit import PARTS, TEXT, UNET, VAE
from tests.model.tiny_sd import write_tiny

DOCS = Path(__file__).parents[2] / "docs/models.md"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base"), "sd15")


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "base")


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_base_is_refused_on_the_head_by_its_configs_and_names(
    base: Path, change: Case, message: str
) -> None:
    change(base)
    with pytest.raises(BaseModelError, match=message) as caught:
        described = describe_base(str(base))
        for check in (check_unet, check_autoencoder, describe_text_encoder):
            check(described)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{str(base)!r} ")


def test_the_docs_name_every_model_that_is_refused() -> None:
    rows = re.findall(r"^\| (.+?) \| (?:refused|read)\b", DOCS.read_text(), re.MULTILINE)
    assert set(REFUSED) <= set(rows), set(REFUSED) - set(rows)


def test_pickles_are_read_after_the_command_that_their_refusal_prints(base: Path) -> None:
    expected = load_unet(resolve_base(str(base)), probe=False).state_dict()
    pickles("unet")(base)
    with pytest.raises(BaseModelError) as caught:
        check_unet(describe_base(str(base)))
    code = re.fullmatch(r'.*python -c "(.+)"', str(caught.value))
    assert code
    subprocess.run([sys.executable, "-c", code[1]], cwd=base, check=True, capture_output=True, timeout=100)
    found = load_unet(resolve_base(str(base)), probe=False).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def renamed(variant: str) -> Callable[[Path], None]:
    return lambda file: file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))  # pyright: ignore


def in_shards(variant: str) -> Callable[[Path], None]:
    """Two shards and their list, as the libraries write those of a variant."""

    def write(file: Path) -> None:
        tensors, places = load_file(file), {}
        for number in (1, 2):
            shard = f"{file.stem}.{variant}-0000{number}-of-00002.safetensors"
            part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
            save_file(part, file.with_name(shard), {"format": "pt"})
            places |= dict.fromkeys(part, shard)
        file.unlink()
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        file.with_name(f"{file.name}.index.{variant}.json").write_text(json.dumps(index))

    return write


@pytest.mark.parametrize("name", [UNET, VAE, TEXT])
@pytest.mark.parametrize("write", [renamed("fp16"), renamed("non_ema"), in_shards("fp16")])
def test_a_variant_that_is_there_alone_is_loaded_and_part_of_the_hash(
    base: Path, tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    check, load = PARTS[name]
    plain = resolve_base(str(base))
    expected, before = load(plain), plain.content_hash
    write(base / name)
    there = resolve_base(str(base))
    check(there)
    weights = lambda made: getattr(made, "network", made).state_dict()  # noqa: E731
    found = weights(load(there))
    assert all(torch.equal(tensor, found[key]) for key, tensor in weights(expected).items())
    assert there.content_hash != before
    if name != UNET:  # an export is opened by programs that ask for no variant
        copy_base_parts(base, tmp_path / "copied")
        part, _, file = name.partition("/")
        assert not variant_of(tmp_path / "copied" / part, file)
        shutil.copytree(base / "unet", tmp_path / "copied/unet")
        shutil.copytree(base / "scheduler", tmp_path / "copied/scheduler")
        load(resolve_base(str(tmp_path / "copied")))


def test_the_plain_weights_are_loaded_beside_a_variant(base: Path) -> None:
    expected = load_autoencoder(resolve_base(str(base))).network.state_dict()
    halved = {name: tensor.half() + 1 for name, tensor in load_file(base / VAE).items()}
    save_file(halved, base / VAE.replace(".safetensors", ".fp16.safetensors"))
    found = load_autoencoder(resolve_base(str(base))).network.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    (base / VAE).rename(base / VAE.replace(".safetensors", ".non_ema.safetensors"))
    assert variant_of(base / "vae", Path(VAE).name) == "fp16", "averaged weights come first"


def test_a_tokenizer_without_a_length_has_that_of_the_encoders_positions(base: Path) -> None:
    before = load_text_encoder(resolve_base(str(base)))
    file = base / "tokenizer/tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    found = load_text_encoder(resolve_base(str(base)))
    assert found.max_length == before.max_length == 77 and found.fingerprint == before.fingerprint
    assert torch.equal(found.encode(["a cat"]), before.encode(["a cat"]))
