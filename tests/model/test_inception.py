"""Inception-v3 as FID uses it: equal to two independent packages', from any kind of file, and from no other tensors."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2f_core.flow.evaluate.feature_networks import FeatureError, Features, load_features
from d2f_core.flow.evaluate.resize_filters import RESIZE_FILTERS
from d2f_core.model.inception import InceptionError, load_inception, weights_file
from d2f_core.storage import write_bytes
from infra.local.stack import StackEnv
from tests.model.seeded_inception import SIZES, seeded_images, seeded_weights

EXPECTED = json.loads(Path(__file__).with_name("inception_expected.json").read_text())
"""What torch-fidelity's network gave for these weights and images; made by benchmarks.inception_peers."""


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return seeded_weights()


@pytest.fixture(scope="module")
def file(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module", params=sorted(RESIZE_FILTERS))
def features(file: Path, request: pytest.FixtureRequest) -> Features:
    return load_features(str(file), resize=request.param)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_features_are_those_of_torch_fidelity_and_clean_fid(features: Features, size: tuple[int, int]) -> None:
    expected = EXPECTED["features"][f"{features.network.resize} {size[0]}x{size[1]}"]
    (found,) = features(seeded_images(*size)[:1])
    first = np.array(expected["first"][0])
    assert found.shape == (2048,) and found.dtype == np.float32
    np.testing.assert_allclose(found[: len(first)], first, rtol=1e-4, atol=1e-4 * np.abs(first).max())
    assert found.mean() == pytest.approx(expected["mean"][0], rel=1e-4)
    assert found.std(ddof=1) == pytest.approx(expected["deviation"][0], rel=1e-4)


def test_the_resize_filter_is_part_of_the_name_and_the_fingerprint(file: Path) -> None:
    clean, fidelity = (load_features(str(file), resize=name, device="meta") for name in ("", "torch-fidelity"))
    assert (clean.name, fidelity.name) == ("inception-v3-clean-fid_2048d", "inception-v3-torch-fidelity_2048d")
    assert clean.network.weights_hash == fidelity.network.weights_hash and clean.fingerprint != fidelity.fingerprint
    assert load_features(str(file)).fingerprint == clean.fingerprint, "on meta it is that of the loaded weights"


def test_files_of_every_kind_give_the_same_network(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    bare = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    counted = {**tensors, "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)}
    torch.save(counted, tmp_path / "archive.pth")
    torch.save(bare, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(bare, tmp_path / "bare.safetensors")
    for each in sorted(tmp_path.iterdir()):
        network = load_inception(each)
        assert not network.training and not any(value.requires_grad for value in network.parameters())
        assert {name: value.shape for name, value in network.state_dict().items()} == {
            name: value.shape for name, value in bare.items()
        }
        for name in ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var"):
            torch.testing.assert_close(network.state_dict()[name], tensors[name], rtol=0, atol=0)
        described = load_inception(each, "meta")
        assert {str(value.device) for value in described.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_tensors_are_refused_and_three_are_named(
    tensors: dict[str, Tensor], tmp_path: Path, kind: str, device: str
) -> None:
    other = dict(tensors)
    for name in ("Mixed_5b.branch1x1.conv.weight", "Mixed_6e.branch_pool.bn.bias"):
        del other[name]
    other["fc.weight"] = torch.zeros(1000, 2048)  # torchvision's network has 1000 classes
    other["AuxLogits.fc.bias"] = torch.zeros(3)
    other["Mixed_7c.branch1x1.bn.weight"] = other["Mixed_7c.branch1x1.bn.weight"].half()
    file = tmp_path / f"other.{kind}"
    torch.save(other, file) if kind == "pth" else save_file(other, file)
    with pytest.raises(
        InceptionError, match=r"\(5 differences\): Mixed_5b\.branch1x1\.conv\.weight is missing; "
    ) as found:
        load_inception(file, device)
    told = str(found.value)
    assert "Mixed_6e.branch_pool.bn.bias is missing; fc.weight is [1000, 2048] instead of [1008, 2048]. Give" in told
    assert "AuxLogits" not in told, "three are enough"


def test_names_and_dtypes_are_compared_too(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({**tensors, "extra": torch.zeros(2)}, tmp_path / "extra.pth")
    with pytest.raises(InceptionError, match="extra is not the network's"):
        load_inception(tmp_path / "extra.pth", "meta")
    torch.save({**tensors, "fc.bias": tensors["fc.bias"].double()}, tmp_path / "double.pth")
    with pytest.raises(InceptionError, match=r"fc\.bias is torch\.float64"):
        load_inception(tmp_path / "double.pth", "meta")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"x": Hostile(ran)}, tmp_path / "archive.pth")
    torch.save({"x": Hostile(ran)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(ran), protocol=2))
    ran.unlink(missing_ok=True)
    for name in ("archive", "old", "plain"):
        with pytest.raises(InceptionError, match=r"cannot be read as a file of tensors \(.*\)\. Copy it again"):
            load_inception(tmp_path / f"{name}.pth")
    assert not ran.exists()


def test_files_that_hold_no_state_dict_are_refused(file: Path, tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"state_dict": {"x": torch.zeros(2)}}, tmp_path / "nested.pth")
    for name, kind in (("list", "list"), ("nested", "dict")):
        with pytest.raises(InceptionError, match=rf"holds a {kind}, not tensors by name\. Save its state dict"):
            load_inception(tmp_path / f"{name}.pth")
    cut = file.read_bytes()[:40_000]
    (tmp_path / "cut.pth").write_bytes(cut)
    (tmp_path / "cut.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{")
    for name in ("cut.pth", "cut.safetensors"):
        for device in ("cpu", "meta"):
            with pytest.raises(InceptionError, match=r"Copy .* again"):
                load_inception(tmp_path / name, device)


def test_what_names_no_file_or_no_filter_is_refused(file: Path) -> None:
    with pytest.raises(FeatureError, match=r"'inception' names no file\. Give .*pt_inception-2015-12-05-6726825d\.pth"):
        load_features("inception")
    with pytest.raises(InceptionError, match=r"no file '/none/x\.pth'\. Give Inception-v3's weights"):
        load_features("/none/x.pth")
    with pytest.raises(FeatureError, match="resize='bilinear' must be one of clean-fid, torch-fidelity"):
        load_features(str(file), resize="bilinear")


def test_weights_on_s3_are_copied_once_per_version(
    s3: StackEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path))
    uri = "s3://d2f/test-inception/weights.pth"
    write_bytes("s3://d2f/test-inception/other.bin", b"beside it")
    write_bytes(uri, b"first")
    copy = weights_file(uri)
    assert copy.read_bytes() == b"first" and weights_file(uri) == copy
    assert [each.name for each in copy.parent.iterdir()] == ["weights.pth"]
    write_bytes(uri, b"second")
    assert weights_file(uri).read_bytes() == b"second"
    with pytest.raises(InceptionError, match=r"no file 's3://d2f/test-inception/none\.pth'"):
        weights_file("s3://d2f/test-inception/none.pth")
