"""Names of tensors in the published Stable Diffusion models, for parts that a newer transformers saved.

transformers 5 saves some networks with one prefix less than they were published with. It reads both; older releases
read the published names alone, and fill every other tensor with random numbers and a warning.
"""

import json
import shutil
from pathlib import Path

from d2f_core.safetensors_layout import HEADER_UNIT

PREFIXES = {"CLIPTextModel": ("", "text_model."), "StableDiffusionSafetyChecker": ("vision_model.", "vision_model.")}
"""Class of a part -> how the names begin that miss a prefix, and the prefix."""


def published_name(architecture: str, name: str) -> str:
    """The published name of a tensor of a part of this class."""
    if architecture not in PREFIXES:
        return name
    begin, prefix = PREFIXES[architecture]
    return prefix + name if name.startswith(begin) and not name.startswith(begin + prefix) else name


def with_published_names(part: Path) -> None:
    """Rename the tensors in a part's directory, in files with `architectures` in their config.json."""
    config = part / "config.json"
    architecture = next(iter(json.loads(config.read_text()).get("architectures") or [""])) if config.is_file() else ""
    if architecture not in PREFIXES:
        return
    for file in sorted(part.glob("*.safetensors")):
        _rename(file, architecture)
    for file in sorted(part.glob("*.safetensors.index.json")):
        index = json.loads(file.read_text())
        index["weight_map"] = {published_name(architecture, name): at for name, at in index["weight_map"].items()}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _rename(file: Path, architecture: str) -> None:
    """Rewrite the header of a safetensors file; its tensors are copied as they are."""
    with file.open("rb") as old:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        named = {name: published_name(architecture, name) for name in header if name != "__metadata__"}
        if all(name == published for name, published in named.items()):
            return
        text = json.dumps({named.get(name, name): value for name, value in header.items()}, separators=(",", ":"))
        data = text.encode() + b" " * (-len(text.encode()) % HEADER_UNIT)
        partial = file.with_suffix(".partial")
        with partial.open("wb") as new:
            new.write(len(data).to_bytes(8, "little") + data)
            shutil.copyfileobj(old, new)
    partial.replace(file)
