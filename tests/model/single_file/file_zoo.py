"""Single files as people have them, each made of a tiny checkpoint, and what becomes of it.

`python -m tests.model.single_file.file_zoo` prints the table of docs/checkpoint_files.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class File:
    """One row of the table."""

    name: str
    becomes: str
    """What the network is read to predict, or `refused`."""
    make: Callable[[Tensors], bytes]
    """The file's bytes, of the tensors of a whole checkpoint of the family."""
    family: str = "sd15"
    why: str = ""
    """Of refusals, a part of the message."""
    ending: str = ".safetensors"
    dtype: torch.dtype = torch.float32
    """In which the weights are kept."""


def row(
    name: str,
    becomes: str,
    change: Callable[[Tensors], Tensors] = dict,
    why: str = "",
    family: str = "sd15",
    dtype: torch.dtype = torch.float32,
    **metadata: str,
) -> File:
    told = {key.replace("__", "."): value for key, value in metadata.items()}

    def make(tensors: Tensors) -> bytes:
        return save({key: tensor.contiguous().clone() for key, tensor in change(tensors).items()}, told)

    return File(name=name, becomes=becomes, make=make, why=why, family=family, dtype=dtype)


def to(dtype: torch.dtype, *begins: str) -> Callable[[Tensors], Tensors]:
    return lambda all_: {k: t.to(dtype) if k.startswith(begins or "") else t for k, t in all_.items()}


def without(*begins: str) -> Callable[[Tensors], Tensors]:
    return lambda all_: {key: tensor for key, tensor in all_.items() if not key.startswith(begins)}


def only(*begins: str) -> Callable[[Tensors], Tensors]:
    return lambda all_: {key: tensor for key, tensor in all_.items() if key.startswith(begins)}


