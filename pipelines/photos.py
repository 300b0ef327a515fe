"""Photos, a workflow: from your own captioned photos and a checkpoint to a registered, measured flow model.

    python -m pipelines.workflow photos --source.uri s3://photos/train --base s3://models/my.safetensors --name my-flow

import_checkpoint -> import_images -> encode_latents -> finetune -> register -> evaluate -> generate -> contact_sheet.
A base in diffusers' layout is used where it lies. Complete stages are skipped; after a kill, the same command resumes.
"""

import dataclasses

from d2f_core.data.manifest import manifest_exists
from d2f_core.flow.encode.check import latent_shape
from d2f_core.flow.evaluate.feature_networks import load_features
from d2f_core.flow.evaluate.job import check_dimensions, check_rules
from d2f_core.flow.generate.prompts import table_captions, write_prompts
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.identity import stage_key
from d2f_core.import_images.job import ImportJob, check_import, import_images
from d2f_core.model.base import IMPORT_RECORD, describe_base
from d2f_core.model.importing.job import check_checkpoint_import, import_checkpoint
from d2f_core.model.latent_task import check_networks
from d2f_core.stages import StageOutcome
from d2f_core.storage import check_reachable, exists, join
from d2f_core.tracking import check_tracking
from pipelines import encode_latents
from pipelines.cluster import connect
from pipelines.photos_config import PhotosConfig
from pipelines.workflow_stages import (
    Outputs,
    Workflow,
    contact_sheet_stage,
    evaluate_with,
    finetune_with,
    generate_stage,
    register_with,
    table_is_there,
    write_summary,
)

TOLD = {
    "import_checkpoint": "make a base model of the checkpoint",
    "import_images": "look at the photos, make them squares, hold some out",
    "encode_latents": "encode the others with the base model's autoencoder",
    "finetune": "train the base model as a flow model",
    "register": "register it in MLflow, with how to sample it",
    "evaluate": "compare it with the base on the photos that were held out",
    "generate": "let the base and the flow model draw the same captions",
    "contact_sheet": "put the pictures on one sheet",
}
"""Description of each stage for the waiting user."""


def check(config: PhotosConfig) -> ImportJob:
    """Check photos, storage, MLflow and the base before the first stage runs; raises ValueError if one is unusable."""
    config.check_complete()
    check_reachable(config.output, write=True)
    check_reachable(config.base)
    check_tracking()
    if config.imports_checkpoint:
        check_checkpoint_import(config.wired_checkpoint())
    base = describe_base(config.base).read_as(config.base_prediction)
    latent_shape(config.wired_encode(), base.path)
    check_networks(base, config.wired_finetune().model)
    config.wired_generate(config.base, "output")
    if config.evaluated:
        judged = config.wired_evaluate("candidate")
        check_rules(judged)
        features = load_features(judged.score.features, resize=judged.score.resize, device="meta")
        check_dimensions(judged, features.width)
    return check_import(config.wired_images())


def main(config: PhotosConfig) -> Outputs:
    """Run the workflow; returns the registered version."""
    job = check(config)
    connect(reads={"source.uri": config.source.uri, "base": config.base}, writes={"output": config.output})
    left_out = {"evaluate": config.evaluated, "import_checkpoint": config.imports_checkpoint}
    flow = Workflow(config.output, told={name: told for name, told in TOLD.items() if left_out.get(name, True)})
    if config.imports_checkpoint:
        config = dataclasses.replace(config, base=base_stage(flow, config)["uri"])
    base = describe_base(config.base).content_hash
    images = import_stage(flow, config, job)
    encode = config.wired_encode()
    latents = flow.table("encode_latents", "images", encode_latents.main, encode, images=images["train"], base=base)
    config = dataclasses.replace(config, prompts=config.prompts or shown_captions(config))
    write_prompts(config.prompts_uri, config.prompts)
    training = config.wired_finetune()
    model = finetune_with(flow, "finetune", training, latents=latents["digest"], base=base)
    version = register_with(flow, "register", RegisterConfig(name=config.name), training, model)
    if config.evaluated:
        evaluate_with(flow, "evaluate", config.wired_evaluate(version["uri"]), model, reference=images["test"])
    models = {"generate_base": (config.base, base), "generate_flow": (version["uri"], version["digest"])}
    sheet = contact_sheet_stage(flow, config, *generate_stage(flow, config, models))
    write_summary(flow, training, version, sheet["uri"])
    return version


def base_stage(flow: Workflow, config: PhotosConfig) -> Outputs:
    """Import the checkpoint; returns where the base model lies."""
    wired = config.wired_checkpoint()

    def run() -> StageOutcome:
        done = import_checkpoint(wired)
        return StageOutcome(count=1, outputs={"uri": done.output, "digest": done.content_hash})

    def still_there(done: Outputs) -> bool:
        return exists(join(done["uri"], IMPORT_RECORD))

    return flow.stage("import_checkpoint", stage_key(wired, {}), "models", run, still_there)


def import_stage(flow: Workflow, config: PhotosConfig, job: ImportJob) -> Outputs:
    """Import the photos; returns the digests of both tables, by side."""

    def run() -> StageOutcome:
        made = import_images(job)
        trained, kept = made["train"].num_rows, config.finetune.holdout_rows
        if trained - kept < (batch := config.finetune.train.global_batch_size):
            raise ValueError(
                f"{config.images_of('train')!r} has {trained} images, of which the training keeps {kept} for "
                f"validation: less than a batch of {batch} is left. Give more images, "
                "or lower --finetune.holdout-rows or --finetune.train.global-batch-size."
            )
        digests = {side: table.digest for side, table in made.items()}
        return StageOutcome(count=sum(table.num_rows for table in made.values()), outputs=digests)

    def still_there(done: Outputs) -> bool:
        return all(table_is_there({"uri": config.images_of(side), "digest": digest}) for side, digest in done.items())

    # New photos at the same place are another import, which is refused with what differs rather than passed over.
    key = stage_key(job.config, {"source": job.inputs["source_digest"]})
    return flow.stage("import_images", key, "images", run, still_there)


def shown_captions(config: PhotosConfig) -> tuple[str, ...]:
    """Captions of photos that the training does not see, and then, if these are too few, of those that it sees."""
    places = [config.images_of(side) for side in ("test", "train")]
    captions = [caption for place in places if manifest_exists(place) for caption in sorted(set(table_captions(place)))]
    return tuple(dict.fromkeys(captions))[: config.shown]
