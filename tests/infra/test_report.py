"""What `make quickstart` prints at its end."""

import json
from pathlib import Path

import pytest

from infra.local.processes import StackError
from infra.local.report import report
from infra.local.stack import StackEnv
from infra.local.state import load_state
from tests.infra.servers import s3_client

pytestmark = pytest.mark.timeout(60)

SUMMARY = {
    "stages": [
        {
            "name": "encode_latents",
            "rows_or_steps": 1918,
            "unit": "images",
            "seconds": 20.0,
            "rate": 95.9,
            "skipped": False,
        },
        {"name": "finetune", "rows_or_steps": 200, "unit": "steps", "seconds": 0.1, "rate": 0.0, "skipped": True},
    ],
    "experiment_id": "1",
    "run_id": "abc",
    "registered_model": "emoji lora",
    "model_version": "2",
    "contact_sheet": "s3://d2f/workflows/seen/sheet.png",
}


def test_the_report_shows_stages_addresses_and_the_picture(s3: StackEnv):
    client = s3_client(s3.directory)
    client.put_object(Bucket="d2f", Key="workflows/seen/summary.json", Body=json.dumps(SUMMARY).encode())
    client.put_object(Bucket="d2f", Key="workflows/seen/sheet.png", Body=b"a picture")
    state = load_state(s3.directory)
    lines = report("seen", state).splitlines()
    assert lines[1].split() == ["encode_latents", "1,918", "images", "20.0", "95.9", "images/s"]
    assert lines[2].split() == ["finetune", "200", "steps", "0.1", "complete", "before"]
    text = "\n".join(lines)
    assert f"{state.url('mlflow')}/#/experiments/1/runs/abc" in text
    assert f"{state.url('mlflow')}/#/models/emoji%20lora/versions/2" in text
    (look,) = (line.split(maxsplit=2)[2] for line in lines if line.startswith("  look at "))
    assert Path(look).read_bytes() == b"a picture"
    assert "make down" in text and "--source.uri s3://d2f/photos" in text, "what to do next"


def test_a_workflow_that_has_not_finished_is_named_with_the_fix(s3: StackEnv):
    with pytest.raises(StackError, match=r"workflows/unknown/summary\.json: .* make quickstart"):
        report("unknown", load_state(s3.directory))
