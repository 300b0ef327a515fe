"""Whoever is on this machine but has no token, key or signature gets nothing from the stack's servers."""

import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from infra.local.stack import StackEnv
from infra.local.state import load_state
from tests.infra.servers import listening, pids, status_of

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("token", [None, "wrong"])
@pytest.mark.parametrize(
    "path",
    [
        "/api/jobs/",
        "/nodes?view=summary",
        "/api/v0/actors",
        "/api/v0/logs",
        "/logical/actors",
        "/api/serve/applications/",
    ],
)
def test_ray_tells_nothing_without_its_token(stack: StackEnv, path: str, token: str | None) -> None:
    assert status_of(stack.variables["RAY_API_SERVER_ADDRESS"] + path, token=token) in (401, 403)


def test_a_driver_without_the_token_cannot_join(stack: StackEnv) -> None:
    code = "import ray; ray.init(log_to_driver=False); print('JOINED', ray.cluster_resources())"
    kept = {key: value for key, value in {**os.environ, **stack.variables}.items() if not key.startswith("RAY_AUTH")}
    environment = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode != 0 and "JOINED" not in result.stdout
    assert load_state(stack.directory).ray_token not in result.stdout + result.stderr


@pytest.mark.parametrize("port", ["s3", "s3_filer"])
def test_s3_gives_no_listing_without_a_signature(stack: StackEnv, port: str) -> None:
    state = load_state(stack.directory)
    assert status_of(f"{state.url(port)}/{'' if port == 's3' else 'buckets/'}d2f/") in (401, 403)


def test_mlflow_refuses_a_page_that_renamed_itself_to_this_machine(stack: StackEnv) -> None:
    """A name that an attacker's DNS points at 127.0.0.1 is how a web page reaches a local server."""
    url = f"{stack.variables['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=1"
    assert status_of(url) == 200
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "rebound.example"}), timeout=30)
    assert caught.value.code in (400, 403)


def test_workers_and_their_metrics_listen_on_this_machine_only(stack: StackEnv, cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Held:
        def port_of_nothing(self) -> int:
            return os.getpid()

    held = [Held.remote() for _ in range(2)]
    workers = set(ray.get([actor.port_of_nothing.remote() for actor in held]))
    everyone = pids(stack.directory)
    assert workers <= everyone
    assert {ip.removeprefix("::ffff:") for ip, _ in listening(everyone)} == {"127.0.0.1"}
