"""Named, complete configs of the workflows."""

from dataclasses import replace

from d2f_core.data.datasets.config import MakeDatasetConfig
from d2f_core.flow.depth.config import EvaluateDepthConfig
from d2f_core.flow.encode.config import EncodeConfig
from d2f_core.flow.evaluate.config import EvaluateConfig, ScoreConfig
from d2f_core.flow.generate.config import ContactSheetConfig, GenerateConfig
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.import_images.config import ImportImagesConfig
from d2f_core.model.config import LoraConfig, ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.train.config import EmaConfig
from pipelines.configs import FinetuneConfig
from pipelines.distill import DISTILL
from pipelines.embed_images import EMBED_IMAGES
from pipelines.encode_depth import ENCODE_DEPTH
from pipelines.evaluate import EVALUATE
from pipelines.evaluate_matches import EVALUATE_MATCHES
from pipelines.make_dataset import MAKE_DATASET
from pipelines.make_views import MAKE_VIEWS
from pipelines.names import CAPTIONS, DEPTH_MODEL, EVALUATIONS, FLOW_MODEL, OPENMOJI_FEW, QUICKSTART, SHOWN_EMOJI
from pipelines.photos_config import PhotosConfig
from pipelines.predict_depth import PREDICT_DEPTH
from pipelines.recipes import AUTOENCODER, FINETUNE
from pipelines.recipes_stable_diffusion import ENCODE_PHOTOS, PHOTOS_STABLE_DIFFUSION
from pipelines.register_matcher import REGISTER_MATCHER
from pipelines.unpack_dinov2 import UNPACK
from pipelines.workflow_config import DepthConfig, DistillWorkflowConfig, ReflowConfig, WorkflowConfig


def new_resolution(edge: int) -> WorkflowConfig:
    """emoji-sd, made for 64 pixels, is finetuned to Twemoji's drawings at another size."""
    name = f"emoji-{edge}"
    training = FINETUNE["emoji-lora"]
    return WorkflowConfig(
        output=f"s3://d2f/workflows/{name}",
        dataset=MakeDatasetConfig(output=f"s3://d2f/datasets/twemoji-{edge}", style="twemoji", size=edge),
        encode=EncodeConfig(output=f"s3://d2f/latents/twemoji-{edge}", resolution=edge),
        finetune=replace(
            training,
            model=replace(training.model, lora=LoraConfig(preset="small")),
            latents="",
            output=f"s3://d2f/runs/{name}",
            preview=replace(training.preview, prompts=tuple(f"{shown}, twemoji style" for shown in SHOWN_EMOJI[::3])),
            # Whole objects appear after about 200 steps, details later.
            train=replace(
                training.train,
                num_steps=720,
                learning_rate=1e-3,
                warmup_steps=20,
                ema=EmaConfig(decay=0.99),
                checkpoint_every=120,
                evaluate_every=240,
            ),
            name=name,
        ),
        register=RegisterConfig(name=name),
        generate=GenerateConfig(steps=EVALUATIONS, chunk_size=6),
        sheet=ContactSheetConfig(
            titles=("base model, DDIM", "flow model, Euler"),
            title=f"emoji-sd at {edge} pixels, and the flow model finetuned from it at that size",
        ),
        prompts=tuple(f"{shown}, twemoji style" for shown in SHOWN_EMOJI[::2]),
    )


WORKFLOW = {
    # The workflow of `make quickstart`: emoji-sd is finetuned to OpenMoji's style as a flow model.
    "quickstart": WorkflowConfig(
        output=QUICKSTART,
        dataset=MAKE_DATASET["openmoji-few"],
        encode=EncodeConfig(output="s3://d2f/latents/openmoji-few"),
        finetune=FINETUNE["emoji-few"],
        register=RegisterConfig(name=FLOW_MODEL),
        generate=GenerateConfig(steps=EVALUATIONS, chunk_size=6),
        sheet=ContactSheetConfig(
            titles=("before: the base model, by DDIM", "after: the flow model, by Euler"),
            title="emoji-sd has learned to draw by OpenMoji's hand, as a flow model: fewer evaluations are enough",
        ),
        prompts=tuple(f"{name}, openmoji style" for name in SHOWN_EMOJI[::2]),
    ),
    # emoji-sd, made for 64 pixels, at other sizes.
    **{f"emoji-{edge}": new_resolution(edge) for edge in (32, 96)},
}


