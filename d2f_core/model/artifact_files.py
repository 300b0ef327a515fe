"""Checks which files an artifact's directory holds, before any is loaded, parsed by a library or hashed.

An artifact may come from anybody: a registry, a bucket, a download. So only files of the known layout pass: JSON that
makes no library import code, safetensors whose header fits their bytes, a card, a picture and a plain YAML file. No
pickle, archive, script, link or special file passes, even if nothing would have read it.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from d2f_core.model.plain_json import NotPlainError, entries, parse
from d2f_core.model.safetensors_header import HeaderError, read_header
from d2f_core.retry import one_line

MB = 2**20
MAX_ENTRIES = 256
"""Most files and directories in one artifact."""
MAX_CONFIG_BYTES, MAX_VOCABULARY_BYTES, MAX_PICTURE_BYTES = 2 * MB, 64 * MB, 32 * MB
MAX_YAML_BYTES = MB // 4
"""Largest YAML file in bytes; smaller than for JSON, because YAML is parsed in Python."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

PICKLE = "is a pickle, which runs code when it is loaded. Convert the weights to safetensors and delete it"
ARCHIVE = "is an archive, whose contents nobody has checked. Delete it"
SCRIPT = "is code. An artifact holds data alone; delete it"
OTHER_WEIGHTS = "is weights in a format that is not read here. Delete it"
REASONS = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".dill"), PICKLE),
    **dict.fromkeys((".h5", ".keras", ".pb", ".onnx", ".msgpack", ".gguf"), OTHER_WEIGHTS),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".zst", ".whl", ".egg", ".jar"), ARCHIVE),
    **dict.fromkeys((".py", ".pyc", ".pyd", ".so", ".dll", ".sh", ".exe", ".js", ".ipynb", ".bat"), SCRIPT),
}  # fmt: skip
NAMED: dict[str, str] = dict.fromkeys(
    ("adapter_config.json", "adapter_model.safetensors"),
    "belongs to an export for PEFT, which PeftModel.from_pretrained reads. Give the model that it was exported from",
)
"""File name -> why it is refused, where the name says more than its ending."""
CODE_KEYS = {
    "auto_map": "transformers", "auto_mapping": "PEFT", "custom_pipeline": "diffusers", "custom_pipelines": "diffusers",
    "loader_module": "MLflow", "model_code_path": "MLflow", "python_model": "MLflow", "_target_": "Hydra",
    "megatron_config": "PEFT", "quantization_config": "diffusers", "trust_remote_code": "transformers",
    "library": "diffusers", "library_name": "a hub", "__class__": "an unpickler", "__module__": "an unpickler",
    "__reduce__": "an unpickler",
}  # fmt: skip
"""Config keys that make a library import or fetch code -> that library."""
MODEL_LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion", "d2f_core.model.diffusers_scheduler")
"""Libraries whose classes model_index.json may name; `stable_diffusion` is diffusers' own package of that pipeline."""
UNET_CLASS = "UNet2DConditionModel"
AUTO_MAPPING = {"base_model_class": UNET_CLASS, "parent_library": "diffusers.models.unets.unet_2d_condition"}
"""The only `auto_mapping` that passes, as PEFT writes it for these UNets: AutoPeftModel imports the library it
names."""


Layout = Sequence[tuple[re.Pattern[str], Callable[[Path], object]]]
"""Pattern of whole relative file names -> function that checks such a file, and raises when it is not plain data; the
first match decides."""


class ArtifactError(ValueError):
    """A model directory that cannot be used, with the reason and the fix."""


def check_files(directory: Path, layout: Layout | None = None) -> None:
    """Refuse a directory that holds anything but the plain data of an artifact.

    Args:
        layout: which files pass, and the check of each; None: the layout of a diffusion model.

    Raises:
        ArtifactError: one line with the file, the rule and the fix.
    """
    layout = LAYOUT if layout is None else layout
    for name in sorted(_walk(directory)):
        check = next((check for pattern, check in layout if pattern.fullmatch(name)), None)
        if check is None:
            by_suffix = REASONS.get(PurePosixPath(name).suffix.lower(), "is no file of an artifact's layout. Delete it")
            reason = NAMED.get(name, by_suffix)
            raise ArtifactError(f"{_shown(directory)}: {name!r} {reason}.")
        try:
            check(directory / name)
        except _Refusal as refusal:
            raise ArtifactError(f"{_shown(directory)}: {name!r} {one_line(refusal, 600)}") from None


class _Refusal(Exception):
    """Why a file is refused: the rule and the fix, which follow the file's name in the message."""


def _shown(directory: Path) -> str:
    return repr(str(directory))


def _walk(directory: Path) -> Iterator[str]:
    """Relative names of the directory's regular files; links are not followed."""
    left, entries = [directory], 0
    while left:
        with os.scandir(left.pop()) as found:
            for entry in found:
                entries += 1
                name = Path(entry.path).relative_to(directory).as_posix()
                if entries > MAX_ENTRIES:
                    raise ArtifactError(
                        f"{_shown(directory)}: more than {MAX_ENTRIES} files and directories. Delete what is not of "
                        "the artifact."
                    )
                if _is_part(entry, name, directory):
                    left.append(Path(entry.path))
                else:
                    yield name


def _is_part(entry: os.DirEntry[str], name: str, directory: Path) -> bool:
    """Whether an entry is one of the layout's directories; False for a regular file."""
    status = entry.stat(follow_symlinks=False)
    rule = None
    if stat.S_ISDIR(status.st_mode):
        if PARTS.fullmatch(name):
            return True
        rule = "is no directory of an artifact's layout. Delete it."
    elif stat.S_ISLNK(status.st_mode):
        rule = "is a symbolic link, which may lead anywhere. Put the file itself there."
    elif not stat.S_ISREG(status.st_mode):
        rule = "is neither a regular file nor a directory. Delete it."
    elif status.st_nlink != 1:
        rule = f"is a hard link: the file has {status.st_nlink} names. Copy it."
    if rule:
        raise ArtifactError(f"{_shown(directory)}: {name!r} {rule}")
    return False


