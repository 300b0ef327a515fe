"""An adapter's directory as any release of PEFT from 0.13 on reads it: config, weights, and how to use them.

PEFT writes each of its settings into adapter_config.json, and a release refuses a setting that is newer than itself,
whatever its value. So settings at their defaults are left out.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from d2f_core.model.diffusers_layout import copy_part, read_json

CONFIG_NAME = "adapter_config.json"
KEPT = ("peft_type", "inference_mode", "r", "lora_alpha", "target_modules")
"""Settings that are written at their defaults too: what a reader wants to know of a LoRA."""


def write_peft(adapter: Path, target: Path, base: str, note: str = "") -> None:
    """Copy an adapter to `target`, its config without defaults, and add README.md.

    Args:
        base: name of the base model for people and for PEFT.
        note: what else README.md tells of how to sample.
    """
    copy_part(adapter, target)
    config = {**plain_config(read_json(adapter / CONFIG_NAME)), "base_model_name_or_path": base}
    (target / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (target / "README.md").write_text(_readme(base) + (f"\n{note}\n" if note else ""))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from PEFT's defaults, and those that every reader needs."""
    defaults = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    changed = {name: value for name, value in config.items() if name in KEPT or value != defaults.get(name, value)}
    return {name: value for name, value in changed.items() if name != "peft_version"}


def public_name(uri: str) -> str:
    """How a base model is called outside this machine: a local path by its last part, anything else as it is."""
    local = Path(uri.removeprefix("file://")).expanduser()
    return local.name if uri.startswith(("/", ".", "~", "file://")) or local.exists() else uri


def _readme(base: str) -> str:
    hub = base.count("/") == 1
    lines = [
        "---",
        "library_name: peft",
        *([f"base_model: {base}"] if hub else []),
        "tags: [lora, text-to-image, flow-matching]",
        "---",
        "# A LoRA in PEFT's layout",
        "",
        "```python",
        "from diffusers import DiffusionPipeline, UNet2DConditionModel",
        "from peft import PeftModel",
        "",
        f'base = "{base}"' + ("" if hub else "  # the directory of the base model"),
        'unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")',
        'unet = PeftModel.from_pretrained(unet, "this directory").merge_and_unload()',
        "pipeline = DiffusionPipeline.from_pretrained(base, unet=unet)",
        "```",
        "",
        "`PeftModel` checks names and shapes. `load_lora_weights` of diffusers does not know the names that PEFT",
        "gives the tensors: it loads nothing of this directory, and says so in the log only. For it, export the layout",
        "`single-file`.",
        "",
        "The adapter belongs on the base model that diff2flow.json names by its hash. The merged export (layout",
        "`diffusers`) holds it already; there it would count twice. diff2flow.json also says how to sample.",
    ]
    return "\n".join(lines) + "\n"
