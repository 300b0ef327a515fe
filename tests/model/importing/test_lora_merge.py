"""LoRA files of all layouts are merged to the same weights as by the programs that write them; others are refused."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from d2f_core.model.config import LoraConfig
from d2f_core.model.export_adapter import export_single_file_lora
from d2f_core.model.importing.lora_keys import LoraFileError
from d2f_core.model.importing.lora_merge import layer_shapes, merge_loras, open_lora
from tests.model.artifacts import trained
from tests.model.importing.lora_files import (
    attention_layers,
    changes_for,
    dotted,
    kohya,
    lettered,
    linear_layer,
    networks_of,
    original_names,
    processor,
    save,
)
from tests.model.lora_readers import loaded_by_comfy
from tests.model.tiny_sd import write_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("merging") / "base", "sd15")


def merged(base: Path, target: Path, *files: tuple[Path, float], prediction: str = "epsilon") -> Path:
    shutil.copytree(base, target)
    config = json.loads((base / "unet/config.json").read_text())
    merge_loras(target, [open_lora(file, s, layer_shapes(base), config, prediction) for file, s in files])
    return target


def by_diffusers(base: Path, file: Path, strength: float) -> dict[str, dict[str, torch.Tensor]]:
    """The networks of a stock pipeline after it merged a file."""
    pipeline = StableDiffusionPipeline(
        vae=cast(Any, None), tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        scheduler=cast(Any, EulerDiscreteScheduler()), safety_checker=cast(Any, None),
        feature_extractor=cast(Any, None),
        requires_safety_checker=False, **cast(Any, networks_of(base)),
    )  # fmt: skip
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(lora_scale=strength)
    pipeline.unload_lora_weights()
    return {part: getattr(pipeline, part).state_dict() for part in ("unet", "text_encoder")}


def differences(base: Path, found: Path, wanted: dict[str, dict[str, torch.Tensor]]) -> float:
    """Largest difference of two models' weights; every network must have changed."""
    before, after = networks_of(base), networks_of(found)
    for part, network in after.items():
        assert any(not torch.equal(t, before[part].state_dict()[n]) for n, t in network.state_dict().items()), part
    return max(
        float((tensor - wanted[part][name]).abs().max())
        for part, network in after.items()
        for name, tensor in network.state_dict().items()
    )


def test_a_file_of_kohyas_is_merged_as_by_diffusers(base: Path, tmp_path: Path):
    """With one alpha: diffusers applies others to convolutions alone."""
    networks = networks_of(base)
    unet, added = changes_for(
        networks["unet"], attention_layers(networks["unet"]), lambda name: f"lora_unet_{name}", kohya, alphas=(2.0,)
    )
    text, _ = changes_for(
        networks["text_encoder"],
        attention_layers(networks["text_encoder"]),
        lambda name: f"lora_te_text_model_{name.removeprefix('text_model.')}",
        kohya,
        alphas=(2.0,),
    )
    file = save(unet | text, tmp_path / "kohya.safetensors")
    found = merged(base, tmp_path / "merged", (file, 0.8))
    assert differences(base, found, by_diffusers(base, file, 0.8)) < 1e-6 and len(added) > 10


@pytest.mark.parametrize(("write", "write_text"), [(lettered, lettered), (dotted, linear_layer)])
def test_a_file_of_diffusers_is_merged_as_by_diffusers(base: Path, tmp_path: Path, write: Any, write_text: Any):
    networks = networks_of(base)
    tensors = {}
    for part, network in networks.items():
        prefix = "text_encoder.text_model." if part == "text_encoder" else "unet."
        named = lambda name, prefix=prefix: prefix + name.removeprefix("text_model.")  # noqa: E731
        writer = write_text if part == "text_encoder" else write
        tensors |= changes_for(network, attention_layers(network), named, writer)[0]
    file = save(tensors, tmp_path / "diffusers.safetensors")
    found = merged(base, tmp_path / "merged", (file, 1.0))
    assert differences(base, found, by_diffusers(base, file, 1.0)) < 1e-6


def test_settings_of_peft_in_the_metadata_scale_a_file_as_by_diffusers(base: Path, tmp_path: Path):
    networks, tensors, settings = networks_of(base), {}, {}
    for part, network in networks.items():
        prefix = "text_encoder.text_model." if part == "text_encoder" else "unet."
        named = lambda name, prefix=prefix: prefix + name.removeprefix("text_model.")  # noqa: E731
        layers = attention_layers(network)
        tensors |= changes_for(network, layers, named, lettered)[0]
        own = {"r": 4, "lora_alpha": 8, "target_modules": layers}
        settings |= {f"{part}.{name}": value for name, value in own.items()}
    file = save(tensors, tmp_path / "peft.safetensors", lora_adapter_metadata=json.dumps(settings))
    found = merged(base, tmp_path / "merged", (file, 1.0))
    assert differences(base, found, by_diffusers(base, file, 1.0)) < 1e-6


@pytest.mark.parametrize("layout", ["original, kohya", "original, dotted", "processor", "peft"])
def test_layers_are_found_by_each_name_that_programs_have_for_them(base: Path, tmp_path: Path, layout: str):
    unet = networks_of(base)["unet"]
    layers = attention_layers(unet)
    if layout.startswith("original"):
        convolutions = [name for name, each in unet.named_modules() if isinstance(each, torch.nn.Conv2d)]
        layers = [*layers, *convolutions, "time_embedding.linear_1"]
    original = original_names(unet, layers)
    named, write = {
        "original, kohya": (lambda name: f"lora_unet_{original[name]}", kohya),
        "original, dotted": (lambda name: f"diffusion_model.{original[name]}", dotted),
        "processor": (lambda name: f"unet.{name}", processor),
        "peft": (lambda name: f"base_model.model.{name}", lettered),
    }[layout]
    tensors, added = changes_for(unet, layers, named, write)
    found = merged(base, tmp_path / "merged", (save(tensors, tmp_path / "one.safetensors"), -0.5))
    before, after = unet.state_dict(), networks_of(found)["unet"].state_dict()
    for name, tensor in after.items():
        change = added.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        assert torch.allclose(tensor, before[name] - 0.5 * (0 if change is None else change), atol=1e-6), name


