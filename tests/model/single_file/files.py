"""Single-file checkpoints of tiny models, whose configs and tokenizers lie beside them."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import BaseModel
from d2f_core.model.denoiser import load_unet
from d2f_core.model.single_file.write import DtypeName, write_checkpoint_file
from d2f_core.model.text_encoder import TextEncoderPair, load_text_encoder


def put_configs_beside(base: Path, file: Path, *, scheduler: bool = True) -> None:
    """A directory beside the file with all of the base but its weights; without `scheduler`, the file tells it."""
    left_out = ("*.safetensors", *(() if scheduler else ("scheduler",)))
    shutil.copytree(base, file.with_suffix(".configs"), ignore=shutil.ignore_patterns(*left_out))


def write_file(base: Path, file: Path, dtype: DtypeName = "float32", *, scheduler: bool = True) -> Path:
    write_checkpoint_file(str(base), str(file), dtype=dtype)
    put_configs_beside(base, file, scheduler=scheduler)
    return file


def changed(
    file: Path, target: Path, add: Mapping[str, Tensor] | None = None, drop: str = "-", **metadata: str
) -> Path:
    """A copy without the keys that begin with `drop`, with other tensors and other metadata; `__` stands for a dot."""
    tensors = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(drop)}
    save_file({**tensors, **(add or {})}, target, {key.replace("__", "."): value for key, value in metadata.items()})
    return target


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def tensors_of(base: BaseModel) -> dict[str, Tensor]:
    """The tensors of all networks of a base model, as this project loads them."""
    encoder = load_text_encoder(base)
    encoders = encoder.networks if isinstance(encoder, TextEncoderPair) else (encoder.network,)
    networks = {"unet": load_unet(base), "vae": load_autoencoder(base).network}
    networks |= {f"text_encoder_{number}": network for number, network in enumerate(encoders)}
    return {f"{part}.{name}": t for part, network in networks.items() for name, t in network.state_dict().items()}


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names, and tensors that are equal to the last bit."""
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
