"""Generates images from prompts with one loaded model; shared by batch jobs, MLflow's loader and the online service.

An image depends only on the model and its `Request`: its noise is keyed by (seed, sample_id), and requests with equal
shape and sampler settings share a forward pass, which changes an image by float rounding at most.
"""

import io
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2f_core.model.artifact import DescribedModel, TrainedModel, to_uint8
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.config import TimeGrid
from d2f_core.model.sampling import SamplerChoice, check_solver, sample_latents
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.objective.solver import NonFiniteStateError
from d2f_core.randomness import keyed_normal

KEPT_PROMPTS = 256


class Shape(NamedTuple):
    """Settings that requests must have in common to be sampled in one batch."""

    solver: str
    steps: int
    guidance: float
    shift: float
    time_grid: TimeGrid
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image to generate, with all settings given."""

    sample_id: str
    """Key of the image's noise, together with `seed`."""
    prompt: str
    negative_prompt: str
    seed: int
    solver: str
    steps: int
    guidance: float
    shift: float
    time_grid: TimeGrid
    height: int
    """Height of the image in pixels."""
    width: int
    """Width of the image in pixels."""

    @property
    def shape(self) -> Shape:
        return Shape(self.solver, self.steps, self.guidance, self.shift, self.time_grid, self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Result of a request: image and latent, or the error."""

    request: Request
    noise: np.ndarray
    """float32 [channels, h, w]: the noise that the sampler started from."""
    latent: np.ndarray | None
    """float32 [channels, h, w], scaled as the UNet expects it."""
    pixels: np.ndarray | None
    """uint8 [height, width, 3]; None for a failed image, or if only latents were requested."""
    num_evaluations: int
    error: str | None
    seconds: float
    """Wall time of the batch, divided by the batch size."""


def fill_request(
    model: DescribedModel,
    *,
    prompt: str,
    negative_prompt: str = "",
    seed: int = 0,
    sample_id: str = "",
    solver: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    time_grid: TimeGrid | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Request:
    """A request with the model's defaults for missing settings.

    Args:
        sample_id: key of the noise; "" uses the prompt.
        height, width: pixels; None: the model's default. If only one is given, the image is square.

    Raises:
        ValueError: the model has another task, the solver is unknown or does not fit the model, steps are below 1, or
            the autoencoder cannot produce the size.
    """
    if model.task != "text_to_image":
        raise ValueError(
            f"This is a model of task={model.task!r}, which reads an image and no prompt. Use pipelines.predict_depth, "
            "or give a model of text to image."
        )
    carried = model.sampling
    height, width = _filled_size(model, height, width)
    choice = SamplerChoice(
        solver=solver or carried.solver,
        steps=carried.steps if steps is None else steps,
        guidance=carried.guidance if guidance is None else guidance,
        shift=carried.shift if shift is None else shift,
        time_grid=time_grid or carried.time_grid,
    )
    check_solver(model, choice.solver)
    return Request(
        sample_id=sample_id or prompt,
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        height=height,
        width=width,
        **asdict(choice),
    )


def _filled_size(model: DescribedModel, height: int | None, width: int | None) -> tuple[int, int]:
    if height is None and width is None:
        height, width = model.default_size
    height, width = height or width or 0, width or height or 0
    model.base.latent_shape(height, width)  # raises if the autoencoder cannot produce the size
    return height, width


def batches(requests: Iterable[Request], size: int) -> list[list[int]]:
    """Positions of the requests, grouped into batches of one shape; depends only on the requests' order."""
    groups: dict[Shape, list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(request.shape, []).append(position)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


class ImageSampler:
    """A model with its autoencoder and text encoder, ready to generate images.

    Raises:
        ValueError: the base has no autoencoder or text encoder.
    """

    def __init__(self, model: TrainedModel, *, device: str | torch.device = "cpu") -> None:
        self.model, self.device = model.to(device), device
        self._autoencoder = load_autoencoder(model.base, device=device)
        self._text_encoder = load_text_encoder(model.base, device=device)
        self._conditions: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def sample(self, requests: Sequence[Request], *, batch_size: int = 16, decode: bool = True) -> list[Sampled]:
        """Sample requests of any shapes; results are in the order of the requests."""
        made: dict[int, Sampled] = {}
        for positions in batches(requests, batch_size):
            done = self.sample_batch([requests[position] for position in positions], decode=decode)
            made |= dict(zip(positions, done, strict=True))
        return [made[position] for position in range(len(requests))]

    def sample_batch(self, requests: Sequence[Request], *, decode: bool = True) -> list[Sampled]:
        """Sample requests of one shape in one batch; if the network fails on the batch, each request is sampled by
        itself.
        """
        began = time.perf_counter()
        noise = self._noise(requests)
        try:
            latents, evaluations = self._latents(requests, noise)
        except NonFiniteStateError as error:
            if len(requests) > 1:  # a request that fails must not fail the others
                return [made for request in requests for made in self.sample_batch([request], decode=decode)]
            seconds = time.perf_counter() - began
            return [_failed(requests[0], noise[0], str(error), seconds)]
        pixels = self._autoencoder.decode(latents) if decode else None
        # Checked on the latents too, because decoding would clamp an infinite value to a valid pixel.
        finite = latents.flatten(1).isfinite().all(1)
        images = None
        if pixels is not None:
            finite &= pixels.flatten(1).isfinite().all(1)
            images = to_uint8(pixels.nan_to_num()).numpy()
        usable, values = finite.tolist(), latents.float().cpu().numpy()
        seconds = (time.perf_counter() - began) / len(requests)
        return [
            Sampled(
                request=request,
                noise=noise[row],
                latent=values[row],
                pixels=None if images is None else images[row],
                num_evaluations=evaluations,
                error=None,
                seconds=seconds,
            )
            if usable[row]
            else _failed(request, noise[row], "the image is not finite", seconds, evaluations)
            for row, request in enumerate(requests)
        ]

    def _noise(self, requests: Sequence[Request]) -> np.ndarray:
        shape = self.model.base.latent_shape(requests[0].height, requests[0].width)
        return np.concatenate([keyed_normal(request.seed, [request.sample_id], shape) for request in requests])

    def _latents(self, requests: Sequence[Request], noise: np.ndarray) -> tuple[Tensor, int]:
        shape = requests[0].shape
        if any(request.shape != shape for request in requests):
            raise ValueError(f"requests of shapes {sorted({r.shape for r in requests})} in one batch. Use `make`.")
        return sample_latents(
            self.model,
            torch.from_numpy(noise).to(self.device),
            self._condition([request.prompt for request in requests]),
            self._condition([request.negative_prompt for request in requests]),
            solver=shape.solver,
            steps=shape.steps,
            guidance=shape.guidance,
            shift=shape.shift,
            time_grid=shape.time_grid,
        )

    def _condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The captions' condition, tensors [len(captions), ...] by the denoiser's argument names; each caption is
        encoded once, alone.

        Alone, because in a batch its states would depend, by rounding, on which captions were already cached.
        """
        for caption in captions:
            if caption not in self._conditions:
                self._conditions[caption] = self._text_encoder.condition([caption])
            self._conditions.move_to_end(caption)
        conditions = [self._conditions[caption] for caption in captions]
        while len(self._conditions) > KEPT_PROMPTS:
            self._conditions.popitem(last=False)
        return {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}


def encode_image(pixels: np.ndarray, format: str = "png", **options: int) -> bytes:
    """Pixels uint8 [height, width, 3] as the bytes of a png, webp or jpeg file; `options` are those of Pillow."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format=format.upper(), **options)
    return sink.getvalue()


def _failed(request: Request, noise: np.ndarray, error: str, seconds: float, evaluations: int = 0) -> Sampled:
    return Sampled(
        request=request, noise=noise, latent=None, pixels=None, num_evaluations=evaluations, error=error,
        seconds=seconds,
    )  # fmt: skip
