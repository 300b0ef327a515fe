"""What other programs ask the metadata of a LoRA file, in kohya's words (`ss_`) and in ModelSpec's (`modelspec.`).

sd-scripts, A1111, Forge and SwarmUI name and sort files by them. How to sample is told by `sampling_metadata`.
"""

from collections.abc import Mapping
from typing import Any

from d2f_core.model.base import BaseModel, is_sdxl
from d2f_core.model.diffusers_layout import read_json
from d2f_core.objective.schedule import FLOW_PREDICTION

WIDTH_V1, WIDTH_V2 = 768, 1024
"""Width of the text states of SD 1.5 and of SD 2."""
PREDICTIONS = {"v_prediction": "v", "sample": "x0", FLOW_PREDICTION: "sd3"}
"""Prediction type -> its name in ModelSpec, where the two differ; by `sd3` SwarmUI knows rectified flows."""


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
