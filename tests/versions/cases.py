"""A tiny trained model in each layout that is exported, and what this project computes with it.

A layout is one function that returns cases; add it to `LAYOUTS`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2f_core import storage
from d2f_core.flow.generate.sampler import ImageSampler, fill_request
from d2f_core.flow.publish.job import loader_of
from d2f_core.model.artifact import load_model
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig
from d2f_core.model.denoiser import as_denoiser, load_unet
from d2f_core.model.diffusers_scheduler import Diff2FlowScheduler
from d2f_core.model.export import export_diffusers
from d2f_core.model.export_adapter import export_peft, export_single_file_lora
from d2f_core.model.sampling import sample_latents
from d2f_core.model.single_file.write import write_checkpoint_file
from d2f_core.model.single_file_lora import merge_single_file_lora, read_single_file_lora
from d2f_core.model.standalone_scheduler import standalone_scheduler
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.tracking.pyfunc_files import MODEL_PART, write_pyfunc
from tests.model.artifacts import trained
from tests.model.tiny_sd import write_tiny
from tests.versions.environments import ENVIRONMENTS, MLFLOW

PACKAGE = str(Path(__file__).parents[2])
DIFFUSERS = tuple(name for name in ENVIRONMENTS if name != MLFLOW)
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
PROMPTS = ["a cat", "dog"]
SETTINGS = {"num_inference_steps": 4, "guidance_scale": 3.0}


@dataclass(frozen=True, kw_only=True)
class Unread:
    """Why an environment does not read an export."""

    reason: str
    error: str
    """Regular expression of the message by which it says so."""


NO_BIAS = {"diffusers 0.30": Unread(reason="knows no bias in a LoRA", error="^IndexError: tuple index out of range")}
NO_FLOW = {
    "diffusers 0.30": Unread(
        reason="its DPM-Solver knows no flow_prediction",
        error="prediction_type given as flow_prediction must be one of",
    )
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One export, how another program opens it, and what comes of it."""

    name: str
    """What is opened, as the table shows it."""
    reader: str
    """A function of `tests.versions.opening`."""
    arguments: Mapping[str, Any]
    expected: Tensor
    """What this project computes."""
    within: float = 1e-4
    """Largest difference that counts as equal, as a share of the largest expected value: releases round otherwise."""
    refused: str = ""
    """Regular expression of the message, if it cannot be opened."""
    unread_in: Mapping[str, Unread] = field(default_factory=dict)
    """By environment."""
    environments: Sequence[str] = DIFFUSERS


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where the exports are written, with the base and the inputs that all of them share."""

    directory: Path
    base: Path
    inputs: Mapping[str, Tensor]

    @property
    def shared(self) -> dict[str, str]:
        return {"base": str(self.base), "inputs": str(self.directory / "inputs.safetensors")}

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def trained(self, name: str, lora: LoraConfig | None = None, objective: str = "diff2flow") -> str:
        """A new model, trained by hand."""
        return trained(self.base, self.directory / name, lora, objective)

    def answer(self, model_uri: str) -> Tensor:
        """The answer of a model's network to the inputs."""
        return self.answer_of(load_model(model_uri).network)

    @torch.no_grad()
    def answer_of(self, network: nn.Module) -> Tensor:
        given = self.inputs
        return as_denoiser(network)(given["x"], given["timestep"], text_states=given["states"])

    def latents(self, model_uri: str) -> Tensor:
        """The latents that this project's sampler makes of the prompts, by Euler steps."""
        model = load_model(model_uri)
        encode = load_text_encoder(model.base).encode
        texts = encode(PROMPTS), encode([""] * len(PROMPTS))
        guidance, steps = SETTINGS["guidance_scale"], int(SETTINGS["num_inference_steps"])
        return sample_latents(model, self.inputs["noise"], *texts, solver="euler", steps=steps, guidance=guidance)[0]


def workshop(directory: Path) -> Workshop:
    """Write base and inputs; SD 1.5 with all parts, of 64 px images."""
    base, generator = write_tiny(directory / "base", "sd15"), torch.Generator().manual_seed(0)
    (base / "model_index.json").write_text(json.dumps(INDEX))
    width = load_model(str(base)).network.config["cross_attention_dim"]
    inputs = {
        "x": torch.randn(2, 4, 8, 8, generator=generator),
        "noise": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10.0, 700.0]),
        "states": torch.randn(2, 77, width, generator=generator),
    }
    save_file(inputs, directory / "inputs.safetensors")
    return Workshop(directory=directory, base=base, inputs=inputs)


