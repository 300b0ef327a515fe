"""How to sample a trained model, as metadata of a single safetensors file: strings by names with the prefix `d2f_`."""

import json
from collections.abc import Mapping
from typing import Any

from d2f_core.model.caption_rules import DEFAULT, CaptionRules, read_rules, told_to_others
from d2f_core.model.diffusers_scheduler import SCHEDULE_FIELDS
from d2f_core.model.sampling import SCHEDULERS


def sampling_metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a model's description (`diff2flow.json`) that a program needs to sample the model as this project
    does.
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
        "d2f_time_grid": str(sampling.get("time_grid", "uniform")),
        "d2f_time_convention": description["time_convention"],
        "d2f_schedule": json.dumps({name: schedule[name] for name in SCHEDULE_FIELDS if name in schedule}),
        "d2f_base_sha256": description["base"]["sha256"],
        **_caption_metadata(read_rules(description)),
    }


def _caption_metadata(rules: CaptionRules) -> dict[str, str]:
    """How captions are read, and the same in words where programs show a hint of use; nothing if as everywhere."""
    if rules == DEFAULT:
        return {}
    return {
        "d2f_caption_chunks": str(rules.chunks),
        "d2f_clip_skip": str(rules.clip_skip),
        "modelspec.usage_hint": told_to_others(rules),
    }
