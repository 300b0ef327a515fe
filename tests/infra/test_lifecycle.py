"""Up, repair, down: from whatever state a stack is in. With the S3 server alone where the property is not Ray's."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import botocore.exceptions
import psutil
import pytest

from infra.local import stack as stack_module
from infra.local.processes import OWNER, StackError
from infra.local.ray_head import temp_directory
from infra.local.stack import Stack
from infra.local.state import load_state, read_variables
from tests.infra.servers import pids, s3_client

pytestmark = [pytest.mark.timeout(240), pytest.mark.starts_processes]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path / "own", parts=("s3",), tied=True)
    yield stack
    Stack(stack.directory).down()


def kill(directory: Path, signal_number: int, part: str = "s3") -> None:
    for pid in pids(directory, part):
        os.kill(pid, signal_number)


def read(stack: Stack, key: str) -> bytes:
    """Just after a restart SeaweedFS may answer InternalError until its volumes are registered; S3 clients retry that,
    but the one of the health checks, which is used here, does not."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return s3_client(stack.directory).get_object(Bucket="d2f", Key=key)["Body"].read()
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] != "InternalError" or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def write(stack: Stack, key: str, body: bytes) -> None:
    s3_client(stack.directory).put_object(Bucket="d2f", Key=key, Body=body)


def test_a_second_up_changes_nothing(own: Stack):
    assert own.up().started == ("s3",)
    first = pids(own.directory)
    again = Stack(own.directory, parts=("s3",)).up()
    assert again.started == ()
    assert pids(own.directory) == first


def test_secrets_are_for_the_owner_only(own: Stack):
    own.up()
    modes = {name: stat.S_IMODE((own.directory / name).stat().st_mode) for name in ("env", "state.json", "ray_token")}
    assert modes == {"env": 0o600, "state.json": 0o600, "ray_token": 0o600}
    assert stat.S_IMODE(own.directory.stat().st_mode) == 0o700


def test_down_leaves_no_process_and_keeps_data_credentials_and_address(own: Stack):
    before = own.up().variables
    write(own, "kept", b"data")
    assert own.down() == 1
    assert pids(own.directory) == set()
    assert own.down() == 0
    assert own.up().variables == before
    assert read(own, "kept") == b"data"


def test_a_killed_server_is_started_again_with_its_data(own: Stack):
    before = own.up().variables
    write(own, "kept", b"data")
    kill(own.directory, signal.SIGKILL)
    env = own.up()
    assert (env.started, env.variables) == (("s3",), before)
    assert read(own, "kept") == b"data"


def test_a_server_that_hangs_is_replaced(own: Stack, monkeypatch: pytest.MonkeyPatch):
    own.up()
    hung = pids(own.directory)
    kill(own.directory, signal.SIGSTOP)
    monkeypatch.setattr(stack_module, "PATIENCE_SECONDS", 1.0)
    assert own.up().started == ("s3",)
    assert not hung & pids(own.directory)


def test_an_up_that_died_half_way_is_finished_by_the_next(own: Stack):
    environment = {**os.environ, "D2F_LOCAL_DIR": str(own.directory)}
    command = subprocess.Popen([sys.executable, "-m", "infra.local", "up"], env=environment, stdout=subprocess.DEVNULL)
    while len({o.part for o in own._owned()}) < 3:
        assert command.poll() is None
        time.sleep(0.01)
    command.kill()
    command.wait()
    own.up()
    assert len(pids(own.directory, "s3")) == 1
    assert own.status()[0].state == "running"
    own.down()  # `own` knows of s3 only, but MLflow and Ray of the first attempt belong to the directory as well
    assert pids(own.directory) == set()


@pytest.mark.parametrize("damage", ['{"ports": ', "[]"])
def test_unreadable_state_under_a_running_server_is_replaced(own: Stack, damage: str):
    own.up()
    write(own, "kept", b"data")
    (own.directory / "state.json").write_text(damage)
    own.up()
    assert len(pids(own.directory)) == 1
    assert read(own, "kept") == b"data"


def test_a_directory_deleted_under_its_servers_is_no_obstacle(own: Stack):
    own.up()
    first = pids(own.directory)
    while own.directory.exists():  # the server goes on writing into it
        shutil.rmtree(own.directory, ignore_errors=True)
    own.up()
    assert len(pids(own.directory)) == 1
    assert not first & pids(own.directory)


def test_processes_of_others_are_left_alone(own: Stack, tmp_path: Path):
    mark = {**os.environ, OWNER: f"{tmp_path / 'other'}|s3|0"}
    stranger = subprocess.Popen(["sleep", "60"], env=mark)
    try:
        own.up()
        own.down()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_kept_port_that_was_taken_meanwhile_is_replaced(own: Stack):
    own.up()
    write(own, "kept", b"data")
    own.down()
    old = load_state(own.directory).ports["s3"]
    with socket.create_server(("127.0.0.1", old)):
        own.up()
        assert load_state(own.directory).ports["s3"] != old
        assert read(own, "kept") == b"data"


