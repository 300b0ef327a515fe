"""What a safetensors file says about itself: how to sample it, and what other programs ask for. All values are strings.

| prefix       | set by            | read by                                            |
|--------------|-------------------|----------------------------------------------------|
| `d2f_`       | this project      | this project, and whoever wants to sample as it does |
| `ss_`        | kohya's sd-scripts | A1111, Forge, SwarmUI, to name and sort LoRA files |
| `modelspec.` | Stability AI's ModelSpec | SwarmUI, ComfyUI's model lists               |
"""

import json
from collections.abc import Mapping
from typing import Any

from d2f_core.model.base import BaseModel, is_sdxl
from d2f_core.model.diffusers_layout import read_json
from d2f_core.model.diffusers_scheduler import SCHEDULE_FIELDS
from d2f_core.model.sampling import SCHEDULERS

WIDTH_V1, WIDTH_V2 = 768, 1024
"""Width of the text states of SD 1.5 and of SD 2."""
PREDICTIONS = {"v_prediction": "v"}
"""Prediction type -> its name in ModelSpec, where the two differ."""


def sampling_metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """How to sample a trained model, and the hash of the base that it was trained on.

    Args:
        description: the model's checked `diff2flow.json`.
    """
    sampling, schedule = description["sampling"], description["schedule"]
    return {
        "d2f_format_version": str(description["format_version"]),
        "d2f_objective": description["objective"],
        "d2f_prediction_type": description["prediction_type"],
        "d2f_sampler": sampling["solver"] if sampling["solver"] in SCHEDULERS else f"{sampling['solver']} in flow time",
        "d2f_steps": str(sampling["steps"]),
        "d2f_guidance": str(sampling["guidance"]),
        "d2f_shift": str(sampling.get("shift", 1.0)),
        "d2f_time_grid": sampling.get("time_grid", "uniform"),
        "d2f_time_convention": description["time_convention"],
        "d2f_schedule": json.dumps({name: schedule[name] for name in SCHEDULE_FIELDS if name in schedule}),
        "d2f_base_sha256": description["base"]["sha256"],
    }


def adapter_metadata(base: BaseModel, title: str, size: tuple[int, int]) -> dict[str, str]:
    """What other programs ask a LoRA file: family of its base, prediction type, image size.

    A base of no known family gets neither a family nor an architecture.

    Args:
        size: height and width in pixels of the model's images.
    """
    prediction = base.prediction_type
    common = {
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{size[1]}x{size[0]}",
        "modelspec.prediction_type": PREDICTIONS.get(prediction, prediction),
    }
    return {**common, **family(read_json(base.path / "unet/config.json"), v=prediction == "v_prediction")}


def family(unet: Mapping[str, Any], *, v: bool) -> dict[str, str]:
    """The base's family in sd-scripts' and in ModelSpec's words; empty for another."""
    width = unet.get("cross_attention_dim")
    if is_sdxl(unet):
        name, second, architecture = "sdxl_base_v1-0", False, "stable-diffusion-xl-v1-base"
    elif width == WIDTH_V1:
        name, second, architecture = "sd_v1_v" if v else "sd_v1", False, "stable-diffusion-v1"
    elif width == WIDTH_V2:
        name, second = ("sd_v2_v" if v else "sd_v2"), True
        architecture = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
    else:
        return {}
    return {
        "ss_base_model_version": name, "ss_v2": str(second), "modelspec.architecture": f"{architecture}/lora",
    }  # fmt: skip
