"""Text to image, a workflow: `ray job submit --working-dir . -- python -m pipelines.workflow quickstart`.

make_dataset -> encode_latents -> finetune -> register -> generate -> contact_sheet. Complete stages are skipped; after
a kill, the same command resumes.
"""

from d2f_core.flow.generate.prompts import table_captions, write_prompts
from d2f_core.model.base import describe_base
from d2f_core.storage import check_reachable
from d2f_core.tracking import check_tracking
from pipelines import encode_latents, make_dataset
from pipelines.cluster import connect
from pipelines.workflow_config import WorkflowConfig
from pipelines.workflow_stages import (
    Workflow,
    contact_sheet_stage,
    finetune_stage,
    generate_stage,
    register_with,
    write_summary,
)

TOLD = {
    "make_dataset": "draw captioned pictures to learn from (quickstart: 2 to 5 s)",
    "encode_latents": "encode them with the base model's autoencoder (8 to 25 s)",
    "finetune": "train the base model as a flow model, on two workers (45 to 130 s)",
    "register": "register it in MLflow, with how to sample it (1 to 4 s)",
    "generate": "let the base and the flow model draw the same prompts (15 to 40 s)",
    "contact_sheet": "put the pictures on one sheet (1 to 4 s)",
}
"""Description of each stage for the waiting user, with its time in the quickstart on two cores."""


def check(config: WorkflowConfig) -> None:
    """Check storage, MLflow and the base before the first stage runs; raises ValueError if one is unusable."""
    check_reachable(config.output, write=True)
    check_tracking()
    check_reachable(config.finetune.model.base)
    describe_base(config.finetune.model.base)


def main(config: WorkflowConfig) -> None:
    check(config)
    connect(reads={}, writes={"output": config.output})
    flow = Workflow(config.output, told=TOLD)
    base = describe_base(config.finetune.model.base).content_hash
    images = flow.table("make_dataset", "images", make_dataset.main, config.dataset)
    latents = flow.table(
        "encode_latents", "images", encode_latents.main, config.wired_encode(), images=images["digest"], base=base
    )
    model = finetune_stage(flow, config, latents=latents["digest"], base=base)
    version = register_with(flow, "register", config.register, config.finetune, model)
    write_prompts(config.prompts_uri, config.prompts)
    write_prompts(config.captions_uri, table_captions(config.dataset.output))
    models = {
        "generate_base": (config.finetune.model.base, base),
        "generate_flow": (version["uri"], version["digest"]),
    }
    made = generate_stage(flow, config, models)
    sheet = contact_sheet_stage(flow, config, *made)
    write_summary(flow, config.finetune, version, sheet["uri"])
