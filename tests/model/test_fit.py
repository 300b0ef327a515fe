"""What is wrong with a network's files is told by their headers, before a tensor is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_core.model.autoencoder import check_autoencoder, load_autoencoder
from d2f_core.model.base import BaseModel, BaseModelError, resolve_base
from d2f_core.model.denoiser import check_unet, load_unet
from d2f_core.model.fit import Misfit, header_tensors, meta_tensors
from d2f_core.model.safetensors_header import HeaderError, read_begin
from d2f_core.model.text_encoder import describe_text_encoder, load_text_encoder
from d2f_core.model.vision import VisionModel, VisionModelError
from tests.allocated import Allocated
from tests.flow.tiny_vision import write_tiny_clip, write_tiny_vit
from tests.model.tiny_sd import write_tiny

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
FLOOR = 700
"""Bytes of a storage that is counted: more than the text encoder's list of positions, which is no weight."""
PARTS: dict[str, tuple[Callable[[BaseModel], object], Callable[[BaseModel], object]]] = {
    UNET: (check_unet, load_unet),
    VAE: (check_autoencoder, load_autoencoder),
    TEXT: (describe_text_encoder, load_text_encoder),
}
"""File of a network -> what checks it, and what loads it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base"), "sd15")


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> BaseModel:
    return resolve_base(str(shutil.copytree(whole, tmp_path / "base")))


def change(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def without_the_last(file: Path) -> None:
    change(file, lambda tensors: tensors.popitem())


def of_another_width(file: Path) -> None:
    change(file, lambda tensors: tensors.update({(name := max(tensors)): torch.zeros(3, *tensors[name].shape)}))


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def under_another_name(file: Path) -> None:
    file.rename(file.with_name(f"my_{file.name}"))


def a_web_page(file: Path) -> None:
    file.write_text("<!DOCTYPE html><title>Not found</title>")


def no_weights(file: Path) -> None:
    file.rename(file.with_suffix(".bin"))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_the_last, r"/ does not hold what its config.json asks for: it lacks 1 tensors, such as \['"),
        (of_another_width, r"asks for: 1 of its tensors have other shapes than the config's, such as \['"),
        (cut_off, r"model.safetensors has [\d,]+ bytes of tensors; its header tells of [\d,]+. Copy it again"),
        (under_another_name, r"model.safetensors is missing. Copy the weights again"),
        (a_web_page, r"model.safetensors has 39 bytes and says that [\d,]+ are its header. Copy the weights again"),
        (no_weights, r"has no safetensors in "),
    ],
)
def test_a_check_refuses_weights_that_a_worker_would_and_allocates_nothing(
    base: BaseModel, name: str, damage: Callable[[Path], None], message: str
) -> None:
    check, load = PARTS[name]
    with Allocated(FLOOR) as made:
        check(base)
    assert not made.large
    with Allocated(FLOOR) as made:
        load(base)
    assert len(made.large) > 1, "what is counted is there when it is loaded"
    damage(base.path / name)
    for look in (check, load):
        with pytest.raises(BaseModelError, match=message) as caught:
            look(base)
        assert "\n" not in str(caught.value) and name.partition("/")[0] in str(caught.value)


def test_the_config_of_another_network_is_refused(base: BaseModel) -> None:
    for part, field, value in (("unet", "cross_attention_dim", 24), ("vae", "block_out_channels", [4, 4, 8, 16])):
        file = base.path / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    for look in (check_unet, load_unet, check_autoencoder, load_autoencoder):
        with pytest.raises(BaseModelError, match="does not hold what its config"):
            look(base)


def renamed(prefix: str) -> Callable[[Path], None]:
    def rename(file: Path) -> None:
        change(file, lambda tensors: [tensors.update({prefix + name: tensors.pop(name)}) for name in list(tensors)])

    return rename


def quantised(dtype: torch.dtype) -> Callable[[Path], None]:
    def cast(file: Path) -> None:
        change(file, lambda tensors: tensors.update({name: tensors[name].to(dtype) for name in sorted(tensors)[:4]}))

    return cast


def test_weights_in_shards_are_compared_shard_by_shard(base: BaseModel) -> None:
    unet = load_unet(base)
    shutil.rmtree(base.path / "unet")
    unet.save_pretrained(base.path / "unet", max_shard_size="20KB")
    shards = sorted((base.path / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    check_unet(base)
    again = load_unet(base).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in unet.state_dict().items())
    shards[1].unlink()
    with pytest.raises(BaseModelError, match=f"unet/{shards[1].name} is missing"):
        check_unet(base)
    index = next((base.path / "unet").glob("*.index.json"))
    for content in ("{}", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {}}'):
        index.write_text(content)
        with pytest.raises(BaseModelError, match="names no safetensors beside it"):
            check_unet(base)
    index.write_text("no JSON")
    with pytest.raises(BaseModelError, match="is not plain JSON"):
        check_unet(base)


def test_an_autoencoder_of_the_first_releases_is_read_by_its_older_names(base: BaseModel) -> None:
    """Those of SD 1.5 on the hub: `query`, `key`, `value` and `proj_attn` of the middle blocks."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".attentions.0.to_" in name]:
            new, end = name.rpartition(".")[0], name.rpartition(".")[2]
            stem = next(each for each in old if new.endswith(each))
            tensors[f"{new.removesuffix(stem)}{old[stem]}.{end}"] = tensors.pop(name)

    expected = load_autoencoder(base).network.state_dict()
    change(base.path / VAE, rename)
    check_autoencoder(base)
    found = load_autoencoder(base).network.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_tensors_that_the_config_does_not_know_stay_unread(base: BaseModel) -> None:
    for name, (check, load) in PARTS.items():
        change(base.path / name, lambda tensors: tensors.update(no_such_layer=torch.zeros(3)))
        check(base)
        load(base)


