"""python -m infra.local.report RECIPE: report of a workflow: a table of stages, addresses and a picture.

Reads `s3://d2f/workflows/RECIPE/summary.json`, which the workflow writes at the end.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import botocore.exceptions

from infra.local.processes import StackError
from infra.local.seaweed import download
from infra.local.state import BUCKET, JOB_LOG, State, load_state, stack_directory


def table(stages: Sequence[Mapping[str, Any]]) -> str:
    """Stages as aligned text: name, amount with unit, seconds, rate."""
    rows = [("stage", "done", "seconds", "rate")]
    for stage in stages:
        unit = stage["unit"]
        rate = "complete before" if stage["skipped"] else f"{stage['rate']:,.1f} {unit}/s"
        rows.append((stage["name"], f"{stage['rows_or_steps']:,} {unit}", f"{stage['seconds']:.1f}", rate))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{name:<{widths[0]}}   {done:>{widths[1]}}   {seconds:>{widths[2]}}   {rate:>{widths[3]}}"
        for name, done, seconds, rate in rows
    )


def addresses(summary: Mapping[str, Any], mlflow_url: str) -> str:
    """The MLflow pages of the run and of the registered model."""
    lines = [f"MLflow       {mlflow_url}"]
    if summary.get("run_id"):
        lines.append(f"  run        {mlflow_url}/#/experiments/{summary['experiment_id']}/runs/{summary['run_id']}")
    if summary.get("registered_model"):
        model, version = quote(summary["registered_model"]), summary["model_version"]
        lines.append(f"  model      {mlflow_url}/#/models/{model}/versions/{version}")
    return "\n".join(lines)


NEXT = """\
what next
  look at      {sheet}
  your photos  put them with their captions in the bucket d2f (`source {directory}/env` gives your
               tools its key and address), then run, each after `python -m infra.local submit --`,
                 python -m pipelines.encode_latents openmoji --source.uri s3://d2f/photos --output s3://d2f/latents/photos
                 python -m pipelines.finetune emoji-lora --latents s3://d2f/latents/photos --output s3://d2f/runs/photos
               README.md tells how your own checkpoint takes the place of emoji-sd
  your GPUs    the same commands by `ray job submit` on any cluster; ray_cluster.yaml describes one on AWS
  stop         make down (data stay in {directory})"""


def report(recipe: str, state: State) -> str:
    """The report as text; also downloads the contact sheet to the stack's directory.

    Raises:
        StackError: there is no summary, or S3 does not answer.
    """
    summary_uri = f"s3://{BUCKET}/workflows/{recipe}/summary.json"
    if not state.ports:
        raise StackError(f"no stack in {state.directory}. Start it first: python -m infra.local up")
    local = state.directory / "summary.json"
    try:
        download(summary_uri, local, state)
        summary = json.loads(local.read_text())
        sheet = state.directory / "contact_sheet.png"
        download(summary["contact_sheet"], sheet, state)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise StackError(f"{summary_uri}: {error}. The workflow writes it at its end: make quickstart.") from None
    links = f"{addresses(summary, state.url('mlflow'))}\nlog          {state.directory / JOB_LOG}"
    return f"{table(summary['stages'])}\n\n{links}\n\n{NEXT.format(sheet=sheet, directory=state.directory)}"


def main(argv: Sequence[str]) -> int:
    try:
        print(report(argv[0] if argv else "quickstart", load_state(stack_directory())))
        return 0
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
