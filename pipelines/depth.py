"""Image to depth, a workflow: `ray job submit --working-dir . -- python -m pipelines.workflow depth`.

make_dataset (training scenes, and test scenes of other objects) -> train_autoencoder (the base's decoder) ->
encode_depth -> finetune -> register -> predict_depth -> evaluate_depth. Complete stages are skipped; after a kill, the
same command resumes.
"""

from dataclasses import replace

from d2f_core.data.sources.config import ImageSource
from d2f_core.flow.depth.evaluation import METRICS_NAME, SHEET_NAME
from d2f_core.identity import stage_key
from d2f_core.model.base import describe_base
from d2f_core.stages import StageOutcome
from d2f_core.storage import check_reachable, exists, join
from d2f_core.tracking import check_tracking
from pipelines import encode_depth, evaluate_depth, make_dataset, predict_depth, train_autoencoder
from pipelines.cluster import connect
from pipelines.configs import TrainAutoencoderConfig
from pipelines.workflow_config import DepthConfig
from pipelines.workflow_stages import Outputs, Workflow, finetune_with, register_with, write_summary


def check(config: DepthConfig) -> None:
    """Check what can be checked before the first stage runs; raises ValueError for an unusable setting."""
    check_reachable(config.output, write=True)
    check_tracking()
    base = config.decoder.base if config.decoder else config.finetune.model.base
    check_reachable(base)
    describe_base(base)
    for scenes in (config.dataset, config.test):
        make_dataset.check(scenes)


def main(config: DepthConfig) -> Outputs:
    """Run the workflow; returns the registered version."""
    check(config)
    connect(reads={}, writes={"output": config.output})
    flow = Workflow(config.output)
    scenes = flow.table("make_dataset", "scenes", make_dataset.main, config.dataset)
    judged = flow.table("make_test_dataset", "scenes", make_dataset.main, config.test)
    base = config.finetune.model.base
    if config.decoder:
        decoder_stage(flow, replace(config.decoder, images=scenes["uri"]), scenes)
        base = join(config.decoder.output, "base")
    wired = replace(config.encode, source=replace(config.encode.source, uri=scenes["uri"]), base=base)
    inputs = {"scenes": scenes["digest"], "base": describe_base(base).content_hash}
    latents = flow.table("encode_depth", "scenes", encode_depth.main, wired, **inputs)
    training = replace(config.finetune, latents=latents["uri"], model=replace(config.finetune.model, base=base))
    model = finetune_with(flow, "finetune", training, latents=latents["digest"], base=inputs["base"])
    version = register_with(flow, "register", config.register, training, model)
    report = evaluate_stage(flow, config, predict_stage(flow, config, version, judged), scenes, judged)
    write_summary(flow, config.finetune, version, report["sheet"])
    return version


def decoder_stage(flow: Workflow, config: TrainAutoencoderConfig, scenes: Outputs) -> Outputs:
    def run() -> StageOutcome:
        made = train_autoencoder.main(config)
        return StageOutcome(
            count=config.train.num_steps, outputs={"uri": made, "digest": describe_base(made).content_hash}
        )

    key = stage_key(config, {"scenes": scenes["digest"], "base": describe_base(config.base).content_hash})
    return flow.stage("train_autoencoder", key, "steps", run, lambda done: exists(join(done["uri"], "vae/config.json")))


def predict_stage(flow: Workflow, config: DepthConfig, version: Outputs, judged: Outputs) -> Outputs:
    inputs = {"model": version["digest"], "images": judged["digest"]}
    # The key is part of the URI, so that maps of another model or of other images are kept apart.
    key = stage_key(config.predict, inputs)
    wired = replace(
        config.predict,
        source=ImageSource(uri=judged["uri"]),
        model=version["uri"],
        output=join(config.output, f"predictions-{key[:12]}"),
    )
    return flow.table("predict_depth", "maps", predict_depth.main, wired, **inputs)


def evaluate_stage(
    flow: Workflow, config: DepthConfig, predictions: Outputs, scenes: Outputs, judged: Outputs
) -> Outputs:
    wired = replace(
        config.evaluate,
        predictions=(predictions["uri"],),
        truth=judged["uri"],
        train=scenes["uri"],
        output=join(config.output, "evaluation"),
    )

    def run() -> StageOutcome:
        results = evaluate_depth.main(wired)
        places = {"uri": METRICS_NAME, "sheet": SHEET_NAME}
        return StageOutcome(
            count=results["images"], outputs={name: join(wired.output, file) for name, file in places.items()}
        )

    inputs = {name: one["digest"] for name, one in (("maps", predictions), ("train", scenes), ("test", judged))}
    return flow.stage("evaluate_depth", stage_key(wired, inputs), "images", run, lambda done: exists(done["uri"]))