def _photos(training: str) -> PhotosConfig:
    """One's own photos on one GPU: places, base and names are the user's to give."""
    return PhotosConfig(
        images=ImportImagesConfig(num_readers=8),
        encode=ENCODE_PHOTOS,
        finetune=PHOTOS_STABLE_DIFFUSION[training],
        evaluate=EvaluateConfig(score=ScoreConfig(num_actors=1, gpus_per_actor=1)),
        generate=GenerateConfig(steps=EVALUATIONS, chunk_size=6, num_actors=1, gpus_per_actor=1),
        sheet=ContactSheetConfig(titles=("before: the base model", "after: the flow model")),
    )


_ON_CPUS = FinetuneConfig(
    model=ModelConfig(base="", lora=LoraConfig(preset="small")),
    latents="",
    output="",
    holdout_rows=16,
    preview=PreviewConfig(steps=10, guidance=2.0, columns=3),
    sampling=SamplingDefaults(steps=10, guidance=2.0),
    train=replace(FINETUNE["emoji-few"].train, learning_rate=1e-3, warmup_steps=20),
    name="",
)
PHOTOS = {
    **{name: _photos(name) for name in PHOTOS_STABLE_DIFFUSION},
    # To see the whole way on a laptop, with a small base: 128 steps at 64 pixels.
    "photos-on-cpus": PhotosConfig(
        resolution=64,
        images=ImportImagesConfig(min_side=64),
        finetune=_ON_CPUS,
        evaluate=EvaluateConfig(evaluations=(2, 4)),
        generate=GenerateConfig(steps=EVALUATIONS, chunk_size=6),
        sheet=ContactSheetConfig(titles=("before: the base model", "after: the flow model")),
    ),
}
"""From one's own photos and checkpoint to a registered, measured flow model: a LoRA, or all weights."""

REFLOW = ReflowConfig(
    output="s3://d2f/workflows/reflow",
    teacher=f"models:/{FLOW_MODEL}@candidate",
    captions=WORKFLOW["quickstart"].encode.output,
    num_pairs=1000,
    generate=GenerateConfig(steps=(25,), batch_size=32),
    finetune=replace(
        FINETUNE["emoji-lora"],
        # The pairs include guidance: the model is sampled without it, and no caption is dropped.
        model=replace(FINETUNE["emoji-lora"].model, caption_dropout=0.0),
        sampling=SamplingDefaults(steps=2, guidance=1.0),
        latents="",
        output="",
        name="emoji-reflow",
    ),
    register=RegisterConfig(name="emoji-reflow"),
    # On the drawings and captions that the pairs are of. Reflowed models have the guidance in their weights.
    evaluate=replace(
        EVALUATE["quickstart"],
        evaluations=(1, *EVALUATIONS),
        promote=False,
        own_guidance=True,
        training="",
        prompts=f"{QUICKSTART}/{CAPTIONS}",
        reference=OPENMOJI_FEW,
    ),
)
"""Reflow of the quickstart's flow model, on 1,000 of its own pairs."""

DEPTH = DepthConfig(
    output="s3://d2f/workflows/depth",
    dataset=MAKE_DATASET["depth"],
    test=MAKE_DATASET["depth-test"],
    decoder=AUTOENCODER["depth"],
    encode=ENCODE_DEPTH["depth"],
    finetune=FINETUNE["depth"],
    register=RegisterConfig(name=DEPTH_MODEL),
    predict=replace(PREDICT_DEPTH["depth"], model="", output=""),
    evaluate=EvaluateDepthConfig(),
)
"""emoji-sd learns to predict depth from rendered scenes."""

DISTILLATION = DistillWorkflowConfig(
    output="s3://d2f/workflows/distill",
    views=MAKE_VIEWS["views"],
    base=UNPACK["dinov2-s"],
    embed=EMBED_IMAGES["views"],
    distill=DISTILL["distill-demo"],
    refine=DISTILL["refine-demo"],
    control=DISTILL["control-demo"],
    register=REGISTER_MATCHER["matcher"],
    evaluate=EVALUATE_MATCHES["distill-demo"],
)
"""Two teachers distilled into DINOv2-S, on rendered views."""