def plus(more: Mapping[str, Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda all_: {**all_, **more}


def alone(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda _: dict.fromkeys(keys, torch.ones(4, 4))


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda all_: {key.replace(old, new): tensor for key, tensor in all_.items()}


def as_matrices(all_: Tensors) -> Tensors:
    """The autoencoder's attention without the sizes of its 1x1 convolutions."""
    return {k: t[..., 0, 0] if ".mid.attn_1." in k and t.ndim == 4 else t for k, t in all_.items()}


def raw(name: str, why: str, make: Callable[[Tensors], bytes], ending: str = ".safetensors") -> File:
    return File(name=name, becomes="refused", make=make, why=why, ending=ending)


ONE, MARK = torch.ones(1), torch.empty(0)
LAYER = f"{UNET}input_blocks.0.0.weight"
ROWS = [
    row("float32", "epsilon"),
    row("float16", "epsilon", to(torch.float16), dtype=torch.float16),
    row("bfloat16", "epsilon", to(torch.bfloat16), dtype=torch.bfloat16),
    row("a UNet in float16, the rest in float32", "epsilon", to(torch.float16, UNET), dtype=torch.float16),
    row("SD 2.1", "v_prediction", family="sd21"),
    row("SDXL", "epsilon", family="sdxl"),
    row("SDXL with `v_pred`", "v_prediction", plus({"v_pred": MARK}), family="sdxl"),
    row(
        "SDXL with `v_pred` and `ztsnr`",
        "v_prediction, zero terminal SNR",
        plus({"v_pred": MARK, "ztsnr": MARK}),
        family="sdxl",
    ),
    row("metadata `v`", "v_prediction", modelspec__prediction_type="v"),
    row("metadata `v-zsnr`", "v_prediction, zero terminal SNR", modelspec__prediction_type="v-zsnr"),
    row("metadata `sd3`", "flow_prediction", prediction_type="sd3"),
    row("metadata `noise_process: flow`", "flow_prediction", modelspec__noise_process="flow"),
    row("averaged weights beside the others", "epsilon", plus({"model_ema.decay": ONE, "model_ema.out2bias": ONE})),
    row("the training's noise schedule", "epsilon", plus({"betas": ONE, "sqrt_alphas_cumprod": ONE, "logvar": ONE})),
    row("positions as numbers", "epsilon", plus({f"{CLIP}embeddings.position_ids": torch.arange(77)[None]})),
    row("early names of the text encoder", "epsilon", renamed("transformer.text_model.", "transformer.")),
    row("the autoencoder's attention as matrices", "epsilon", as_matrices),
    row("the autoencoder's loss", "epsilon", plus({"first_stage_model.loss.logvar": ONE})),
    row("no autoencoder", "refused", without(VAE), "holds no autoencoder"),
    row("no text encoder", "refused", without(TEXT), "without a text encoder"),
    row("a UNet alone", "refused", only(UNET), "holds UNet without a text encoder"),
    row("a UNet alone, in diffusers' names", "refused", alone("down_blocks.0.resnets.0.conv1.weight"), "holds nothing"),
    row("an autoencoder alone", "refused", only(VAE), "holds autoencoder without a text encoder"),
    row("a text encoder alone", "refused", only(TEXT), "holds no autoencoder"),
    row(
        "averaged weights alone",
        "refused",
        lambda all_: {**without(UNET)(all_), "model_ema.diffusion_modelout2bias": ONE},
        "averaged weights alone",
    ),
    row("a UNet that lacks a tensor", "refused", without(LAYER), "lacks 1 tensors of SD 1.5"),
    row("for inpainting", "refused", plus({LAYER: torch.ones(32, 9, 3, 3)}), "9 input channels"),
    row("a ControlNet", "refused", alone("control_model.input_blocks.0.0.weight"), "holds nothing"),
    row("a checkpoint with a ControlNet", "refused", plus({"control_model.a": ONE}), "that SD 1.5 has not"),
    row(
        "SDXL's refiner",
        "refused",
        alone("conditioner.embedders.0.model.ln_final.weight", LAYER),
        "second text encoder alone",
    ),
    row("SD 3 or Flux", "refused", alone(f"{UNET}joint_blocks.0.x.weight"), "holds a transformer"),
    row("Flux, bare", "refused", alone("double_blocks.0.img_attn.qkv.weight"), "holds a transformer"),
    row("a LoRA of sd-scripts", "refused", alone("lora_unet_mid_block.lora_up.weight"), "is a LoRA"),
    row("a LoRA of diffusers", "refused", alone("unet.mid_block.lora_A.weight"), "is a LoRA"),
    row("a LyCORIS", "refused", alone("lycoris_mid_block.lokr_w1"), "is a LoRA"),
    row("a textual inversion", "refused", alone("emb_params"), "holds nothing"),
    row("a motion module", "refused", alone("down_blocks.0.motion_modules.0.norm.weight"), "holds nothing"),
    row("an IP-Adapter", "refused", alone("image_proj.proj.weight"), "holds nothing"),
    row("float8", "refused", to(torch.float8_e4m3fn, LAYER), "as float8_e4m3fn"),
    row("whole numbers", "refused", to(torch.int8, LAYER), "as int8"),
    row("EDM's noise levels", "refused", plus({"edm_vpred.sigma_max": ONE}), "EDM's"),
    row("metadata that nobody knows", "refused", why="known are epsilon, v, x0, sd3", prediction_type="lcm"),
    raw("a download that was cut off", "Copy it again", lambda all_: save(all_)[:-100]),
    raw("an empty file", "has 0 bytes", lambda _: b""),
    raw("a web page in place of the file", "are its header", lambda _: b"<!DOCTYPE html><html>" * 50),
    raw("a pickle called safetensors", "are its header", lambda _: b"\x80\x02}q\x00." * 50),
    raw("a `.ckpt`", "is a pickle", lambda _: b"\x80\x02}q\x00.", ".ckpt"),
    raw("a `.pt`", "is a pickle", lambda _: b"\x80\x02}q\x00.", ".pt"),
]


def write(file: File, tensors: Tensors, place: Path) -> Path:
    target = place / f"zoo{file.ending}"
    target.write_bytes(file.make(tensors))
    return target


def table() -> str:
    """The table of the page, in Markdown."""
    told = {True: "refused: \u201c\u2026 {}\u201d", False: "read, {}"}
    lines = [f"| {each.name} | {told[bool(each.why)].format(each.why or each.becomes)} |" for each in ROWS]
    return "\n".join(["| file | what becomes of it |", "|---|---|", *lines])


if __name__ == "__main__":
    print(table())
