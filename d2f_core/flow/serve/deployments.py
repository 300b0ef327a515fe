"""The two deployments of the online service: an ingress that checks requests, and replicas that hold the model.

The ingress reserves no CPU and answers even while every replica is busy. Replicas batch concurrent requests; images
equal those of the batch job for the same seed, sample_id and settings, up to float rounding.
"""

import asyncio
import hashlib
import hmac
import logging
from base64 import b64encode
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.util
import torch
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from d2f_core.device import reserved_device
from d2f_core.flow.generate.sampler import ImageSampler, Request, Sampled, encode_image, fill_request
from d2f_core.flow.serve.config import ServeConfig
from d2f_core.flow.serve.request import RequestError, parse_request
from d2f_core.model.artifact import load_model
from d2f_core.ray_internals import bind_replica_port
from d2f_core.tracking import resolve_model

logger = logging.getLogger(__name__)

RETRY_SECONDS = "2"


class BodyTooLargeError(Exception):
    """A request body exceeds the limit; the rest is not read."""


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """A replica's result: an image, or the error."""

    png: bytes = b""
    settings: dict[str, Any]
    """All settings used."""
    batch_images: int = 0
    """Number of images in the batch, this one included."""
    refused: str = ""
    """Why the request is invalid; "" if it is valid."""
    failed: str = ""
    """Why the image could not be generated; "" if it was."""


def _listen_on_the_nodes_address_only() -> None:
    """Bind this replica's gRPC port to the node's address instead of every network interface.

    Ray Serve 2.60 has no setting for it. Messages on this port are unpickled (after a check of Ray's token, if one is
    set), so with 127.0.0.1 as the node's address no other machine should reach it. Must be called before the replica is
    ready.
    """
    bind_replica_port(ray.util.get_node_ip_address())


class ImageReplica:
    """Serve deployment that holds the model and generates concurrent requests in one batch."""

    def __init__(self, model_uri: str, model_hash: str, config: ServeConfig) -> None:
        _listen_on_the_nodes_address_only()
        torch.set_num_threads(max(1, int(config.cpus_per_replica)))
        model = load_model(resolve_model(model_uri), base_prediction=config.base_prediction)
        if model.content_hash != model_hash:
            raise ValueError(
                f"{model_uri!r} has the hash {model.content_hash} on this node, and {model_hash} where the command "
                "runs. Put the model where every node reads the same files: s3:// or models:/."
            )
        self.config, self.model_uri = config, model_uri
        self.sampler = ImageSampler(model, device=reserved_device())
        self.images = self.batches = 0
        batching: Any = self._draw_together
        batching.set_max_batch_size(config.max_batch_size)
        batching.set_batch_wait_timeout_s(config.batch_wait_seconds)

    async def draw(self, fields: dict[str, Any]) -> ImageResult:
        """Generate one image, as part of the next batch."""
        try:
            request = fill_request(self.sampler.model, **fields)
        except ValueError as error:
            return ImageResult(refused=str(error), settings={})
        return await self._draw_together(request)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.0)
    async def _draw_together(self, requests: list[Request]) -> list[ImageResult]:
        # In a thread, so that further requests can be accepted; Serve runs one batch at a time.
        drawn = await asyncio.to_thread(self._draw, requests)
        self.images, self.batches = self.images + len(requests), self.batches + 1
        return drawn

    def _draw(self, requests: list[Request]) -> list[ImageResult]:
        made = self.sampler.sample(requests, batch_size=self.config.max_batch_size)
        return [_drawn(one, len(requests)) for one in made]

    async def describe(self) -> dict[str, Any]:
        """The model, its default sampling settings, and this replica's counts since it started."""
        model = self.sampler.model
        sampling = asdict(model.sampling)
        del sampling["resolution"]
        sampling["height"], sampling["width"] = model.default_size
        return {
            "model": self.model_uri,
            "sha256": model.content_hash,
            "objective": model.objective,
            "defaults": sampling,
            "counts": {"images": self.images, "batches": self.batches},
        }


def _drawn(made: Sampled, together: int) -> ImageResult:
    settings = {**asdict(made.request), "num_evaluations": made.num_evaluations}
    if made.pixels is None:
        return ImageResult(failed=made.error or "no image", settings=settings)
    return ImageResult(png=encode_image(made.pixels), settings=settings, batch_images=together)