@pytest.mark.parametrize("write", [write_tiny_vit, write_tiny_clip])
def test_a_vision_model_is_described_with_its_width_and_refused_as_when_it_is_loaded(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = write(tmp_path)
    with Allocated(FLOOR) as made:
        described = VisionModel(str(directory), "meta")
    assert not made.large
    loaded = VisionModel(str(directory))
    image = torch.zeros(1, 16, 16, 3, dtype=torch.uint8).numpy()
    with torch.inference_mode():
        assert described.pooled(image).shape == loaded.pooled(image).shape
    assert described.reads_text == loaded.reads_text and described.files.hash() == loaded.files.hash()
    change(directory / "model.safetensors", lambda tensors: tensors.pop(min(tensors)))
    for device in ("cpu", "meta"):
        with pytest.raises(VisionModelError, match=r"lacks weights: .*\. Save the model again"):
            VisionModel(str(directory), device)


def test_a_vision_model_of_another_width_or_kind_is_refused_by_its_description(tmp_path: Path) -> None:
    directory = write_tiny_vit(tmp_path)
    whole = (directory / "model.safetensors").read_bytes()
    for damage, message in (
        (of_another_width, "1 of its tensors have other shapes"),
        (quantised(torch.int8), "4 of its tensors are quantised"),
        (renamed("module."), "lacks weights: .*, .*, "),
    ):
        (directory / "model.safetensors").write_bytes(whole)
        damage(directory / "model.safetensors")
        for device in ("cpu", "meta"):
            with pytest.raises(VisionModelError, match=message):
                VisionModel(str(directory), device)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "encoder-decoder"}))
    with pytest.raises(VisionModelError, match="cannot be loaded as a vision model"):
        VisionModel(str(directory), "meta")


def test_a_header_is_read_without_a_byte_of_the_tensors(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.tensor(1)}, file)
    data, asked = file.read_bytes(), []

    def read(start: int, end: int) -> bytes:
        asked.append((start, end))
        return data[start:end]

    begin = read_begin(read, len(data))
    assert asked == [(0, 8), (8, len(begin))] and len(data) - len(begin) == 2 * 3 * 4 + 5 * 2 + 8
    found = meta_tensors(file)
    assert {name: (tuple(tensor.shape), tensor.dtype, tensor.is_meta) for name, tensor in found.items()} == {
        "a": ((2, 3), torch.float32, True), "b": ((5,), torch.bfloat16, True), "c": ((), torch.int64, True),
    }  # fmt: skip
    with pytest.raises(HeaderError, match="is missing"):
        header_tensors(tmp_path, "b.safetensors")


def test_a_misfit_tells_all_its_kinds() -> None:
    found = Misfit(missing=("a", "b", "c"), unexpected=("d",), reshaped=("e",))
    assert str(found) == (
        "it lacks 3 tensors, such as ['a', 'b', 'c'], and 1 of its tensors have other shapes than the config's, such "
        "as ['e'], and 1 of its tensors are not known to the config, such as ['d']"
    )
    assert found and not Misfit()