def test_a_fixed_port_is_used_and_moves_a_running_server(own: Stack, monkeypatch: pytest.MonkeyPatch):
    own.up()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()[1] - 15_000  # its gRPC twin, 10,000 higher, is a port as well
    monkeypatch.setenv("D2F_S3_PORT", str(free))
    assert own.up().variables["AWS_ENDPOINT_URL"] == f"http://127.0.0.1:{free}"
    assert len(pids(own.directory)) == 1


@pytest.mark.parametrize("value", ["0", "80", "65000", "s3", "-1"])
def test_a_fixed_port_that_is_none_is_refused(own: Stack, monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("D2F_S3_PORT", value)
    with pytest.raises(StackError, match=rf"D2F_S3_PORT='{value}' .* number from 1024 to 55535, or unset"):
        own.up()


def test_a_fixed_port_that_is_taken_is_refused_with_the_fix(own: Stack):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = {**os.environ, "D2F_LOCAL_DIR": str(own.directory), "D2F_MLFLOW_PORT": port}
        command = [sys.executable, "-m", "infra.local", "up"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: port {port} (D2F_MLFLOW_PORT={port}) on 127.0.0.1 is taken")
    assert "unset D2F_MLFLOW_PORT" in result.stderr
    assert pids(own.directory) == set()


def test_a_server_that_cannot_start_is_reported_with_its_log(own: Stack):
    (own.directory / "s3").mkdir(parents=True)
    (own.directory / "s3" / "filerldb2").write_text("a file where the server keeps a directory")
    with pytest.raises(StackError, match=r"(?s)s3 did not start .* The end of .*s3\.log:\n.*filerldb2"):
        own.up()
    assert pids(own.directory) == set()


def test_servers_of_a_killed_test_run_end_with_it(own: Stack):
    start = f"Stack({str(own.directory)!r}, parts=('s3',), tied=True).up(); print('up', flush=True)"
    code = f"import time; from infra.local.stack import Stack; {start}; time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"up\n"
    processes = [psutil.Process(pid) for pid in pids(own.directory)]
    holder.kill()
    holder.communicate()
    assert len(processes) == 1
    psutil.wait_procs(processes, timeout=60)
    assert pids(own.directory) == set()


def test_the_env_file_gives_a_shell_and_python_the_same(own: Stack):
    variables = own.up().variables
    assert read_variables(own.directory / "env") == variables
    script = f"export AWS_PROFILE=mine; source {own.directory / 'env'}; {sys.executable} -c " + (
        "'import json, os; print(json.dumps(dict(os.environ)))'"
    )
    shell = json.loads(subprocess.check_output(["bash", "-c", script]))
    assert variables.items() <= shell.items()
    assert "AWS_PROFILE" not in shell


JOB = """
import pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])

def end(*_):
    time.sleep(4)  # Ray's own patience is 3 s
    place.write_text("saved")
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
place.write_text("running")
time.sleep(600)
"""


def test_a_ray_head_that_lost_its_raylet_is_replaced_and_down_lets_a_job_end_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job/job.py").write_text(JOB)
    said = tmp_path / "said"
    own = Stack(tmp_path / "ray", parts=("ray",), tied=True)
    try:
        own.up()
        Stack(own.directory, parts=("s3",), tied=True).up()
        assert "RAY_AUTH_TOKEN_PATH" in read_variables(own.directory / "env"), "the head is lost to `submit`"
        for item in own._owned("ray"):
            if item.process.name() == "raylet":
                item.process.kill()
        env = own.up()
        assert env.started == ("ray",)
        assert own.status()[0].state == "running"
        client = subprocess.Popen(
            [sys.executable, "-m", "infra.local", "submit", "--", "python", "job.py", str(said)],
            cwd=tmp_path / "job",
            env={**os.environ, "D2F_LOCAL_DIR": str(own.directory), "PYTHONPATH": os.getcwd()},
        )
        deadline = time.monotonic() + 60
        while not (said.exists() and said.read_text() == "running"):
            assert time.monotonic() < deadline and client.poll() is None
            time.sleep(0.1)
        began = time.monotonic()
    finally:
        Stack(own.directory).down()
    assert said.read_text() == "saved" and time.monotonic() - began < 25
    assert client.wait(60), "it lost its job"
    assert pids(own.directory) == set()
    assert not temp_directory(own.directory).exists()
    assert list((own.directory / "logs" / "ray").glob("session_2*/raylet.out"))
