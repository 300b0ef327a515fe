"""Artifacts made to run code, to read or write elsewhere, or to deceive: each is refused in one line, and does nothing.

Whoever makes such an artifact also writes the hashes that fit: where a case leaves diff2flow.json alone, they are made
anew after the damage. So what refuses a case is the rule that its row names.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2f_core.model.artifact import DESCRIPTION, ArtifactError, describe_model, load_model
from d2f_core.model.artifact_files import MAX_CONFIG_BYTES, MAX_ENTRIES, check_files, plain_json
from d2f_core.model.config import LoraConfig
from d2f_core.model.description import write_description
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import trained
from tests.model.damage import (
    ADAPTER,
    UNET,
    Case,
    fields,
    file,
    link,
    many,
    nested,
    of_bytes,
    other_weights,
    pickled,
    script,
    socket_at,
    special,
    tensor,
    tensors,
    zipped,
)

CONFIG = "unet/config.json"
PICKLE, CODE, ARCHIVE, LINK, OTHER = (
    "is a pickle",
    "is code",
    "is an archive",
    "is a symbolic link",
    "is no (file|directory)",
)
TOKENIZER = "tokenizer/tokenizer_config.json"
YAML_TAG, WRITTEN_OUT = "!!python/object/apply:os.system", "!<tag:yaml.org,2002:python/name:os.system>"
FULL: dict[str, tuple[str, Case]] = {
    # Pickles.
    **{f"pickle {suffix}": (PICKLE, file(f"unet/model.{suffix}", pickled)) for suffix in
       ("bin", "pt", "pth", "ckpt", "pkl", "pickle", "joblib", "npy", "PT")},
    "pickle beside the description": (PICKLE, file("training_args.bin", pickled)),
    "pickle in place of the weights": (PICKLE, file("unet/diffusion_pytorch_model.bin", pickled, instead=UNET)),
    "pickle called safetensors": ("are its header", file(UNET, pickled)),
    "pickle called JSON": ("is not plain JSON", file(CONFIG, pickled)),
    "pickle called a card": ("is not UTF-8", file("README.md", pickled)),
    "pickle called a picture": ("is no PNG", file("samples.png", pickled)),
    "pickle called the description": ("is not plain JSON", file(DESCRIPTION, pickled)),
    # Archives.
    **{f"archive {suffix}": (ARCHIVE, file(f"weights.{suffix}", zipped)) for suffix in ("zip", "whl", "tar.gz", "tar")},
    "archive called safetensors": ("are its header", file(UNET, zipped)),
    "archive called a picture": ("is no PNG", file("samples.png", zipped)),
    # Code.
    "script beside the description": (CODE, file("pipeline.py", script)),
    "script beside the weights": (CODE, file("unet/unet_2d.py", script)),
    "compiled script": (CODE, file("unet/unet_2d.pyc", script)),
    "shell script": (CODE, file("setup.sh", b"touch canary")),
    "shared library": (CODE, file("unet/kernel.so", b"\x7fELF")),
    "notebook": (CODE, file("demo.ipynb", b"{}")),
    "package directory": (OTHER, file("modeling/__init__.py", script)),
    "cache directory": (OTHER, file("__pycache__/a.pyc", script)),
    "git hooks": (OTHER, file(".git/hooks/post-checkout", script)),
    "hidden file": (OTHER, file(".env", b"AWS_SECRET_ACCESS_KEY=1")),
    "unknown file": (OTHER, file("Makefile", b"all:\n\ttouch canary\n")),
    "weights of another format": ("in a format that is not read", file("unet/model.h5", b"\x89HDF")),
    # Links, special files, names.
    "link to weights elsewhere": (LINK, link(UNET, "outside/weights")),
    "link to a directory elsewhere": (LINK, link("unet", "outside/unet")),
    "link in place of the description": (LINK, link(DESCRIPTION, "outside/description")),
    "link that leads nowhere": (LINK, special(DESCRIPTION, lambda place: place.symlink_to("/no/such/file"))),
    "link to a system file": (LINK, special("README.md", lambda place: place.symlink_to("/etc/hostname"))),
    "hard link": ("is a hard link", special("README.md", lambda place: place.hardlink_to(place.parent / DESCRIPTION))),
    "named pipe": ("is neither a regular file", special("README.md", os.mkfifo)),
    "socket": ("is neither a regular file", special("README.md", socket_at)),
    "directory called description": (OTHER, special(DESCRIPTION, Path.mkdir)),
    "directory called weights": (OTHER, special(UNET, Path.mkdir)),
    "directories in a part": (OTHER, file("unet/a/b/config.json", b"{}")),
    "name with a line break": (OTHER, file("unet/a\nb.json", b"{}")),
    "name with backslashes": (OTHER, file("unet/..\\..\\a.json", b"{}")),
    "name that is no text": (OTHER, lambda artifact, _: (artifact / os.fsdecode(b"\xff.json")).touch()),
    "too many files": (f"more than {MAX_ENTRIES} files", many),
    # JSON by which libraries import code.
    "auto_map of the UNet": ("'auto_map', by which transformers", fields(CONFIG, auto_map={"AutoModel": "evil.Model"})),
    "auto_map of a tokenizer": ("'auto_map'", file(TOKENIZER, b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')),
    "remote code": ("'trust_remote_code'", fields(CONFIG, trust_remote_code=True)),
    "class of another library": ("only UNet2DConditionModel is loaded", fields(CONFIG, _class_name="EvilModel")),
    "class and module": ("is no plain class name", fields(CONFIG, _class_name=["evil", "Model"])),
    "class by a path": ("is no plain class name", fields(CONFIG, _class_name="evil.Model")),
    "quantizer": ("'quantization_config'", fields(CONFIG, quantization_config={"quant_method": "evil"})),
    "Hydra target": ("'_target_'", fields(CONFIG, a=[{"b": {"_target_": "os.system"}}])),
    "MLflow loader": ("'loader_module'", fields(DESCRIPTION, training={"loader_module": "evil"})),
    "pickled class": ("'__reduce__'", fields(DESCRIPTION, training={"a": {"__reduce__": ["os.system", "ls"]}})),
    "custom pipeline": ("'custom_pipelines'", file("model_index.json", b'{"custom_pipelines": {"a": "b"}}')),
    "pipeline part of a package": ("takes 'unet' from", file("model_index.json", b'{"unet": ["evil", "Model"]}')),
    "pipeline part of a path": ("takes 'vae' from", file("model_index.json", b'{"vae": ["../evil", "Model"]}')),
    "pipeline class of a module": ("no plain class", file("model_index.json", b'{"_class_name": ["evil", "P"]}')),
    # JSON that is none, or too much.
    "JSON list": ("not a JSON object", file(CONFIG, b"[]")),
    "JSON nested deep": ("nested more than", file(CONFIG, nested(100))),
    "JSON nested without end": ("is not plain JSON", file(CONFIG, nested(200_000))),
    "JSON with a key twice": ("a key twice", file(CONFIG, b'{"a": 1, "a": 2}')),
    "JSON with NaN": ("it holds NaN", file(CONFIG, b'{"a": NaN}')),
    "JSON in UTF-16": ("is not plain JSON", file(CONFIG, '{"a": 1}'.encode("utf-16"))),
    "JSON with a number of 10,000 digits": ("is not plain JSON", file(CONFIG, b'{"a": ' + b"9" * 10_000 + b"}")),
    "JSON of 100 MB": ("at most", of_bytes(CONFIG, 100 * 10**6)),
    "description too long": ("at most", of_bytes(DESCRIPTION, MAX_CONFIG_BYTES + 1)),
    # Indices of sharded weights.
    "shard elsewhere": ("names the shard", file(f"{UNET}.index.json", b'{"weight_map": {"a": "../../a.safetensors"}}')),
    "shard that is a pickle": ("names the shard", file(f"{UNET}.index.json", b'{"weight_map": {"a": "model.bin"}}')),
    "shard that is missing": ("names the shard", file(f"{UNET}.index.json", b'{"weight_map": {"a": "b.safetensors"}}')),
    "index without shards": ("has no weight_map", file(f"{UNET}.index.json", b"{}")),
    # Safetensors that lie about themselves.
    "empty weights": ("has 0 bytes", file(UNET, b"")),
    "weights of five bytes": ("has 5 bytes", file(UNET, b"12345")),
    "header beyond the file": ("are its header", tensors(tensor(), length=10_000)),
    "header of 2**63 bytes": ("are its header", tensors(tensor(), length=2**63)),
    "header above the limit": ("are its header", lambda artifact, canary: (
        tensors(tensor(), length=150 * 10**6)(artifact, canary), os.truncate(artifact / UNET, 200 * 10**6))),
    "header that is no JSON": ("is not plain JSON", tensors(b"\x80\x04K\x01.    ")),
    "header with a tensor twice": ("a key twice", tensors(b'{"a": {}, "a": {}}')),
    "metadata that are no strings": ("metadata that are not", tensors({"__metadata__": {"a": {"b": 1}}}, b"")),
    "dtype object": ("does not add up", tensors(tensor(dtype="O"))),
    "dtype that is a list": ("does not add up", tensors(tensor(dtype=["F32"]))),
    "shape that contradicts its bytes": ("does not add up", tensors(tensor(shape=(3,)))),
    "shape below zero": ("does not add up", tensors(tensor(shape=(-2, -1)))),
    "shape that overflows": ("does not add up", tensors(tensor(shape=(2**62, 2**62, 4)))),
    "shape of truth values": ("does not add up", tensors(tensor(shape=(True, True), offsets=(0, 4)), b"\0" * 4)),
    "tensor beyond the file": ("its header tells of", tensors(tensor(shape=(4,), offsets=(0, 16)))),
    "tensor before the file": ("does not add up", tensors(tensor(offsets=(-8, 0)))),
    "tensors that overlap": ("is due", tensors({**tensor(), "b": tensor(shape=(1,), offsets=(4, 8))["a"]})),
    "gap between tensors": ("is due", tensors(tensor(shape=(1,), offsets=(4, 8)))),
    "bytes behind the tensors": ("its header tells of", tensors(tensor(), b"\0" * 8 + b"PK\x03\x04")),
    "truncated weights": ("its header tells of", of_bytes(UNET, 500_000)),
    # YAML and pictures.
    "YAML that makes an object": ("has the tag", file("config.yaml", f"a: {YAML_TAG} ['ls']\n".encode())),
    "YAML with a written-out tag": ("has the tag", file("config.yaml", f"a: {WRITTEN_OUT} b\n".encode())),
    "YAML that is none": ("is not YAML", file("config.yaml", b"a: [")),
    "picture of gigabytes": ("at most", lambda artifact, canary: (
        file("samples.png", b"\x89PNG\r\n\x1a\n")(artifact, canary), os.truncate(artifact / "samples.png", 2**31))),
    # Descriptions.
    "another format": ("format_version=4", fields(DESCRIPTION, format_version=4)),
    "more chunks than memory": ("captions.chunks=1000000000", fields(DESCRIPTION, captions={"chunks": 10**9})),
    "without weights' hashes": ("weights_sha256", fields(DESCRIPTION, weights_sha256=None)),
    "without the schedule's hash": ("schedule_sha256", fields(DESCRIPTION, schedule_sha256=None)),
    "unknown field": ("evil", fields(DESCRIPTION, evil=1)),
    "unknown method": ("method", fields(DESCRIPTION, method="pickle")),
    "unknown objective": ("objective", fields(DESCRIPTION, objective="evil")),
    "base that is no reference": ("base", fields(DESCRIPTION, base="s3://evil")),
    "sampler setting of another kind": ("sampling", fields(DESCRIPTION, sampling={"steps": "__import__('os')"})),
    "sampler setting that is unknown": ("evil", fields(DESCRIPTION, sampling={"steps": 1, "evil": 1})),
    "no steps": ("steps of at least 1", fields(DESCRIPTION, sampling={"steps": 0})),
    "infinite guidance": ("it holds Infinity", fields(DESCRIPTION, sampling={"guidance": 1e999})),
    "guidance beyond numbers": ("finite numbers", lambda artifact, _: (artifact / DESCRIPTION).write_text(
        (artifact / DESCRIPTION).read_text().replace('"guidance": 3.0', '"guidance": 1e999'))),
    "hash of a file elsewhere": ("says", fields(DESCRIPTION, weights_sha256={"../../../etc/passwd": "a" * 64})),
    "no hashes at all": ("says nothing of it", fields(DESCRIPTION, weights_sha256={})),
    "other weights": (r"has sha256 [0-9a-f]{64}, but diff2flow.json says [0-9a-f]{64}", other_weights),
    "weights of another method": ("is missing", fields(DESCRIPTION, method="lora")),
    "another base": (r"sha256 a{64}, but .* has \w{64}", fields(DESCRIPTION, base={"uri": "", "sha256": "a" * 64})),
    "another schedule": ("does not fit the noise schedule", fields(DESCRIPTION, schedule={"beta_start": 0.1})),
    "another schedule's hash": ("does not fit the noise schedule", fields(DESCRIPTION, schedule_sha256="a" * 64)),
    "another prediction type": ("does not fit the noise schedule", fields(DESCRIPTION, prediction_type="sample")),
    # Sealed, plain, and of no use.
    "tensors left out": ("lacks", lambda artifact, _: save_file({"conv_in.bias": torch.zeros(16)}, artifact / UNET)),
    "no weights": ("has no weights", lambda artifact, _: (artifact / UNET).unlink()),
    "config of another network": ("no network can be made", fields(CONFIG, block_out_channels=[8, 8])),
    "config of no network": ("no network can be made", fields(CONFIG, down_block_types=["os.system", "evil"])),
}  # fmt: skip
PEFT = "adapter/adapter_config.json"
LORA: dict[str, tuple[str, Case]] = {
    "adapter pickle": (PICKLE, file("adapter/adapter_model.bin", pickled)),
    "adapter pickle in place of the weights": (PICKLE, file("adapter/adapter_model.bin", pickled, instead=ADAPTER)),
    "adapter of another kind": ("only LORA is read", fields(PEFT, peft_type="BOFT")),
    "adapter that maps to a module": ("which PEFT imports", fields(PEFT, auto_mapping={"parent_library": "evil"})),
    "adapter with a core module": ("which PEFT imports", fields(PEFT, megatron_core="evil")),
    "adapter with a core config": ("megatron_config", fields(PEFT, megatron_config={"a": 1})),
    "adapter with another initializer": ("sets 'eva_config'", fields(PEFT, eva_config={"rho": 2})),
    "adapter with auto_map": ("'auto_map'", fields(PEFT, auto_map={"AutoModel": "evil.Model"})),
    "adapter with a second weight file": (OTHER, file("adapter/other.safetensors", b"")),
    "adapter without config": ("no network can be made", lambda artifact, _: (artifact / PEFT).unlink()),
    "adapter of other layers": ("no network can be made", fields(PEFT, target_modules=["no_such_layer"])),
    "adapter of another rank": ("no network can be made", fields(PEFT, r=3)),
}
CASES = {
    **{name: ("full", *case) for name, case in FULL.items()},
    **{name: ("lora", *case) for name, case in LORA.items()},
}
UNSEALED = {"other weights"}
"""Cases under the old hashes."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact of each method, and their base."""
    directory = tmp_path_factory.mktemp("artifacts")
    base = write_tiny_base(directory / "base")
    trained(base, directory / "full")
    trained(base, directory / "lora", LoraConfig(rank=2))
    return directory


