"""What the running stack promises: only this machine, only with credentials, and everything finds everything."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import botocore.exceptions
import pytest

from infra.local.ray_head import LOGICAL_CPUS
from infra.local.seaweed import make_client
from infra.local.stack import Stack, StackEnv
from infra.local.state import load_state
from tests.infra.servers import listening, pids, s3_client, status_of

pytestmark = pytest.mark.timeout(180)


def test_s3_refuses_a_wrong_secret(s3: StackEnv):
    state = load_state(s3.directory)
    client = make_client(state.url("s3"), state.access_key, "wrong")
    with pytest.raises(botocore.exceptions.ClientError, match=r"SignatureDoesNotMatch|AccessDenied"):
        client.list_objects_v2(Bucket="d2f")


def test_the_ports_behind_s3_serve_no_data(s3: StackEnv):
    s3_client(s3.directory).put_object(Bucket="d2f", Key="infra/secret", Body=b"x")
    filer = load_state(s3.directory).url("s3_filer")
    assert status_of(f"{filer}/buckets/d2f/infra/secret") == 401
    assert status_of(f"{filer}/buckets/d2f/infra/written", body=b"{}") == 401


def test_every_server_listens_on_this_machine_only(stack: StackEnv):
    addresses = {ip.removeprefix("::ffff:") for ip, _ in listening(pids(stack.directory))}
    assert addresses == {"127.0.0.1"}


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_job_without_the_token_is_refused(stack: StackEnv, token: str | None):
    jobs = f"{stack.variables['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    assert status_of(jobs, token=token, body=b'{"entrypoint": "true"}') in (401, 403)


def test_a_driver_finds_the_cluster_through_the_environment(stack: StackEnv):
    code = "import ray; ray.init(log_to_driver=False); print(int(ray.cluster_resources()['CPU']))"
    environment = {**os.environ, **stack.variables}
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=120)
    assert output.split()[-1] == str(LOGICAL_CPUS)


def test_artifacts_of_mlflow_end_up_in_s3(stack: StackEnv, tmp_path: Path):
    import mlflow

    name = uuid.uuid4().hex
    (tmp_path / f"{name}.txt").write_text("an artifact")
    client = mlflow.MlflowClient(stack.variables["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment(name))
    client.log_artifact(run.info.run_id, str(tmp_path / f"{name}.txt"))
    keys = s3_client(stack.directory).list_objects_v2(Bucket="d2f", Prefix="mlflow/")["Contents"]
    assert [key for key in keys if key["Key"].endswith(f"{name}.txt")]


def test_a_job_gets_the_code_and_the_environment_and_its_failure_is_handed_back(stack: StackEnv, tmp_path: Path):
    (tmp_path / ".gitignore").write_text("left_out/\n")
    for name in ("left_out", ".git", ".venv"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "big").write_text("x")
    (tmp_path / "job.py").write_text(
        "import os, sys\n"
        "print('FILES', sorted(os.listdir('.')))\n"
        "print('SERVERS', os.environ['AWS_ENDPOINT_URL'], os.environ['MLFLOW_TRACKING_URI'], sys.executable)\n"
        "sys.exit(3)\n"
    )
    environment = {**os.environ, "D2F_LOCAL_DIR": str(stack.directory), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "infra.local", "submit", "--", "python", "job.py"]
    job = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150)
    assert job.returncode == 3
    assert "FILES ['.gitignore', 'job.py']" in job.stdout
    servers = stack.variables["AWS_ENDPOINT_URL"], stack.variables["MLFLOW_TRACKING_URI"]
    assert "SERVERS {} {} {}".format(*servers, sys.executable) in job.stdout


def test_a_command_that_runs_already_is_followed_not_started_twice(stack: StackEnv, tmp_path: Path):
    environment = {**os.environ, "D2F_LOCAL_DIR": str(stack.directory), "PYTHONPATH": os.getcwd()}
    command = [
        sys.executable,
        "-m",
        "infra.local",
        "submit",
        "--",
        "sh",
        "-c",
        "date >> DATES; sleep 6; cat DATES; exit 7",
    ]
    started = {"cwd": tmp_path, "env": environment, "text": True, "stdout": subprocess.PIPE}
    first = subprocess.Popen(command, **started)
    assert first.stdout and any("submitted successfully" in line for line in first.stdout)
    second = subprocess.run(command, **started, timeout=100)
    assert (first.wait(60), second.returncode) == (7, 7)
    assert "the same command runs already as job" in second.stdout
    first.stdout.close()


def test_status_tells_running_from_stopped(stack: StackEnv, tmp_path: Path):
    assert [part.state for part in Stack(stack.directory).status()] == ["running"] * 3
    assert [part.state for part in Stack(tmp_path / "none").status()] == ["stopped"] * 3


def test_two_stacks_live_side_by_side(stack: StackEnv, tmp_path: Path):
    other = Stack(tmp_path / "other", parts=("s3",), tied=True)
    try:
        assert other.up().variables["AWS_ENDPOINT_URL"] != stack.variables["AWS_ENDPOINT_URL"]
        before = pids(stack.directory, "s3")
    finally:
        other.down()
    assert before and pids(stack.directory, "s3") == before
