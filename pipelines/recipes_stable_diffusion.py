"""The paper's settings for SD 1.5, SD 2.1 and SDXL, on eight GPUs.

Replace BUCKET by your own bucket: `--model.base`, `--latents` and `--output` set the URIs. From the paper and its
published configs are: base models, tasks, learning rates, no decay of either kind, the average (0.999 from step 1,000,
power 3/4), 128 samples a step, caption dropout 0.02, LoRA presets, 20,000 steps for the new resolution and the numbers
of sampling steps. Ours are: precision, ZeRO stage, micro-batches (for GPUs of 24 GB where that is possible), guidance,
and the number of steps of the other tasks. SDXL is not in the paper: its shifts are those of published flow models.

Source: Schusterbauer et al., "Diff2Flow", CVPR 2025, arXiv:2506.02221.
"""

from typing import Any, Literal

from d2f_core.data.sources.config import DepthSource, ImageSource
from d2f_core.flow.encode.config import EncodeConfig, EncodeDepthConfig
from d2f_core.flow.estimate.config import EstimateConfig
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.model.config import LoraConfig, ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.objective.time_sampling import TimeSampling
from d2f_core.train.config import EmaConfig, TrainConfig
from pipelines.configs import FinetuneConfig

PLACE = "s3://BUCKET"
NODE_WAIT_SECONDS = 900
"""Long, because an autoscaler needs some minutes to start GPU nodes."""
PROMPTS = (
    "a photo of a cat on a wooden table", "a red bicycle in front of a brick wall", "a bowl of fruit, oil painting",
    "an astronaut riding a horse", "a lighthouse at sunset", "a plate of pasta, studio light",
    "a completely black image", "a completely white image",
)  # fmt: skip


def _train(learning_rate: float, micro_batch_size: int, **more: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "num_steps": 20_000,
        "global_batch_size": 128,
        "num_workers": 8,
        "use_gpu": True,
        "precision": "bf16",
        "zero_stage": 2,
        "beta2": 0.999,
        "ema": EmaConfig(decay=0.999, start_step=1000, power=0.75),
        "checkpoint_every": 500,
        "evaluate_every": 2500,
        "node_wait_seconds": NODE_WAIT_SECONDS,
    }
    return TrainConfig(learning_rate=learning_rate, micro_batch_size=micro_batch_size, **values | more)


def _model(base: str, preset: Literal["", "base", "small"] = "", **more: Any) -> ModelConfig:
    values: dict[str, Any] = {"caption_dropout": 0.02, "method": "full"}
    if preset:
        values |= {"method": "lora", "lora": LoraConfig(preset=preset)}
    return ModelConfig(base=f"{PLACE}/models/{base}", **values | more)


def _finetune(name: str, model: ModelConfig, latents: str, train: TrainConfig, **more: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "holdout_rows": 128,
        "preview": PreviewConfig(prompts=PROMPTS, steps=25, guidance=5.0, columns=4),
        "sampling": SamplingDefaults(steps=50, guidance=5.0),
    }
    return FinetuneConfig(
        model=model, latents=f"{PLACE}/latents/{latents}", output=f"{PLACE}/runs/{name}", train=train, name=name,
        **values | more,
    )  # fmt: skip


LARGE_SHIFT = 2.5
"""Shift of the training's times at 1024 px, as published trainings of SDXL as a flow have it."""
SAMPLED_LARGE = {"sampling": SamplingDefaults(steps=50, guidance=5.0, shift=3.0)}
"""At 1024 px even times lose the brightness of an image: docs/resolution.md."""
SAMPLED_IN_TEN = {"sampling": SamplingDefaults(steps=10, guidance=1.0)}

FINETUNE_STABLE_DIFFUSION = {
    recipe.name: recipe
    for recipe in (
        # New resolution: SD 2.1 was trained at 768 px.
        _finetune("sd21-512", _model("sd21"), "sd21-512", _train(1e-5, 4)),
        _finetune("sd21-512-lora", _model("sd21", "base"), "sd21-512", _train(1e-5, 4)),
        # Finetuning at the base's own resolution.
        _finetune("sd15", _model("sd15"), "sd15-512", _train(1e-5, 4)),
        _finetune("sd15-lora", _model("sd15", "small"), "sd15-512", _train(1e-5, 4)),
        # Pairs of noise and image from SD 1.5 with guidance, so no caption is dropped.
        _finetune(
            "sd15-reflow", _model("sd15", "small", caption_dropout=0.0), "sd15-pairs/latents", _train(5e-5, 4),
            preview=PreviewConfig(prompts=PROMPTS, steps=4, guidance=1.0, columns=4), **SAMPLED_IN_TEN,
        ),
        _finetune(
            "sd21-depth", _model("sd21", task="image_to_depth", caption_dropout=0.0), "sd21-depth", _train(3e-5, 4),
            preview=PreviewConfig(steps=10), **SAMPLED_IN_TEN,
        ),
        # Not in the paper: its settings at 1024 px.
        _finetune(
            "sdxl-lora", _model("sdxl", "small", times=TimeSampling(shift=LARGE_SHIFT)), "sdxl-1024",
            _train(1e-5, 1, activation_checkpointing=True), **SAMPLED_LARGE,
        ),
        _finetune(
            "sdxl", _model("sdxl", times=TimeSampling(shift=LARGE_SHIFT)), "sdxl-1024",
            _train(1e-5, 4, activation_checkpointing=True), **SAMPLED_LARGE,
        ),
        # As those who publish SDXL as a rectified flow train it: 256 samples a step or more, at 2e-5 (1e-4 at 4,096), a
        # tenth of the steps to warm up, times from the middle of the path.
        _finetune(
            "sdxl-community",
            _model(
                "sdxl", caption_dropout=0.1, times=TimeSampling(distribution="logit_normal", shift=LARGE_SHIFT)
            ),
            "sdxl-1024",
            _train(
                2e-5, 8, activation_checkpointing=True, global_batch_size=256, warmup_steps=2000, weight_decay=0.01
            ),
            **SAMPLED_LARGE,
        ),
    )
}  # fmt: skip