def _limited(file: Path, limit: int) -> Path:
    size = file.stat().st_size
    if size > limit:
        raise _Refusal(f"has {size:,} bytes; at most {limit:,} are read. Take it from the original model.")
    return file


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        return parse(data)
    except NotPlainError as error:
        raise _Refusal(str(error)) from None


def plain_json(file: Path) -> dict[str, Any]:
    """Read a JSON config, and refuse one that makes a library import code."""
    content = _parsed(_limited(file, MAX_CONFIG_BYTES).read_bytes())
    if file.name == "adapter_config.json":
        _check_adapter(content)
        content.pop("auto_mapping", None)
    for key, value, _ in entries(content):
        if key in CODE_KEYS and value not in (None, False):
            raise _Refusal(f"has the key {key!r}, by which {CODE_KEYS[key]} imports code. Remove it.")
        if key == "_class_name" and not (isinstance(value, str) and value.isidentifier()):
            raise _Refusal(f"has _class_name={value!r}, which is no plain class name. Take diffusers' own class.")
    return content


def _check_adapter(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _Refusal(f"has peft_type={config.get('peft_type')!r}; only LORA is read. Train a LoRA.")
    if config.get("auto_mapping") not in (None, AUTO_MAPPING):
        raise _Refusal(f"has auto_mapping={config['auto_mapping']!r}, which PEFT imports. Set it to null.")
    if config.get("megatron_core") not in (None, "megatron.core"):
        raise _Refusal(f"has megatron_core={config['megatron_core']!r}, which PEFT imports. Set it to null.")
    if strange := [key for key, value in config.items() if key.endswith("_config") and value]:
        raise _Refusal(f"sets {strange[0]!r}, which no LoRA of this project uses. Set it to null.")


def _unet_config(file: Path) -> None:
    if (name := plain_json(file).get("_class_name")) != UNET_CLASS:
        raise _Refusal(f"has _class_name={name!r}; only {UNET_CLASS} is loaded. Take the UNet's own config.")


def _model_index(file: Path) -> None:
    for name, entry in plain_json(file).items():
        if isinstance(entry, list) and (len(entry) != 2 or entry[0] not in MODEL_LIBRARIES):
            raise _Refusal(f"takes {name[:60]!r} from {str(entry)[:120]}; known are {MODEL_LIBRARIES[1:]}. Correct it.")


def _index(file: Path) -> None:
    shards = plain_json(file).get("weight_map")
    if not isinstance(shards, dict):
        raise _Refusal("has no weight_map. Take it from the original model.")
    for shard in set(map(str, shards.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard) or not (file.parent / shard).is_file():
            raise _Refusal(
                f"names the shard {shard!r}, which is no safetensors file beside it. Copy the weights again."
            )


def plain_weights(file: Path) -> None:
    """Check that a safetensors file's header is within the limit and accounts for every byte after it."""
    try:
        read_header(file)
    except HeaderError as error:
        raise _Refusal(str(error)) from None


def _vocabulary(file: Path) -> None:
    _limited(file, MAX_VOCABULARY_BYTES)  # its keys are tokens, so they are not checked as config keys


def plain_text(file: Path, limit: int = MAX_CONFIG_BYTES) -> str:
    try:
        return _limited(file, limit).read_bytes().decode()
    except UnicodeDecodeError:
        raise _Refusal("is not UTF-8 text. Delete it.") from None


def plain_yaml(file: Path) -> None:
    events = yaml.parse(plain_text(file, MAX_YAML_BYTES), yaml.SafeLoader)
    try:
        tags = [tag for event in events if (tag := getattr(event, "tag", None))]
    except yaml.YAMLError as error:
        raise _Refusal(f"is not YAML ({error}). Delete it.") from None
    if tags:
        raise _Refusal(f"has the tag {tags[0]!r}, by which YAML makes objects. Write plain values.")


def plain_png(file: Path) -> None:
    with _limited(file, MAX_PICTURE_BYTES).open("rb") as handle:
        signature = handle.read(len(PNG_SIGNATURE))
    if signature != PNG_SIGNATURE:
        raise _Refusal("is no PNG. Delete it.")


BASE_PART = r"(unet|vae|text_encoder(_2)?|tokenizer(_2)?|scheduler|feature_extractor|image_encoder|safety_checker)"
PARTS = re.compile(rf"adapter|{BASE_PART}")
LAYOUT: Layout = tuple(
    (re.compile(pattern), check)
    for pattern, check in (
        (r"diff2flow\.json|adapter/adapter_config\.json", plain_json),
        (r"adapter/adapter_model\.safetensors", plain_weights),
        (r"unet/config\.json", _unet_config),
        (r"model_index\.json", _model_index),
        (rf"{BASE_PART}/[\w.-]+\.safetensors\.index\.json", _index),
        (rf"{BASE_PART}/[\w.-]+\.safetensors", plain_weights),
        (r"tokenizer(_2)?/((vocab|tokenizer|added_tokens)\.json|[\w.-]+\.(txt|model))", _vocabulary),
        (rf"{BASE_PART}/[\w-]+\.json", plain_json),
        (r"(adapter/)?README\.md|LICENSE", plain_text),
        (r"samples\.png", plain_png),
        (r"config\.yaml", plain_yaml),
    )
)
"""Files of a diffusion model's artifact; the base's parts occur in exported diffusers directories, which are artifacts
too."""
