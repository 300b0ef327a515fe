"""What must stay secret stands in no log, run, manifest, job description or error."""

import base64
import os
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from d2f_core import storage
from d2f_core.tracking import TrackingError, check_tracking, tracking_uri
from infra.local.ray_head import temp_directory
from infra.local.stack import Stack, StackEnv
from infra.local.state import load_state
from tests.flow.tiny_base import write_tiny_base
from tests.infra.servers import s3_client

pytestmark = [pytest.mark.timeout(900), pytest.mark.starts_processes]

PLANTED = {
    "MLFLOW_TRACKING_USERNAME": "planted-user",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password-5e1f",
    "D2F_SERVE_TOKEN": "planted-serve-token-77aa01",
    "HF_TOKEN": "hf_plantedhubtoken93",
}
JOB = """
import os, sys, ray
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.storage import read_bytes, write_bytes
from d2f_core.tracking import start_run
from pipelines.cli import to_yaml
from pipelines.generate import main

missing = [name for name in sys.argv[2:] if name not in os.environ]
assert not missing, missing
write_bytes("s3://d2f/secrets/prompts.jsonl", b'{"prompt": "cat"}')
home = "s3://d2f/secrets"
config = GenerateConfig(prompts=f"{home}/prompts.jsonl", model=sys.argv[1], output=f"{home}/out", steps=(1,))
main(config)
about = {"config_yaml": to_yaml(config), "params": vars(config), "tags": {}}
run = start_run(experiment="secrets", run_key=home, name="a", **about)
print("RUN", run.url)
run.finish("FAILED")

@ray.remote
def fail():
    read_bytes("s3://d2f/secrets/missing")

try:
    ray.get(fail.remote())
except FileNotFoundError as error:
    print("ERROR", error)
os.environ["AWS_SECRET_ACCESS_KEY"] = os.environ["AWS_SECRET_ACCESS_KEY"][::-1]
from d2f_core.storage import check_reachable
check_reachable("s3://d2f/secrets/out", write=True)
"""


@dataclass(frozen=True, kw_only=True)
class Ran:
    env: StackEnv
    output: str
    secrets: dict[str, bytes]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """A stack of its own that has the planted secrets in its environment, and a job on it that fails at its end."""
    home = tmp_path_factory.mktemp("secrets")
    base = write_tiny_base(home / "base")
    (home / "job").mkdir()
    (home / "job/job.py").write_text(JOB)
    stack = Stack(home / "stack", tied=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PLANTED.items():
            patch.setenv(name, value)
        env = stack.up()
        names = [*PLANTED, "AWS_SECRET_ACCESS_KEY"]
        command = ["submit", "--", "python", "job.py", str(base), *names]
        variables = {**os.environ, **env.variables, "D2F_LOCAL_DIR": str(env.directory), "PYTHONPATH": os.getcwd()}
        try:
            job = subprocess.run(
                [sys.executable, "-m", "infra.local", *command],
                cwd=home / "job",
                env=variables,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=800,
            )
            assert job.returncode == 1 and "RUN http" in job.stdout and "is not writable at" in job.stdout, job.stdout
            yield Ran(env=env, output=job.stdout, secrets=secrets_of(env))
        finally:
            stack.down()


def secrets_of(env: StackEnv) -> dict[str, bytes]:
    """Each secret, and what stands for it on the wire."""
    state = load_state(env.directory)
    pair = f"{PLANTED['MLFLOW_TRACKING_USERNAME']}:{PLANTED['MLFLOW_TRACKING_PASSWORD']}"
    texts = {
        **PLANTED,
        "AWS_SECRET_ACCESS_KEY": state.secret_key,
        "the wrong AWS_SECRET_ACCESS_KEY": state.secret_key[::-1],
        "Ray's token": state.ray_token,
        "MLflow's Authorization header": base64.b64encode(pair.encode()).decode(),
    }
    del texts["MLFLOW_TRACKING_USERNAME"]
    return {name: text.encode() for name, text in texts.items()}


def found(ran: Ran, where: str, text: bytes) -> list[str]:
    return [f"{name} in {where}" for name, secret in ran.secrets.items() if secret in text]


def found_in_files(ran: Ran, root: Path, leave_out: tuple[str, ...] = ()) -> list[str]:
    files = [file for file in root.rglob("*") if file.is_file() and not file.is_symlink()]
    assert files
    return [leak for file in files if file.name not in leave_out for leak in found(ran, str(file), file.read_bytes())]


def test_the_jobs_output_and_error_hold_none(ran: Ran) -> None:
    assert found(ran, "the output", ran.output.encode()) == []


def test_logs_and_sessions_of_the_servers_hold_none(ran: Ran) -> None:
    assert found_in_files(ran, ran.env.directory / "logs") == []
    assert found_in_files(ran, temp_directory(ran.env.directory)) == []


def test_runs_manifests_and_artifacts_hold_none(ran: Ran) -> None:
    client = s3_client(ran.env.directory)
    names = [entry["Key"] for entry in client.list_objects_v2(Bucket="d2f")["Contents"]]
    assert {"secrets/out/manifest.json", "secrets/out/plan.json"} <= {*names}
    assert any(name.endswith("config.yaml") for name in names)
    for name in names:
        assert found(ran, name, client.get_object(Bucket="d2f", Key=name)["Body"].read()) == []
    assert found(ran, "MLflow's database", (ran.env.directory / "mlflow.db").read_bytes()) == []


@pytest.mark.parametrize(
    "path", ["/api/jobs/", "/api/v0/tasks?detail=1", "/api/v0/actors?detail=1", "/nodes?view=summary"]
)
def test_what_ray_tells_of_its_jobs_holds_none(ran: Ran, path: str) -> None:
    headers = {"Authorization": f"Bearer {load_state(ran.env.directory).ray_token}"}
    request = urllib.request.Request(ran.env.variables["RAY_API_SERVER_ADDRESS"] + path, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert found(ran, path, answer.read()) == []


def test_command_lines_hold_none(ran: Ran) -> None:
    import psutil

    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert found(ran, "a command line", "\n".join(" ".join(line) for line in lines).encode()) == []


def test_the_stacks_own_files_are_for_one_user(ran: Ran) -> None:
    directory = ran.env.directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    private = [file for file in directory.iterdir() if file.is_file() and found(ran, file.name, file.read_bytes())]
    assert {file.name for file in private} == {"env", "ray_token", "state.json"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in private} == {0o600}
    temporary = temp_directory(directory)
    assert temporary.is_dir() and stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("check", [tracking_uri, check_tracking])
@pytest.mark.parametrize(
    "address",
    [
        "http://me:planted-password@127.0.0.1:9/",
        "https://planted-token@mlflow.example",
        "planted-token@mlflow.example:5000",
        "https://mlflow.example/?token=planted",
        "postgresql://me:planted@db/mlflow",
    ],
)
def test_an_mlflow_address_with_a_secret_in_it_is_refused_without_being_shown(monkeypatch, address, check) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as caught:
        check()
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    "use",
    [
        lambda: storage.check_reachable("s3://d2f/a"),
        lambda: storage.read_bytes("s3://d2f/a"),
        lambda: storage.arrow_filesystem("s3://d2f/a"),
    ],
)
def test_an_s3_address_with_a_secret_in_it_is_refused_without_being_shown(monkeypatch, use, caplog) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:planted-password@127.0.0.1:9")
    with pytest.raises(ValueError, match="AWS_ENDPOINT_URL holds a user, password or token") as caught:
        use()
    assert "planted" not in str(caught.value) + caplog.text