def outside(artifact: Path) -> set[Path]:
    return {place for place in artifact.parent.rglob("*") if not place.is_relative_to(artifact)}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_artifact_is_refused_in_one_line_and_does_nothing(artifacts: Path, tmp_path: Path, name: str) -> None:
    method, rule, damage = CASES[name]
    artifact, canary = tmp_path / "artifact", tmp_path / "canary"
    shutil.copytree(artifacts / method, artifact)
    description = (artifact / DESCRIPTION).read_bytes()
    damage(artifact, canary)
    place = artifact / DESCRIPTION
    untouched = place.is_file() and not place.is_symlink() and place.read_bytes() == description
    if untouched and name not in UNSEALED:
        write_description(artifact, json.loads(description))
    before = outside(artifact)
    for look in (describe_model, load_model):  # what a check on the head says is what an actor would say
        with pytest.raises(ArtifactError, match=rule) as caught:
            look(str(artifact), base_uri=str(artifacts / "base"))
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
        assert not canary.exists() and outside(artifact) == before


def test_the_same_artifacts_unharmed_are_loaded_with_everything_that_may_lie_beside_them(
    artifacts: Path, tmp_path: Path
) -> None:
    for method in ("full", "lora"):
        artifact = tmp_path / method
        shutil.copytree(artifacts / method, artifact)
        for name, content in {
            "README.md": "# Card\n", "config.yaml": "a: &x [1]\nb: *x\n", "LICENSE": "Apache-2.0\n",
            "tokenizer/vocab.json": '{"auto_map": 1}', "scheduler/scheduler_config.json": '{"_class_name": "A"}',
        }.items():  # fmt: skip
            file(name, content.encode())(artifact, tmp_path)
        file("samples.png", b"\x89PNG\r\n\x1a\n")(artifact, tmp_path)
        check_files(artifact)
        assert load_model(str(artifact)).objective == "diff2flow"
    assert len(CASES) >= 60


def test_a_system_can_name_its_own_layout(tmp_path: Path):
    (tmp_path / "student.json").write_text('{"width": 4}')
    with pytest.raises(ArtifactError, match=r"'student\.json' is no file of an artifact's layout"):
        check_files(tmp_path)
    layout = [(re.compile(r"student\.json"), plain_json)]
    check_files(tmp_path, layout)
    (tmp_path / "student.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    with pytest.raises(ArtifactError, match="auto_map"):
        check_files(tmp_path, layout)
