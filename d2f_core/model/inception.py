"""Inception-v3 as FID uses it: the network that TensorFlow released on 2015-12-05, up to its 2,048 pooled features.

It differs from the one that image classifiers use: pixels are (x - 128) / 128, average pools leave the padding out of
their mean, the last block pools by the maximum, and the classifier, which features do not need, has 1008 classes. The
weights are read from a file in the names of pytorch-fid and torch-fidelity (Mixed_5b.branch1x1.conv.weight, ...):
pt_inception-2015-12-05-6726825d.pth, weights-inception-2015-12-05-6726825d.pth, or the same tensors in safetensors.

Sources: Szegedy et al., 2016, arXiv:1512.00567 (the architecture); Heusel et al., 2017, arXiv:1706.08500 (FID).
"""

import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from d2f_core.file_systems import backend
from d2f_core.model.base import PROJECT_ROOT, local_copy
from d2f_core.model.fit import meta_tensors, misfit
from d2f_core.model.safetensors_header import HeaderError
from d2f_core.storage import file_exists, is_s3

WIDTH = 2048
"""Features per image."""
INPUT_SIZE = 299
"""Height and width of the network's input in pixels."""
SUFFIXES = (".pth", ".pt", ".safetensors")
CLASSIFIER = {"fc.weight": torch.Size([1008, WIDTH]), "fc.bias": torch.Size([1008])}
"""Tensors of a file that are not used; they may be missing."""
COUNTER = ".num_batches_tracked"
"""Ends the names of counters that PyTorch adds to a file; they are not used."""


class InceptionError(ValueError):
    """A file that is no Inception-v3 as FID uses it, with the reason and the fix."""


class Conv(NamedTuple):
    """A convolution without bias, a batch normalisation and a ReLU."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True
    """Whether the image keeps its size at stride 1."""


Branch = tuple[Conv | Callable[[Tensor], Tensor], ...]
AVERAGE = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
HALVE = partial(functional.max_pool2d, kernel_size=3, stride=2)

STEM: Branch = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, padded=False), Conv("Conv2d_2a_3x3", 32, (3, 3), padded=False),
    Conv("Conv2d_2b_3x3", 64, (3, 3)), HALVE,
    Conv("Conv2d_3b_1x1", 80), Conv("Conv2d_4a_3x3", 192, (3, 3), padded=False), HALVE,
)  # fmt: skip


def _block_35(pooled: int) -> tuple[Branch, ...]:
    """Branches of a block on 35 x 35 positions; `pooled`: width of the one with a pool."""
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))),
        (AVERAGE, Conv("branch_pool", pooled)),
    )


def _block_17(inner: int) -> tuple[Branch, ...]:
    """Branches of a block on 17 x 17 positions; `inner`: width inside those with 7 x 1 and 1 x 7 kernels."""
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, (1, 7)), Conv("branch7x7_3", 192, (7, 1))),
        (
            Conv("branch7x7dbl_1", inner), Conv("branch7x7dbl_2", inner, (7, 1)), Conv("branch7x7dbl_3", inner, (1, 7)),
            Conv("branch7x7dbl_4", inner, (7, 1)), Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (AVERAGE, Conv("branch_pool", 192)),
    )  # fmt: skip


def _block_8(pool: Callable[[Tensor], Tensor]) -> tuple[Branch, ...]:
    """Branches of a block on 8 x 8 positions; two pairs begin in common."""
    single = (Conv("branch3x3_1", 384),)
    double = (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)))
    return (
        (Conv("branch1x1", 320),),
        (*single, Conv("branch3x3_2a", 384, (1, 3))),
        (*single, Conv("branch3x3_2b", 384, (3, 1))),
        (*double, Conv("branch3x3dbl_3a", 384, (1, 3))),
        (*double, Conv("branch3x3dbl_3b", 384, (3, 1))),
        (pool, Conv("branch_pool", 192)),
    )


BLOCKS: Mapping[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_35(32), "Mixed_5c": _block_35(64), "Mixed_5d": _block_35(64),
    "Mixed_6a": (
        (Conv("branch3x3", 384, (3, 3), 2, padded=False),),
        (
            Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3), 2, padded=False),
        ),
        (HALVE,),
    ),
    "Mixed_6b": _block_17(128), "Mixed_6c": _block_17(160), "Mixed_6d": _block_17(160), "Mixed_6e": _block_17(192),
    "Mixed_7a": (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, padded=False)),
        (
            Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)), Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), 2, padded=False),
        ),
        (HALVE,),
    ),
    "Mixed_7b": _block_8(AVERAGE), "Mixed_7c": _block_8(MAXIMUM),
}  # fmt: skip
"""Name -> branches, in the network's order."""


