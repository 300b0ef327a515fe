"""Runs in another environment: opens exports with what is installed there, and says how far outputs are from ours.

    python -I opening.py CASES.json

It prints one line of JSON per case: `difference`, the largest one to the expected tensor, or `error`, the message. It
imports nothing of this project but what a case names as its `package`.
"""

import importlib
import io
import json
import sys
import warnings

import torch
from safetensors.torch import load_file


def pipeline_directory(case):
    """Latents that the directory's pipeline makes of prompts."""
    from diffusers import DiffusionPipeline

    if case.get("package"):
        sys.path.insert(0, case["package"])
        importlib.import_module(case["module"])
    return _latents(DiffusionPipeline.from_pretrained(case["path"]), case)


def unet_directory(case):
    """The answer of the directory's network alone."""
    return _answer(_unet(case["path"]), case)


def peft_directory(case):
    from peft import PeftModel

    return _answer(PeftModel.from_pretrained(_unet(case["base"]), case["path"]), case)


def lora_files(case):
    """The answer of the base's network with each file loaded as an adapter, all of them active."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline

    vae = AutoencoderKL.from_pretrained(case["base"], subfolder="vae")
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        **parts, vae=vae, unet=_unet(case["base"]), scheduler=EulerDiscreteScheduler(), requires_safety_checker=False
    )
    names = []
    for number, file in enumerate(case["files"]):
        names.append(f"adapter{number}")
        pipeline.load_lora_weights(file, adapter_name=names[-1])
    pipeline.set_adapters(names)
    return _answer(pipeline.unet, case)


def checkpoint_file(case):
    """The answer of a single-file checkpoint's network, and what its text encoder makes of prompts."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_single_file(
        case["path"], config=case["base"], local_files_only=True, safety_checker=None
    )
    texts, _ = pipeline.encode_prompt(case["prompts"], "cpu", 1, False)
    return torch.cat([_answer(pipeline.unet, case).flatten(), texts.flatten()])


def mlflow_model(case):
    """Pixels of the images that MLflow's loader draws."""
    import mlflow.pyfunc
    import numpy
    import pandas
    from PIL import Image

    if case.get("package"):
        sys.path.insert(0, case["package"])
    images = mlflow.pyfunc.load_model(case["path"]).predict(pandas.DataFrame(case["rows"]))
    return torch.stack([torch.from_numpy(numpy.array(Image.open(io.BytesIO(image)))) for image in images])


def _unet(path):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(path, subfolder="unet")


@torch.no_grad()
def _answer(unet, case):
    given = load_file(case["inputs"])
    return unet(given["x"], given["timestep"], encoder_hidden_states=given["states"]).sample


@torch.no_grad()
def _latents(pipeline, case):
    pipeline.set_progress_bar_config(disable=True)
    given = load_file(case["inputs"])
    return pipeline(case["prompts"], latents=given["noise"], output_type="latent", **case["settings"]).images


def main(cases):
    warnings.simplefilter("ignore")
    for case in cases:
        said = {"case": case["name"]}
        try:
            found, wanted = globals()[case["reader"]](case), load_file(case["expected"])["expected"]
            said["difference"] = (found.float() - wanted.float()).abs().max().item()
        except Exception as error:
            said["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    with open(sys.argv[1]) as opened:
        main(json.load(opened))
