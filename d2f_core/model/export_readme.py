"""README.md of an exported diffusers directory: a model card's head, and how to load and sample it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from d2f_core.model.artifact import TrainedModel
from d2f_core.model.base import BaseModel, is_sdxl
from d2f_core.model.caption_rules import DEFAULT, told_to_others
from d2f_core.model.diffusers_layout import read_json
from d2f_core.model.diffusers_scheduler import Diff2FlowScheduler

LICENCE = ("license", "license_name", "license_link")
UNKNOWN_LICENCE = {"license": "other", "license_name": "that-of-the-base-model"}
LOADING = """\
```python
{imports}from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this directory"{missing})
pipeline({inputs}, num_inference_steps={steps}, guidance_scale={guidance})
```"""
WITHOUT_PACKAGE = """\
## Without the package diff2flow-ray

Where the package is installed, `python -m pipelines.export scheduler --output diff2flow_scheduler.py` writes the
scheduler as one file, which needs torch and diffusers alone. With that file beside your program,
`import diff2flow_scheduler` in place of the first line above gives the same images.

With diffusers alone (0.33 or newer), DDIM samples it:

```python
from diffusers import DDIMScheduler, DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this directory", scheduler=None{missing})
pipeline.scheduler = DDIMScheduler.from_pretrained(
    "this directory",
    subfolder="scheduler",
    timestep_spacing="trailing",
    clip_sample=False,
    set_alpha_to_one=True,
)
```

Its images differ. DDIM, as every stock scheduler, begins at the last trained noise level and takes pure noise for
it, so very dark and very bright images come out nearer to grey, with any number of steps. From that level on, a step
of DDIM is a step along the flow."""
FLOW = """\
The UNet is called with the flow state at timestep {count} (1 - t) and puts out noise - data, which is what other
programs mean by a rectified-flow model. The scheduler is diffusers' own (0.32 or newer): its DPM-Solver of first order
takes Euler steps along the flow, at rounded timesteps. On a tiny network its latents lie up to 0.7 % of their size (4
steps) or 0.3 % (10 and 25 steps) from those of `pipelines.generate`. They are equal with diff2flow-ray's own scheduler,
which `python -m pipelines.export scheduler --output diff2flow_scheduler.py` writes as one file:

```python
from diff2flow_scheduler import Diff2FlowScheduler

pipeline.scheduler = Diff2FlowScheduler.from_config(pipeline.scheduler.config)
```"""
CAPTIONS = """\
## Prompts

{told}

The package diff2flow-ray encodes prompts as in training:

```python
from d2f_core.model.artifact import describe_model
from d2f_core.model.text_encoder import load_text_encoder

encoder = load_text_encoder(describe_model("this directory").base)
given, empty = encoder.condition([prompt]), encoder.condition([""])
pipeline({arguments})
```"""
EMBEDDINGS = {
    "text_states": ("prompt_embeds", "negative_prompt_embeds"),
    "pooled_text": ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
}
"""Part of a condition -> the arguments of diffusers' pipelines, for the prompt and for the empty one."""
MERGED = """\
The UNet holds the trained adapter. The LoRA file or PEFT directory of the same model, put on this pipeline, would count
twice."""


def readme(model: TrainedModel, base: Mapping[str, str], loading: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        base: `uri` and `sha256` of the base model.
        loading: `import` (module that a program must import, or None), `scheduler` (class) and `missing` (part ->
            reason).
    """
    missing = loading["missing"]
    inputs = "prompt_embeds=states, negative_prompt_embeds=empty_states" if "text_encoder" in missing else "prompt"
    arguments = "".join(f", {name}=None" for name in sorted(missing))
    kind = "rectified-flow" if model.puts_out_velocity else "Diff2Flow" if loading["import"] else "diffusion"
    sections = [
        _head(model.base, base["uri"]),
        f"# A {kind} model in diffusers' layout",
        LOADING.format(
            imports=f"import {loading['import']}  # from the package diff2flow-ray\n" if loading["import"] else "",
            missing=arguments,
            inputs=inputs,
            steps=model.sampling.steps,
            guidance=model.sampling.guidance,
        ),
        _solver(model, loading["scheduler"]),
        WITHOUT_PACKAGE.format(missing=arguments) if loading["import"] else "",
        FLOW.format(count=model.schedule.num_timesteps) if model.puts_out_velocity else "",
        _captions(model.base),
        _missing(missing),
        f"Trained from {base['uri']}, whose files have sha256 {base['sha256']}; diff2flow.json says how.",
        MERGED if model.method == "lora" else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(base: BaseModel, name: str) -> str:
    """The YAML block that model hubs read."""
    hub = {"base_model": name} if name.count("/") == 1 else {}
    told = {"library_name": "diffusers", "pipeline_tag": "text-to-image", **hub}
    return f"---\n{yaml.safe_dump({**_licence(base.path), **told}, sort_keys=False)}---"


def _licence(base: Path) -> dict[str, str]:
    """What the base's own README.md says of its licence."""
    text = (base / "README.md").read_text() if (base / "README.md").is_file() else ""
    block = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
    try:
        fields = yaml.safe_load(block)
    except yaml.YAMLError:  # no hub can read such a card either
        fields = None
    given = {name: str(fields[name]) for name in LICENCE if name in fields} if isinstance(fields, dict) else {}
    return given or UNKNOWN_LICENCE


def _solver(model: TrainedModel, scheduler: str) -> str:
    """What the scheduler does otherwise than the model's own settings."""
    own, told = scheduler == Diff2FlowScheduler.__name__, []
    if model.sampling.solver != "euler" and (own or model.puts_out_velocity):
        told += [f"Its own solver is {model.sampling.solver}; the scheduler takes Euler steps, one evaluation each."]
    if model.sampling.time_grid != "uniform" and not own:
        told += [f"Its own flow times are a {model.sampling.time_grid} grid; the scheduler's are even."]
    return "\n".join(told)


def _captions(base: BaseModel) -> str:
    """How prompts must be read where a stock pipeline reads them otherwise."""
    if base.captions == DEFAULT:
        return ""
    parts = (
        EMBEDDINGS if is_sdxl(read_json(base.path / "unet/config.json")) else {"text_states": EMBEDDINGS["text_states"]}
    )
    names = [
        f'{name}={value}["{part}"]'
        for part, both in parts.items()
        for name, value in zip(both, ("given", "empty"), strict=True)
    ]
    return CAPTIONS.format(told=told_to_others(base.captions), arguments=", ".join(names))


def _missing(parts: Mapping[str, str]) -> str:
    told = "Not in this directory; give these parts yourself, or the embeddings that they would make:\n\n"
    return told + "\n".join(f"- `{name}`: {reason}" for name, reason in parts.items()) if parts else ""