class ConvNorm(nn.Module):
    """The modules of a `Conv`."""

    def __init__(self, inputs: int, conv: Conv) -> None:
        super().__init__()
        padding = (conv.kernel[0] // 2, conv.kernel[1] // 2) if conv.padded else 0
        self.conv = nn.Conv2d(inputs, conv.width, conv.kernel, conv.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(conv.width, eps=0.001)
        self.bn.register_buffer("num_batches_tracked", None)

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(images)), inplace=True)


class Branches(nn.Module):
    """Several branches on one input, whose outputs are concatenated. A common beginning is computed once."""

    def __init__(self, inputs: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches, self.width = branches, 0
        for branch in branches:
            width = inputs
            for step in branch:
                if isinstance(step, Conv):
                    self.add_module(step.name, ConvNorm(width, step))
                    width = step.width
            self.width += width

    def forward(self, images: Tensor) -> Tensor:
        made: dict[Branch, Tensor] = {(): images}
        for branch in self.branches:
            for end in range(1, len(branch) + 1):
                if branch[:end] not in made:
                    step = branch[end - 1]
                    apply = self.get_submodule(step.name) if isinstance(step, Conv) else step
                    made[branch[:end]] = apply(made[branch[: end - 1]])
        return torch.cat([made[branch] for branch in self.branches], 1)


class InceptionV3(Branches):
    """Pixels from 0 to 255, [n, 3, 299, 299], -> pooled features, [n, 2048]."""

    def __init__(self) -> None:
        super().__init__(3, (STEM,))
        width = self.width
        for name, branches in BLOCKS.items():
            block = Branches(width, branches)
            self.add_module(name, block)
            width = block.width

    def forward(self, images: Tensor) -> Tensor:
        found = super().forward((images - 128) / 128)
        for name in BLOCKS:
            found = self.get_submodule(name)(found)
        return found.mean((2, 3))


def weights_file(uri: str) -> Path:
    """The file at `uri` on this machine; one on S3 is downloaded once per version of the object.

    Raises:
        InceptionError: there is no such file.
    """
    if is_s3(uri) and file_exists(uri):
        place, name = uri.rsplit("/", 1)
        return local_copy(place, chosen=lambda each: each == name) / name
    local = Path(uri.removeprefix("file://")).expanduser()
    for file in (local, PROJECT_ROOT / local):
        if not is_s3(uri) and file.is_file():
            return file
    raise InceptionError(f"no file {uri!r}. Give Inception-v3's weights as FID uses them, for example a local or s3:// "
                         "copy of pt_inception-2015-12-05-6726825d.pth.")  # fmt: skip


def load_inception(file: Path, device: str | torch.device = "cpu") -> InceptionV3:
    """The network in evaluation mode, with the weights of a .pth (tensors alone: no code of it runs) or .safetensors.

    Args:
        device: where it computes; "meta": names and shapes are checked, and no weights are loaded.

    Raises:
        InceptionError: the file cannot be read, or its tensors have other names, shapes or dtypes than the network's.
    """
    with torch.device("meta"):
        network = InceptionV3().eval().requires_grad_(False)
    tensors = _read(file, device)
    _check(file, network, tensors)
    # Not strict: names are compared above, and PyTorch adds the counters that this network leaves out.
    network.load_state_dict({name: tensors[name] for name in network.state_dict()}, strict=False, assign=True)
    return network


def _read(file: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            if str(device) == "meta":
                return meta_tensors(file)
            return load_file(file, device=str(device), backend=backend(file))
        # Files from before PyTorch 1.6, such as pytorch-fid's, are no archives and cannot be mapped.
        mapped = zipfile.is_zipfile(file) and backend(file) == "mmap"
        found: Any = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
    except HeaderError as error:
        raise InceptionError(f"{str(file)!r} {error}") from None
    except Exception as error:  # unpickling damaged bytes raises a dozen types; each means the same here
        reason = " ".join(str(error).split())[:200]
        raise InceptionError(f"{str(file)!r} cannot be read as a file of tensors ({reason}). Copy it again.") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InceptionError(f"{str(file)!r} holds a {type(found).__name__}, not tensors by name. Save its state dict.")
    return dict(found)


def _check(file: Path, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise InceptionError, naming three differences at most, unless a file's tensors are the network's."""
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    wanted |= {name: shape for name, shape in CLASSIFIER.items() if name in tensors}
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    differs = misfit(wanted, found)
    told = [f"{name} is missing" for name in differs.missing]
    told += [f"{name} is {list(found[name].shape)} instead of {list(wanted[name])}" for name in differs.reshaped]
    told += [f"{name} is not the network's" for name in differs.unexpected]
    told += [f"{name} is {tensor.dtype}" for name, tensor in found.items() if tensor.dtype != torch.float32]
    if told:
        raise InceptionError(
            f"{str(file)!r} is no Inception-v3 as FID uses it, in float32 ({len(told)} differences): "
            f"{'; '.join(told[:3])}. Give pt_inception-2015-12-05-6726825d.pth, or its tensors under their names."
        )