def _pipeline(shop: Workshop) -> list[Case]:
    model, target = shop.trained("model"), shop.path("pipeline")
    export_diffusers(model, target)
    given = {**shop.shared, "path": target, "prompts": PROMPTS, "settings": SETTINGS}
    file = Path(shop.path("scheduler"), "diff2flow_scheduler.py")
    storage.write_bytes(str(file), standalone_scheduler().encode())
    package = {"package": PACKAGE, "module": Diff2FlowScheduler.__module__}
    one_file = {"package": str(file.parent), "module": file.stem}
    latents, name, reader = shop.latents(model), "diffusers directory", "pipeline_directory"
    return [
        Case(name=f"{name}: the UNet", reader="unet_directory", arguments=given, expected=shop.answer(model)),
        Case(name=f"{name} alone", reader=reader, arguments=given, expected=latents, refused=r"d2f_core"),
        Case(name=f"{name}, with the scheduler's file", reader=reader, arguments=given | one_file, expected=latents),
        Case(name=f"{name}, with this package", reader=reader, arguments=given | package, expected=latents),
    ]


def _rectified_flow(shop: Workshop) -> list[Case]:
    model, target = shop.trained("naive", objective="flow_matching"), shop.path("flow-pipeline")
    export_diffusers(model, target)
    given = {**shop.shared, "path": target, "prompts": PROMPTS, "settings": SETTINGS}
    name, latents = "rectified flow, diffusers directory", shop.latents(model)
    # diffusers starts at 0.9997 of the noise and rounds timesteps.
    return [
        Case(name=name, reader="pipeline_directory", arguments=given, expected=latents, within=0.01, unread_in=NO_FLOW)
    ]


def _peft(shop: Workshop) -> list[Case]:
    model, target = shop.trained("small", LoraConfig(preset="small")), shop.path("peft")
    export_peft(model, target)
    given = {**shop.shared, "path": target}
    return [Case(name="PEFT directory", reader="peft_directory", arguments=given, expected=shop.answer(model))]


def _lora(shop: Workshop) -> list[Case]:
    cases = []
    for preset in ("attention", "base", "small"):
        model = shop.trained(f"lora-{preset}", LoraConfig(preset=preset))
        file = export_single_file_lora(model, shop.path(f"{preset}.safetensors"))
        given, name = {**shop.shared, "files": [file.target]}, f"LoRA file, preset {preset}"
        merged = load_unet(resolve_base(str(shop.base)))
        merge_single_file_lora(merged, read_single_file_lora(Path(file.target)))
        alone = shop.answer_of(merged)
        cases.append(Case(name=name, reader="lora_files", arguments=given, expected=alone))
        if file.ends_target:
            both = {**given, "files": [file.target, file.ends_target]}
            name, whole = f"{name}, and its second file", shop.answer(model)
            cases.append(Case(name=name, reader="lora_files", arguments=both, expected=whole, unread_in=NO_BIAS))
    return cases


def _checkpoint(shop: Workshop) -> list[Case]:
    model, target = shop.trained("whole"), shop.path("whole.safetensors")
    write_checkpoint_file(model, target, dtype="float32")
    texts = load_text_encoder(resolve_base(str(shop.base))).encode(PROMPTS)
    expected = torch.cat([shop.answer(model).flatten(), texts.flatten()])
    given = {**shop.shared, "path": target, "prompts": PROMPTS}
    return [Case(name="single-file checkpoint", reader="checkpoint_file", arguments=given, expected=expected)]


def _mlflow(shop: Workshop) -> list[Case]:
    model, target = shop.trained("registered", LoraConfig(rank=2)), Path(shop.path("version"))
    write_pyfunc(target, loader_of("text_to_image"), {}, model_bytes=0, run_id="0" * 32, model_id="m-0")
    storage.upload_tree(Path(model), str(target / MODEL_PART))
    rows = [{"prompt": prompt, "seed": 3, "num_inference_steps": 3} for prompt in PROMPTS]
    sampler = ImageSampler(load_model(model))
    requests = [fill_request(sampler.model, prompt=prompt, seed=3, steps=3) for prompt in PROMPTS]
    pixels = torch.from_numpy(
        np.stack([image.pixels for image in sampler.sample(requests) if image.pixels is not None])
    )
    given, where = {"path": str(target), "rows": rows}, (MLFLOW,)
    return [
        Case(
            name="MLflow model without this project", reader="mlflow_model", arguments=given, expected=pixels,
            refused=r"the package diff2flow-ray.*requirements\.txt", environments=where,
        ),
        Case(
            name="MLflow model", reader="mlflow_model", arguments={**given, "package": PACKAGE}, expected=pixels,
            environments=where,
        ),
    ]  # fmt: skip


LAYOUTS: Sequence[Callable[[Workshop], list[Case]]] = (
    _pipeline, _rectified_flow, _peft, _lora, _checkpoint, _mlflow,
)  # fmt: skip


def make_cases(directory: Path) -> list[Case]:
    """Export the model in all layouts. The last cases of a layout may import this project."""
    shop = workshop(directory)
    return [case for layout in LAYOUTS for case in layout(shop)]
