"""Named, complete configs of the trainings."""

from dataclasses import replace

from d2f_core.model.config import LoraConfig, ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.objective.time_sampling import TimeSampling
from d2f_core.train.config import EmaConfig, TrainConfig
from pipelines.configs import FinetuneConfig, TrainAutoencoderConfig
from pipelines.names import DEPTH_BASE, DEPTH_DECODER, EMOJI_SD, SHOWN_EMOJI
from pipelines.recipes_stable_diffusion import TRAININGS_ON_GPUS

AUTOENCODER = {
    # The training of emoji-sd's autoencoder, on both styles, so that it decodes either well.
    "emoji": TrainAutoencoderConfig(
        vae_config=f"{EMOJI_SD}/vae",
        images="s3://d2f/datasets/emoji-both",
        output="s3://d2f/runs/emoji-vae",
        train=TrainConfig(
            num_steps=2000,
            global_batch_size=16,
            micro_batch_size=16,
            zero_stage=0,
            learning_rate=1e-3,
            warmup_steps=100,
            decay="cosine",
            ema=EmaConfig(decay=0.995),
            log_every=50,
            checkpoint_every=500,
            evaluate_every=500,
        ),
    ),
    # emoji-sd's decoder was trained on flat drawings only. Only the decoder is trained, so latents and UNet stay valid.
    "depth": TrainAutoencoderConfig(
        base=EMOJI_SD,
        images="s3://d2f/datasets/depth",
        output=DEPTH_DECODER,
        train=TrainConfig(
            num_steps=500,
            global_batch_size=16,
            micro_batch_size=16,
            zero_stage=0,
            learning_rate=1e-3,
            warmup_steps=50,
            decay="cosine",
            ema=EmaConfig(decay=0.99),
            log_every=50,
            checkpoint_every=250,
            evaluate_every=250,
        ),
        name="depth-decoder",
    ),
}

_EMOJI_LORA = FinetuneConfig(
    model=ModelConfig(base=EMOJI_SD, objective="diff2flow", method="lora", lora=LoraConfig(rank=64)),
    latents="s3://d2f/latents/openmoji-starter",
    output="s3://d2f/runs/emoji-lora",
    holdout_rows=12,
    preview=PreviewConfig(
        prompts=tuple(f"{name}, openmoji style" for name in SHOWN_EMOJI[::3]), guidance=2.0, columns=4
    ),
    sampling=SamplingDefaults(guidance=2.0),
    train=TrainConfig(
        num_steps=240,
        global_batch_size=32,
        micro_batch_size=16,
        num_workers=2,
        zero_stage=2,
        learning_rate=2e-3,
        warmup_steps=10,
        decay="cosine",
        ema=EmaConfig(decay=0.98),
        log_every=10,
        checkpoint_every=60,
        evaluate_every=120,
    ),
    name="emoji-lora",
)

FINETUNE = {
    # The training of emoji-sd's UNet: a small latent diffusion model from random weights.
    "emoji-sd": FinetuneConfig(
        model=ModelConfig(base=EMOJI_SD, from_scratch=True, objective="diffusion", method="full", caption_dropout=0.1),
        latents="s3://d2f/latents/twemoji",
        output="s3://d2f/runs/emoji-sd",
        holdout_rows=0,
        preview=PreviewConfig(prompts=tuple(f"{name}, twemoji style" for name in SHOWN_EMOJI), steps=25, guidance=3.0),
        train=TrainConfig(
            num_steps=4000,
            global_batch_size=32,
            micro_batch_size=32,
            zero_stage=0,
            learning_rate=1e-3,
            warmup_steps=200,
            decay="cosine",
            ema=EmaConfig(decay=0.999),
            log_every=50,
            checkpoint_every=500,
            evaluate_every=1000,
        ),
        name="emoji-sd",
    ),
    # emoji-sd is finetuned to OpenMoji's style as a flow model, on two workers. "emoji-few" is the quickstart's
    # training: a quarter of the drawings, each seen as often, is memorised in a third of the time.
    "emoji-lora": _EMOJI_LORA,
    "emoji-few": replace(
        _EMOJI_LORA,
        latents="s3://d2f/latents/openmoji-few",
        output="s3://d2f/runs/emoji-few",
        holdout_rows=4,
        train=replace(
            _EMOJI_LORA.train,
            num_steps=128,
            global_batch_size=16,
            micro_batch_size=8,
            ema=EmaConfig(decay=0.96),
            checkpoint_every=64,
            evaluate_every=128,
        ),
        name="emoji-few",
    ),
    # On every drawing but those that evaluations are made with; it learns none of them by heart.
    "emoji-many": replace(
        _EMOJI_LORA,
        latents="s3://d2f/latents/openmoji-train",
        output="s3://d2f/runs/emoji-many",
        holdout_rows=64,
        train=replace(_EMOJI_LORA.train, num_steps=360, global_batch_size=16, micro_batch_size=8),
        name="emoji-many",
    ),
    # emoji-sd learns to predict depth from rendered scenes. A depth map is smooth, so most of it is visible soon after
    # pure noise: only at flow times near noise does the network have to use the image.
    "depth": FinetuneConfig(
        model=ModelConfig(
            base=DEPTH_BASE,
            task="image_to_depth",
            objective="diff2flow",
            method="full",
            caption_dropout=0.0,
            times=TimeSampling(shift=4.0),
        ),
        latents="s3://d2f/latents/depth",
        output="s3://d2f/runs/depth",
        holdout_rows=64,
        preview=PreviewConfig(rows=8, steps=2, columns=2),
        sampling=SamplingDefaults(steps=2, guidance=1.0),
        train=TrainConfig(
            num_steps=3000,
            global_batch_size=32,
            micro_batch_size=16,
            num_workers=2,
            zero_stage=2,
            learning_rate=1e-3,
            warmup_steps=50,
            decay="cosine",
            ema=EmaConfig(decay=0.99),
            log_every=25,
            checkpoint_every=250,
            evaluate_every=500,
        ),
        name="depth",
    ),
} | TRAININGS_ON_GPUS