@pytest.mark.parametrize("preset", ["base", "small"])
def test_our_own_file_and_its_second_are_merged_as_by_comfy(base: Path, tmp_path: Path, preset: Any):
    artifact, file = trained(base, tmp_path / "model", LoraConfig(preset=preset)), tmp_path / "own.safetensors"
    exported = export_single_file_lora(artifact, str(file))
    files = (file, Path(exported.ends_target))
    wanted, unknown = loaded_by_comfy(base, *files)
    found = networks_of(merged(base, tmp_path / "merged", *((each, 1.0) for each in files)))["unet"].state_dict()
    assert all(name.endswith(".lora_B.bias") for name in unknown), "the same as diff_b, for diffusers"
    assert max(float((found[n] - t).abs().max()) for n, t in wanted.state_dict().items()) < 1e-6


def test_weights_keep_their_dtypes_and_shards_become_one_file(base: Path, tmp_path: Path):
    half = Path(shutil.copytree(base, tmp_path / "half"))
    shutil.rmtree(half / "unet")
    unet = networks_of(base)["unet"].half()
    cast(Any, unet).save_pretrained(half / "unet", max_shard_size="400KB")
    assert len(list((half / "unet").glob("*.safetensors"))) > 1
    layer = attention_layers(unet)[0]
    tensors, added = changes_for(unet, [layer], lambda name: f"unet.{name}", lettered)
    found = merged(half, tmp_path / "merged", (save(tensors, tmp_path / "one.safetensors"), 1.0))
    assert [file.name for file in sorted((found / "unet").glob("*"))] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    weights = load_file(found / "unet/diffusion_pytorch_model.safetensors")
    before = unet.state_dict()
    assert weights.keys() == before.keys() and all(each.dtype == torch.float16 for each in weights.values())
    wanted = (before[f"{layer}.weight"].float() + added[layer]).half()
    assert torch.equal(weights[f"{layer}.weight"], wanted)


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({f"{KOHYA}.hada_w1_a": (4, 4)}, "is a LoHa"),
        ({f"{KOHYA}.lokr_w1": (4, 4)}, "is a LoKr"),
        ({f"{KOHYA}.lora_down.weight": (4, 32), f"{KOHYA}.dora_scale": (32, 1)}, "is a DoRA"),
        ({f"unet.{LAYER}.lora_magnitude_vector": (32,)}, "is a DoRA"),
        ({f"{KOHYA}.lora_mid.weight": (4, 4, 3, 3)}, "is a LoCon in three factors"),
        ({f"{KOHYA}.oft_blocks": (4, 4)}, "is an OFT"),
        ({f"{KOHYA}.lora_down.weight": (4, 32)}, "alone of the layer"),
        ({f"{KOHYA}.alpha": ()}, "alone of the layer"),
        ({f"{KOHYA}x.lora_down.weight": (4, 32)}, r"has 1 of 1 keys for which the model has no layer, such as"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": ()}, "for which the model has no layer"),
        ({f"{KOHYA}.lora_down.weight": (4, 33), f"{KOHYA}.lora_up.weight": (32, 4)}, "in the shapes"),
        ({f"{KOHYA}.lora_down.weight": (4, 32), f"{KOHYA}.lora_up.weight": (32, 5)}, "in the shapes"),
        (
            {f"{KOHYA}.lora_down.weight": (4, 32), f"unet.{LAYER}.lora_A.weight": (4, 32)},
            "changes one layer by .* and by",
        ),
    ],
)
def test_other_adapters_and_those_of_other_models_are_refused_by_name(
    base: Path, tmp_path: Path, keys: dict[str, tuple[int, ...]], reason: str
):
    file = save({name: torch.zeros(shape) for name, shape in keys.items()}, tmp_path / "odd.safetensors")
    config = json.loads((base / "unet/config.json").read_text())
    with pytest.raises(LoraFileError, match=reason):
        open_lora(file, 1.0, layer_shapes(base), config, "epsilon")


def test_a_lora_of_a_network_that_predicts_something_else_is_refused(base: Path, tmp_path: Path):
    file = save({f"{KOHYA}.alpha": torch.zeros(())}, tmp_path / "rf.safetensors", d2f_prediction_type="flow_prediction")
    config = json.loads((base / "unet/config.json").read_text())
    with pytest.raises(LoraFileError, match="predicts flow_prediction, and this one predicts epsilon"):
        open_lora(file, 1.0, layer_shapes(base), config, "epsilon")


def test_a_sum_that_the_weights_cannot_hold_is_refused(base: Path, tmp_path: Path):
    unet = networks_of(base)["unet"]
    layer = attention_layers(unet)[0]
    tensors, _ = changes_for(unet, [layer], lambda name: f"unet.{name}", lettered)
    tensors = {name: torch.full_like(tensor, 1e30) for name, tensor in tensors.items()}
    with pytest.raises(LoraFileError, match=r"cannot hold\. Lower its strength"):
        merged(base, tmp_path / "merged", (save(tensors, tmp_path / "one.safetensors"), 1.0))
