"""The online service, as its command runs it: the batch job's images, drawn together, for those who have the token."""

import base64
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import requests
from PIL import Image

from d2f_core.flow.generate.sampler import ImageSampler, fill_request
from d2f_core.flow.serve.config import ServeConfig, ServeError
from d2f_core.flow.serve.request import RequestError, parse_request
from d2f_core.flow.serve.service import ServeJob, Token, check_room, is_running, obtain_token, service
from d2f_core.model.artifact import load_model
from infra.local.stack import StackEnv
from tests.flow.tiny_base import write_tiny_base
from tests.infra.servers import listening, pids
from tests.pending_groups import PendingGroups, groups, node

__all__ = ["groups"]
pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
LIMITS = ServeConfig(model="x", max_steps=400, max_images=3, max_pixels=64 * 64)


@dataclass(frozen=True, kw_only=True)
class Running:
    process: subprocess.Popen[str]
    url: str
    token: str
    base: Path
    log: Path

    def post(self, body: Any = None, *, token: str | None = None, **how: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {token or self.token}", **how.pop("headers", {})}
        return requests.post(f"{self.url}/v1/images", json=body, headers=headers, timeout=280, **how)

    def model(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"}
        return requests.get(f"{self.url}/v1/model", headers=headers, timeout=60).json()


@pytest.fixture(scope="module")
def running(stack: StackEnv, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The command on the stack's Ray: one replica, four images at most in a batch, four at most waiting."""
    home = tmp_path_factory.mktemp("serve")
    base = write_tiny_base(home / "base")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments = {
        "--model": base, "--port": port, "--max-batch-size": 4, "--batch-wait-seconds": 0.3, "--max-queue": 4,
        "--max-steps": 400, "--max-images": 3, "--max-pixels": 64 * 64, "--request-seconds": 250,
    }  # fmt: skip
    command = [sys.executable, "-m", "pipelines.serve", *(str(part) for pair in arguments.items() for part in pair)]
    environment = {**os.environ, **stack.variables, "D2F_CACHE": str(home / "cache")}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout
            lines = (line for line in process.stdout if line.startswith(str(base)))
            line = next(lines, "")
            assert line, (home / "log").read_text()[-3000:]
            url = f"http://127.0.0.1:{port}"
            token_file = Path(re.search(r"the token is in (\S+);", line)[1])  # pyright: ignore[reportOptionalSubscript]
            assert f"{url}/v1/images" in line and token_file.stat().st_mode & 0o777 == 0o600
            token = token_file.read_text().strip()
            assert token not in line
            yield Running(process=process, url=url, token=token, base=base, log=home / "log")
        finally:
            process.terminate()
            process.wait(60)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def expected(base: Path, **fields: Any) -> np.ndarray:
    model = load_model(str(base))
    (made,) = ImageSampler(model).sample([fill_request(model, **fields)])
    assert made.pixels is not None
    return made.pixels


def close(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal up to float rounding: another number of threads, or of images in a batch, sums in another order."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other).max()) <= 1


def test_an_image_is_the_one_that_the_batch_job_draws(running: Running) -> None:
    fields = {"prompt": "cat", "negative_prompt": "dog", "seed": 7, "sample_id": "id7", "steps": 3, "height": 16}
    fields |= {"guidance": 2.5, "width": 24, "solver": "heun", "shift": 1.5, "time_grid": "beta"}
    (image,) = running.post(fields).json()["images"]
    wanted = expected(running.base, **fields)
    assert close(pixels(base64.b64decode(image["png"])), wanted) and wanted.shape == (16, 24, 3)
    assert {name: image[name] for name in fields} == fields and image["num_evaluations"] == 6
    file = running.post(fields, headers={"Accept": "image/png"})
    assert file.headers["content-type"] == "image/png" and close(pixels(file.content), wanted)


def test_images_of_one_request_have_seeds_of_their_own(running: Running) -> None:
    answer = running.post({"prompt": "cat", "seed": 5, "steps": 2, "num_images": 3}).json()["images"]
    assert [image["seed"] for image in answer] == [5, 6, 7]
    for image in answer:
        alone = expected(running.base, prompt="cat", seed=image["seed"], steps=2)
        assert close(pixels(base64.b64decode(image["png"])), alone)


def test_requests_that_come_together_are_drawn_together_whatever_their_shapes(running: Running) -> None:
    before = running.model()["counts"]
    wanted = [{"prompt": f"cat {n}", "seed": n, "steps": 2 + n % 2, "height": 16 + 8 * (n % 2)} for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(running.post, wanted))
    after = running.model()["counts"]
    assert after["images"] - before["images"] == 4
    assert after["batches"] - before["batches"] < 4
    for fields, answer in zip(wanted, answers, strict=True):
        (image,) = answer.json()["images"]
        assert close(pixels(base64.b64decode(image["png"])), expected(running.base, **fields))


def test_the_model_is_described_with_its_defaults_and_the_limits(running: Running) -> None:
    described = running.model()
    assert (
        described["model"] == str(running.base) and described["sha256"] == load_model(described["model"]).content_hash
    )
    assert described["defaults"] == {
        "solver": "ddim", "steps": 25, "guidance": 3.0, "shift": 1.0, "time_grid": "uniform", "height": 16, "width": 16,
    }  # fmt: skip
    assert described["limits"]["max_steps"] == 400


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic {}", "{}", "Bearer {}x", "Bearer \xff"])
def test_without_the_token_there_is_only_the_health(running: Running, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.format(running.token).encode("latin-1")}
    for method, path in (("POST", "/v1/images"), ("GET", "/v1/model"), ("GET", "/docs"), ("GET", "/")):
        answer = requests.request(method, running.url + path, data=b"{", headers=headers, timeout=60)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert requests.get(f"{running.url}/healthz", headers=headers, timeout=60).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a", "solver": "eulr"}, r"solver='eulr' is not known\. Use one of"),
        ({"prompt": "a", "height": 17}, r"height=17 must be a multiple of the autoencoder's 2 pixels"),
        ({"prompt": "a", "shift": 0}, r"shift=0.* must be a number above 0"),
        ({"prompt": "a", "time_grid": "even"}, r"time_grid='even' is not known\. Use one of uniform, beta"),
        ({"prompt": "a", "guidance": 1e38}, r"not finite"),
        ({"prompt": "a", "num_inference_steps": 3}, r"Unknown fields \['num_inference_steps'\]"),
    ],
)
def test_what_the_model_cannot_do_is_answered_with_value_rule_and_fix(running: Running, body, message) -> None:
    answer = running.post(body)
    assert answer.status_code == 422 and re.search(message, answer.json()["error"])


def test_other_paths_and_methods_are_named(running: Running) -> None:
    headers = {"Authorization": f"Bearer {running.token}"}
    answer = requests.get(f"{running.url}/v1/images", headers=headers, timeout=60)
    assert answer.status_code == 404 and "POST /v1/images" in answer.json()["error"]


def test_a_body_beyond_the_limit_is_refused_by_its_length_or_while_it_comes(running: Running) -> None:
    body = json.dumps({"prompt": "a" * 100_000}).encode()
    assert running.post(data=body).status_code == 413
    parts = (b" " * 10_000 for _ in range(1000))  # without a length
    assert running.post(data=parts).status_code == 413


def test_one_png_cannot_hold_two_images(running: Running) -> None:
    answer = running.post({"prompt": "a", "num_images": 2}, headers={"Accept": "image/png"})
    assert answer.status_code == 422 and "Ask for 1, or accept JSON" in answer.json()["error"]


def test_more_than_can_wait_is_sent_away_and_the_rest_is_drawn(running: Running) -> None:
    slow = {"prompt": "cat", "steps": 100, "sample_id": "slow"}
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(running.post, [{**slow, "seed": n} for n in range(24)]))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503} and codes.count(200) >= 4, codes
    assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 503} == {"2"}
    assert "images are waiting already" in next(a.json()["error"] for a in answers if a.status_code == 503)
    assert running.post({"prompt": "cat", "steps": 1}).status_code == 200