class Ingress:
    """Serve deployment that checks the token and whatever needs no model, then forwards requests to the replicas."""

    def __init__(self, painters: DeploymentHandle, token_digest: bytes, config: ServeConfig) -> None:
        _listen_on_the_nodes_address_only()
        self.painters, self.token_digest, self.config = painters, token_digest, config
        self.routes = {("POST", "/v1/images"): self._images, ("GET", "/v1/model"): self._model}

    async def __call__(self, request: HttpRequest) -> Response:
        method, path = request.method, request.scope["path"]
        if path == "/healthz":
            return JSONResponse({"status": "ok"})
        if not self._has_token(request):
            return _refusal(
                401, "No valid token. Send the header Authorization: Bearer TOKEN.", {"WWW-Authenticate": "Bearer"}
            )
        route = self.routes.get((method, path))
        if route is None:
            known = ", ".join(" ".join(key) for key in self.routes)
            return _refusal(404, f"There is no {method} here by that path. What there is: {known}, GET /healthz.")
        try:
            async with asyncio.timeout(self.config.request_seconds):
                return await route(request)
        except RequestError as error:
            return _refusal(422, str(error))
        except BodyTooLargeError:
            return _refusal(413, f"The body has more than {self.config.max_body_bytes} bytes. Send a smaller one.")
        except (BackPressureError, DeploymentUnavailableError) as error:
            full = isinstance(error, BackPressureError)
            text = f"{self.config.max_queue} images are waiting already" if full else "No replica is up"
            text = f"{text}. Try again later."
            return _refusal(503, text, {"Retry-After": RETRY_SECONDS})
        except TimeoutError:
            text = (
                f"Not done in {self.config.request_seconds:g} s, the most that a request may take. Ask for fewer steps."
            )
            return _refusal(504, text, {"Retry-After": RETRY_SECONDS})
        except Exception:
            logger.exception("a request failed")  # clients must not see the cause
            return _refusal(500, "The service failed; its log says why. Try again, or tell whoever runs it.")

    def _has_token(self, request: HttpRequest) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        # Hashes have equal length, so the time of the comparison reveals nothing about the token.
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        return scheme.lower() == "bearer" and hmac.compare_digest(digest, self.token_digest)

    async def _model(self, _: HttpRequest) -> Response:
        limits = ("max_prompt_characters", "max_steps", "max_pixels", "max_images", "max_body_bytes", "request_seconds")
        described = await self.painters.describe.remote()
        return JSONResponse({**described, "limits": {name: getattr(self.config, name) for name in limits}})

    async def _images(self, request: HttpRequest) -> Response:
        wanted = parse_request(await _body(request, self.config.max_body_bytes), self.config)
        as_file = "image/png" in request.headers.get("accept", "")
        if as_file and len(wanted) > 1:
            raise RequestError(f"num_images={len(wanted)} do not fit into one PNG. Ask for 1, or accept JSON.")
        drawn = await self._draw(wanted)
        for one in drawn:
            if one.refused:
                raise RequestError(one.refused)
            if one.failed:
                return _refusal(422, f"{one.failed}. Lower guidance, or try another solver.")
        if as_file:
            return Response(drawn[0].png, media_type="image/png")
        images = [
            {**one.settings, "batch_images": one.batch_images, "png": b64encode(one.png).decode()} for one in drawn
        ]
        return JSONResponse({"images": images})

    async def _draw(self, wanted: list[dict[str, Any]]) -> list[ImageResult]:
        answers = [self.painters.draw.remote(fields) for fields in wanted]
        try:
            return list(await asyncio.gather(*answers))
        except BaseException:  # timeout, disconnected client or full queue: cancel the others
            for answer in answers:
                answer.cancel()
            raise


async def _body(request: HttpRequest, most: int) -> bytes:
    """Read the whole body. Raises BodyTooLargeError as soon as it exceeds `most` bytes."""
    if int(request.headers.get("content-length", 0)) > most:
        raise BodyTooLargeError
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise BodyTooLargeError
    return bytes(data)


def _refusal(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": text}, status, headers)