def _photos(model: ModelConfig, train: TrainConfig) -> FinetuneConfig:
    """One's own photos on one GPU; what belongs to the user (base, latents, output, names, previews) is empty."""
    return FinetuneConfig(
        model=model, latents="", output="", holdout_rows=16, preview=PreviewConfig(steps=25, guidance=5.0, columns=3),
        sampling=SamplingDefaults(steps=25, guidance=5.0), train=train, name="",
    )  # fmt: skip


# A few hundred to some thousand photos, at the sizes that people give such trainings; not measured here.
_OWN = {"num_workers": 1, "global_batch_size": 16, "num_steps": 2000, "warmup_steps": 100, "ema": EmaConfig(decay=0.99)}
PHOTOS_STABLE_DIFFUSION = {
    "photos": _photos(
        ModelConfig(base="", caption_dropout=0.1, method="lora", lora=LoraConfig(preset="small")),
        _train(1e-4, 4, **_OWN),
    ),
    "photos-full": _photos(ModelConfig(base="", caption_dropout=0.1, method="full"), _train(1e-5, 4, **_OWN)),
}
TRAININGS_ON_GPUS = FINETUNE_STABLE_DIFFUSION | PHOTOS_STABLE_DIFFUSION
ENCODE_PHOTOS = EncodeConfig(
    rows_per_part=64, batch_size=8, num_readers=8, num_actors=1, gpus_per_actor=1, node_wait_seconds=NODE_WAIT_SECONDS
)


def _encode(base: str, resolution: int) -> EncodeConfig:
    return EncodeConfig(
        source=ImageSource(uri=f"{PLACE}/images"), base=f"{PLACE}/models/{base}",
        output=f"{PLACE}/latents/{base}-{resolution}", resolution=resolution, rows_per_part=128, batch_size=8,
        num_readers=16, num_actors=8, gpus_per_actor=1, node_wait_seconds=NODE_WAIT_SECONDS,
    )  # fmt: skip


ENCODE_STABLE_DIFFUSION = {
    f"{base}-{resolution}": _encode(base, resolution)
    for base, resolution in (("sd15", 512), ("sd21", 512), ("sdxl", 1024))
}

ENCODE_DEPTH_STABLE_DIFFUSION = {
    "sd21-depth": EncodeDepthConfig(
        source=DepthSource(uri=f"{PLACE}/hypersim", distances="radial"), base=f"{PLACE}/models/sd21",
        output=f"{PLACE}/latents/sd21-depth", resolution=512, rows_per_part=64, batch_size=8,
        num_readers=16, num_actors=8, gpus_per_actor=1, node_wait_seconds=NODE_WAIT_SECONDS,
    )
}  # fmt: skip

PAIRS_STABLE_DIFFUSION = {
    # Solver, steps and guidance are common choices of this project, not the paper's.
    "sd15-pairs": GenerateConfig(
        model=f"{PLACE}/models/sd15", prompts=f"{PLACE}/prompts.parquet", output=f"{PLACE}/latents/sd15-pairs",
        emit="pairs", solver="ddim-clean", steps=(50,), guidance=7.5, num_actors=8, gpus_per_actor=1, chunk_size=256,
        node_wait_seconds=NODE_WAIT_SECONDS,
    )
}  # fmt: skip

RESOLUTIONS = {"sdxl": 1024}
ROWS = {"sd15-reflow": 1_644_334, "sd21-depth": 74_000}
"""Rows of the paper's tables; recipes that are not listed assume a million."""


def _estimate(name: str, recipe: FinetuneConfig) -> EstimateConfig:
    base = recipe.model.base.rpartition("/")[2]
    return EstimateConfig(
        architecture=base, resolution=RESOLUTIONS.get(base, 512), model=recipe.model, train=recipe.train,
        rows=ROWS.get(name, 1_000_000), pairs=name == "sd15-reflow",
    )  # fmt: skip


ESTIMATE = {name: _estimate(name, recipe) for name, recipe in FINETUNE_STABLE_DIFFUSION.items()}