def test_with_the_service_too_everything_listens_on_this_machine_only(running: Running, stack: StackEnv) -> None:
    addresses = listening(pids(stack.directory))
    assert {ip.removeprefix("::ffff:") for ip, _ in addresses} == {"127.0.0.1"}
    assert int(running.url.rpartition(":")[2]) in {port for _, port in addresses}


def test_replicas_ask_for_rays_token_before_they_unpickle_anything(running: Running, stack: StackEnv) -> None:
    replicas = {process.pid for process in psutil.process_iter(["name", "cmdline"]) if is_replica(process)}
    ports = {port for _, port in listening(replicas & pids(stack.directory))}
    codes = {code_of_a_stranger(port) for port in ports}
    assert grpc.StatusCode.UNAUTHENTICATED in codes and grpc.StatusCode.OK not in codes
    assert "planted" not in running.log.read_text()


def is_replica(process: psutil.Process) -> bool:
    return "ServeReplica:diff2flow" in " ".join(process.info["cmdline"] or [process.info["name"]])


def code_of_a_stranger(port: int) -> grpc.StatusCode:
    """What a replica's port answers to a call without the token whose contents print when they are unpickled."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        try:
            call(b"\x0a\x1dcbuiltins\nprint\n(Vplanted\ntR.", timeout=20)
        except grpc.RpcError as error:
            return error.code()  # pyright: ignore[reportAttributeAccessIssue]
    return grpc.StatusCode.OK


def test_there_is_one_service_on_a_cluster_which_ends_with_its_command(running: Running, stack: StackEnv) -> None:
    import ray

    del stack
    ray.init(ignore_reinit_error=True)
    try:
        job = ServeJob(config=ServeConfig(model=str(running.base)), model_uri=str(running.base), model_hash="")
        with pytest.raises(ServeError, match=r"runs on this cluster already \(applications: diff2flow\)"):
            with service(job, Token(digest=b"", source="")):
                pass
        assert running.post({"prompt": "cat", "steps": 1}).status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(120) == 0, running.log.read_text()[-3000:]
        assert running.process.stdout and "the service has ended" in running.process.stdout.read()
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{running.url}/healthz", timeout=5)
        assert not is_running()
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is not JSON"),
        (b"{", "The body is not JSON"),
        (b"\xff\xfe", "The body is not JSON"),
        (b"[" * 50_000, "The body is not JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "The body is not JSON"),
        (b'{"prompt": "a", "guidance": NaN}', "NaN is no number"),
        (b'["a"]', "The body is a list"),
        (b"{}", "prompt is missing or empty"),
        (b'{"prompt": ""}', "prompt is missing or empty"),
        (b'{"prompt": 5}', "prompt=5 must be text"),
        (b'{"prompt": "\\ud800"}', "must be text of whole characters"),
        (b'{"prompt": "a", "guidance": 1e999}', "guidance=inf must be a finite number"),
        (b'{"prompt": "a", "guidance": true}', "guidance=True must be a finite number"),
        (b'{"prompt": "a", "guidance": ' + b"9" * 400 + b"}", "must be a finite number"),
        (b'{"prompt": "a", "steps": 2.5}', "steps=2.5 must be a whole number"),
        (b'{"prompt": "a", "steps": 0}', "steps=0 must be a whole number of at least 1"),
        (b'{"prompt": "a", "steps": 401}', "steps=401 is above 400"),
        (b'{"prompt": "a", "seed": -1}', "seed=-1 must be a whole number of at least 0"),
        (b'{"prompt": "a", "seed": 9223372036854775808}', "seed=9223372036854775808 must be a whole number"),
        (b'{"prompt": "a", "num_images": 4}', "num_images=4 is above 3"),
        (b'{"prompt": "a", "height": 128, "width": 64}', "128 x 64 pixels are above 4096"),
        (b'{"prompt": "a", "height": 128}', "128 x 128 pixels are above 4096"),
        (b'{"prompt": "a", "sample_id": "../../a"}', "sample_id='../../a' must be"),
        (b'{"prompt": "a", "solver": "dopri5"}', "takes as many steps as it likes"),
        (b'{"prompt": "' + b"a" * 1001 + b'"}', "prompt has 1001 characters; this service takes 1000"),
    ],
)
def test_a_body_that_asks_for_nonsense_or_too_much_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(body, LIMITS)
    assert message in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host": "0.0.0.0"}, "reached from other machines"),
        ({"host": "::"}, "reached from other machines"),
        ({"host": "example.org"}, "reached from other machines"),
        ({"port": 80}, "port=80 must be a number from 1024"),
        ({"max_queue": 3}, "max_queue=3 is below max_images=4"),
        ({"replicas": 0}, "replicas=0 must be at least 1"),
        ({"request_seconds": 0}, "request_seconds=0 must be above 0"),
        ({"cpus_per_replica": -1}, "cpus_per_replica=-1 must not be negative"),
        ({"batch_wait_seconds": -0.1}, "batch_wait_seconds=-0.1 must not be negative"),
    ],
)
def test_a_service_that_would_be_open_or_senseless_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        ServeConfig(model="x", **change)


def test_replicas_that_fit_on_no_node_are_refused_in_one_line(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 2.0}), node({"CPU": 4.0}, free={"CPU": 1.0})]}
    with pytest.raises(ServeError, match=r"^replicas=2 need 6 CPU .* hold 3 CPU: .* for 2 replicas of 3 CPU;"):
        check_room(ServeConfig(model="x", replicas=2, cpus_per_replica=3))
    check_room(ServeConfig(model="x", replicas=3))
    check_room(ServeConfig(model="x", replicas=9, cpus_per_replica=0))
    assert not groups.alive, "nothing stays held"


def test_the_room_of_a_service_that_is_replaced_is_waited_for(groups: PendingGroups) -> None:
    groups.nodes = {0: [node({"CPU": 2.0}, free={})], 3: [node({"CPU": 2.0})]}
    check_room(ServeConfig(model="x", replace=True))
    assert groups.now == 3


def token_of(monkeypatch: pytest.MonkeyPatch, cache: Path, given: str = "", **config: Any) -> Token:
    monkeypatch.setenv("D2F_CACHE", str(cache))
    monkeypatch.setenv("D2F_SERVE_TOKEN", given)
    return obtain_token(ServeConfig(model="x", **config))


def test_other_machines_are_served_only_with_a_token_that_the_user_chose(monkeypatch, tmp_path: Path) -> None:
    open_to_all = {"host": "0.0.0.0", "allow_external": True}
    with pytest.raises(ServeError, match=r"needs a token that you chose\. Set D2F_SERVE_TOKEN"):
        token_of(monkeypatch, tmp_path, **open_to_all)
    assert token_of(monkeypatch, tmp_path, "0123456789abcdef", **open_to_all).source == "D2F_SERVE_TOKEN"
    assert "D2F_SERVE_TOKEN" not in os.environ


def test_a_token_that_is_made_stays_the_same_and_is_the_users_alone(monkeypatch, tmp_path: Path) -> None:
    first, second = token_of(monkeypatch, tmp_path / "a"), token_of(monkeypatch, tmp_path / "a")
    assert first == second != token_of(monkeypatch, tmp_path / "b")
    file = Path(first.source)
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_text().strip()) >= 40
    file.chmod(0o640)
    with pytest.raises(ServeError, match="chmod 600"):
        token_of(monkeypatch, tmp_path / "a")


@pytest.mark.parametrize("text", ["short", "with a space in it, and long", "umlaut-ü-umlaut-ü", "x" * 513])
def test_a_token_that_is_none_is_refused_without_being_shown(monkeypatch, tmp_path: Path, text: str) -> None:
    with pytest.raises(ServeError, match=f"has {len(text)} characters") as caught:
        token_of(monkeypatch, tmp_path, text)
    assert text not in str(caught.value)


def test_a_token_file_goes_before_the_variable_and_one_that_is_missing_is_named(monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(ServeError, match=r"token cannot be read \(FileNotFoundError\)\. Give --token-file another"):
        token_of(monkeypatch, tmp_path, token_file=str(file))
    file.write_text("fedcba9876543210\n")
    file.chmod(0o600)
    found = token_of(monkeypatch, tmp_path, "0123456789abcdef", token_file=str(file))
    assert found == Token(digest=hashlib.sha256(b"fedcba9876543210").digest(), source=str(file))
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(ServeError, match="UnicodeDecodeError"):
        token_of(monkeypatch, tmp_path, token_file=str(file))
