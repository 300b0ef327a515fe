"""The files that install and describe the project agree with each other."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(60)


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([\w.-]+)==([\w.!]+)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in (*project["dependencies"], *(text for extra in extras for text in extra))]


def test_constraints_are_plain_versions_that_satisfy_every_requirement():
    versions = pins()
    wrong = [str(r) for r in requirements() if not r.specifier.contains(versions[canonicalize_name(r.name)])]
    assert not wrong


def test_nothing_of_one_machine_is_in_the_constraints():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"\+|@|://|^-e|^(nvidia|triton)", text, flags=re.MULTILINE)


def test_quickstart_installs_starts_submits_and_reports_in_this_order():
    plan = subprocess.check_output(["make", "-n", "quickstart"], cwd=ROOT, text=True)
    steps = [
        "infra/install.py",
        "-m infra.local up",
        "-m infra.local submit --quiet -- python -m pipelines.workflow quickstart",
        "-m infra.local.report quickstart",
    ]
    assert [plan.index(step) for step in steps] == sorted(plan.index(step) for step in steps)


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_the_cluster_file_is_valid_for_ray(cluster: dict):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_the_cluster_has_a_head_without_work_and_spot_groups_for_data_and_training(cluster: dict):
    types = dict(cluster["available_node_types"])
    assert types.pop(cluster["head_node_type"])["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in " ".join(cluster["head_start_ray_commands"])
    assert all(node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for node in types.values())
    assert {bool(node["resources"].get("GPU")) for node in types.values()} == {True, False}
    assert cluster["max_workers"] == sum(node["max_workers"] for node in types.values())


def test_the_cluster_runs_the_ray_of_the_constraints(cluster: dict):
    assert all(f":{pins()['ray']}-" in cluster["docker"][image] for image in ("image", "head_image"))
    assert all("constraints.txt" in command for command in cluster["setup_commands"])


def test_the_cluster_asks_for_a_token_on_every_node(cluster: dict):
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
    assert "~/.ray/auth_token" in cluster["file_mounts"]
