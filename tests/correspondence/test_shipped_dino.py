"""The network in the wheel is the one that transformers computes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from transformers import AutoModel

from d2f_core.correspondence import shipped_dino
from d2f_core.correspondence.config import StudentConfig
from d2f_core.correspondence.shipped_dino import PREFIX, ShippedError, build_network, model_file, read_backbone
from d2f_core.correspondence.student import add_adapters, load_network, trained

SIDE = 224
"""Of the input that the file is made for."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dinov2-s")
    shipped_dino.write_dinov2(path)
    return path


@torch.inference_mode()
def test_its_tokens_are_those_of_the_file(directory: Path) -> None:
    whole = onnx.load(str(model_file()))
    (last,) = [node for node in whole.graph.node if node.op_type == "Add" and f"{PREFIX}layernorm.bias" in node.input]
    nodes = whole.graph.node[: list(whole.graph.node).index(last) + 1]
    output = onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "backbone", whole.graph.input, [output], whole.graph.initializer)
    cut = onnx.helper.make_model(graph, opset_imports=whole.opset_import, ir_version=whole.ir_version)
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)
    (wanted,) = ReferenceEvaluator(cut).run(None, {whole.graph.input[0].name: pixels})
    found = AutoModel.from_pretrained(directory).eval()(pixel_values=torch.tensor(pixels)).last_hidden_state
    assert found.shape == (1, 1 + 16 * 16, 384)
    assert np.abs(found.numpy() - wanted).max() < 1e-3 < np.abs(wanted).mean()


def test_the_demos_student_trains_what_it_should(directory: Path) -> None:
    config = StudentConfig(base=str(directory), layers=11, first_block=5)
    values = trained(add_adapters(load_network(config), config, seed=0))
    assert sum(value.numel() for _, value in values) == 73_728


def test_another_network_is_refused() -> None:
    state = read_backbone(model_file())
    state.pop("layernorm.weight")
    with pytest.raises(ShippedError, match=r"no DINOv2-S/14 .*layernorm\.weight"):
        build_network(state)


def test_without_the_wheel_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_dino, "PACKAGE", "no_such_package")
    with pytest.raises(ShippedError, match="make install-correspondence"):
        model_file()
