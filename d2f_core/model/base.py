"""A base model by URI: a directory in diffusers' layout, local, on S3 or on a hub, and its content hash; or one file.

model_index.json  unet/  vae/  scheduler/scheduler_config.json  text_encoder/  tokenizer/
SDXL also has text_encoder_2/  tokenizer_2/
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from d2f_core import storage
from d2f_core.cache import kept, make_room
from d2f_core.hashing import cache_root, one_at_a_time
from d2f_core.model.base_kinds import why_not
from d2f_core.model.caption_rules import DEFAULT, CaptionRules
from d2f_core.model.hub import HubError, UnreachableHub, fetch, is_hub_id
from d2f_core.model.model_files import ModelFiles, describe_tree
from d2f_core.model.plain_json import parse
from d2f_core.model.single_file.keys import LayoutError
from d2f_core.model.single_file.read import converted, is_single_file
from d2f_core.model.weight_files import read_files
from d2f_core.objective.schedule import FLOW_PREDICTION, Schedule, ScheduleError, prediction_type_of, read_schedule
from d2f_core.retry import UnreachableError

PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
IMPORT_RECORD = "import.json"
"""Beside the parts of a base that was imported: of what it was made."""
SDXL_PARTS = ("text_encoder_2", "tokenizer_2")
"""Apart, because no other family has or misses them."""
PROJECT_ROOT = Path(__file__).parents[2]
"""Relative directories are also looked up here, because a Ray worker has another working directory."""


class BaseModelError(ValueError):
    """A base model that cannot be used, with the reason and the fix."""


class UnreachableHubError(BaseModelError, UnreachableError):
    """The model hub was away for longer than repetitions bridge."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A verified base model on this machine's disk, whole or described."""

    uri: str
    """The URI as it was given."""
    files: ModelFiles
    prediction_type: str
    """epsilon, v_prediction, sample or flow_prediction (a rectified-flow model), as diffusers spells it."""
    scheduler_config: Mapping[str, Any]
    told: bool = False
    """Whether somebody said what it predicts, besides the scheduler config."""
    original_hash: str = ""
    """Content hash of the base whose parts were copied here, if this is an export; empty: that of the files."""
    captions: CaptionRules = DEFAULT
    """How captions are read; of a trained model's base, as the model was trained."""

    def read_as(self, prediction_type: str) -> "BaseModel":
        """The base with the prediction type that the user, or a model trained on it, says; itself if that is empty.

        Raises:
            ScheduleError: the scheduler config cannot be used with it.
        """
        if not prediction_type:
            return self
        if prediction_type == self.prediction_type:
            return dataclasses.replace(self, told=True)
        config = {**self.scheduler_config, "prediction_type": prediction_type}
        if FLOW_PREDICTION in (prediction_type, self.prediction_type):
            config.pop("use_flow_sigmas", None)
            if str(config.get("_class_name", "")).startswith("FlowMatch"):
                raise ScheduleError(
                    f"{self.uri!r} has the scheduler {config['_class_name']} of a flow model, without noise levels, so "
                    f"that it cannot be read as {prediction_type}. Replace scheduler/ by that of the original model."
                )
        read_schedule(config)
        return dataclasses.replace(self, prediction_type=prediction_type, scheduler_config=config, told=True)

    def read_captions(self, rules: CaptionRules) -> "BaseModel":
        """The base with captions read by these rules."""
        return self if rules == self.captions else dataclasses.replace(self, captions=rules)

    @property
    def path(self) -> Path:
        """The model's directory on this machine."""
        return self.files.path

    @cached_property
    def content_hash(self) -> str:
        """sha256 over names and contents of the model's configs and safetensors, which are read when it is asked for;
        of an export, that of its base.

        Raises:
            UnreachableError: S3, where the files of a described base lie, stays away.
        """
        return self.original_hash or self.files.hash(*PARTS, *SDXL_PARTS)

    @cached_property
    def read_hash(self) -> str:
        """Like `content_hash`, of the files alone that are read when the base is loaded: a second variant of its
        weights or a note beside them does not change it. The same hash where there are none such.
        """
        return self.original_hash or self.files.hash(*PARTS, *SDXL_PARTS, chosen=read_files(self.path).__contains__)

    def has_hash(self, recorded: str) -> bool:
        """Whether a trained model that recorded this hash was trained on this base."""
        return recorded in (self.content_hash, self.read_hash)

    @property
    def schedule(self) -> Schedule:
        return read_schedule(self.scheduler_config)

    @property
    def is_flow(self) -> bool:
        """Whether it is a flow model already, so that there is nothing to align."""
        return self.prediction_type == FLOW_PREDICTION

    @property
    def pixels_per_latent(self) -> int:
        """Pixels per latent along one side, by the autoencoder's config."""
        file = self.path / "vae/config.json"
        if not file.is_file():
            raise BaseModelError(f"{self.uri!r} has no vae/config.json. Copy the vae directory of the original model.")
        return 2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the UNet was trained on."""
        size = self._unet_config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pixels_per_latent, width * self.pixels_per_latent

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of images of `height` x `width` pixels.

        Raises:
            BaseModelError: the autoencoder's downsampling does not divide the size.
        """
        unit = self.pixels_per_latent
        for name, value in (("height", height), ("width", width)):
            if value < unit or value % unit:
                raise BaseModelError(f"{name}={value} must be a multiple of the autoencoder's {unit} pixels.")
        return int(self._unet_config["out_channels"]), height // unit, width // unit

    @property
    def _unet_config(self) -> dict[str, Any]:
        return json.loads((self.path / "unet/config.json").read_text())


def schedule_hash(scheduler_config: Mapping[str, Any]) -> str:
    """sha256 of a scheduler config, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(dict(scheduler_config), sort_keys=True).encode()).hexdigest()


def is_sdxl(unet_config: Mapping[str, Any]) -> bool:
    """Whether a UNet is SDXL's kind, which reads pooled text and image sizes in addition to the text states."""
    return unet_config.get("addition_embed_type") == "text_time"


def local_copy(uri: str, *, cache_dir: Path | None = None, chosen: Callable[[str], bool] | None = None) -> Path:
    """A local directory with the contents of `uri`; S3 prefixes are downloaded once per version of their objects, and
    single-file checkpoints are converted once.

    Outages of S3 and of the hub are waited for: whoever must refuse within seconds calls `storage.check_reachable`.

    Args:
        chosen: of a file's name in the directory, whether it is copied from S3; None: all are.

    Raises:
        BaseModelError: nothing is there, or the hub refuses it.
        UnreachableError: S3 or the hub stays away.
    """
    if is_single_file(uri) and not Path(uri).is_dir():
        return _converted(uri, cache_dir)
    if uri.startswith("s3://"):
        _, version = _listed(uri, chosen)
        target = (cache_dir or cache_root()) / "models" / version
        with one_at_a_time(target):
            if not target.is_dir():
                storage.download_tree(uri, target, chosen)
            kept(target, uri)
        make_room(target.parent)
        return target
    local = Path(uri.removeprefix("file://")).expanduser()
    for place in (local, PROJECT_ROOT / local):
        if place.is_dir():
            return place
    if is_hub_id(uri):
        return _from_hub(uri)
    raise BaseModelError(
        f"No directory {uri!r}. Give a local directory, an s3:// prefix, or a hub id such as owner/name or "
        "owner/name@revision."
    )


def _converted(uri: str, cache_dir: Path | None) -> Path:
    """The directory that a single-file checkpoint is converted to."""
    local = Path(uri.removeprefix("file://")).expanduser()
    here = next((place for place in (local, PROJECT_ROOT / local) if place.is_file()), local)
    try:
        return converted(uri if storage.is_s3(uri) else str(here), cache_dir=cache_dir)
    except LayoutError as error:
        raise BaseModelError(f"{uri!r} {error}") from None


def _listed(uri: str, chosen: Callable[[str], bool] | None = None) -> tuple[dict[str, dict[str, Any]], str]:
    """The objects under an s3:// prefix as `storage.list_tree` gives them, and the name of their present version."""
    found = storage.list_tree(uri, chosen)
    listing = sorted((name, info.get("ETag"), info["size"]) for name, info in found.items())
    if not listing:
        raise BaseModelError(f"{uri!r} holds no files. Check the URI, or upload the model there first.")
    return found, hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]


def described_copy(uri: str, *, cache_dir: Path | None = None) -> ModelFiles:
    """Like `local_copy`, but of weights in a directory on S3 only the headers are copied, unless this machine has them
    already.
    """
    if not uri.startswith("s3://") or is_single_file(uri):
        return ModelFiles(path=local_copy(uri, cache_dir=cache_dir))
    found, version = _listed(uri)
    root = cache_dir or cache_root()
    if (whole := root / "models" / version).is_dir():
        with one_at_a_time(whole):
            if whole.is_dir():
                return ModelFiles(path=kept(whole, uri))
    with one_at_a_time(root / "described" / version):
        return describe_tree(uri, found, root / "described" / version)


def _from_hub(uri: str) -> Path:
    try:
        return fetch(uri, (*PARTS, *SDXL_PARTS))
    except HubError as error:
        kind = UnreachableHubError if isinstance(error, UnreachableHub) else BaseModelError
        raise kind(f"{uri!r} {error}") from error.__cause__


def resolve_base(uri: str, *, cache_dir: Path | None = None) -> BaseModel:
    """Fetch and check a base model.

    Raises:
        BaseModelError: nothing there, or a needed part is missing.
        UnreachableError: S3 or the hub stays away.
        ScheduleError: the scheduler config cannot be used.
    """
    return _checked(uri, ModelFiles(path=local_copy(uri, cache_dir=cache_dir)))


def describe_base(uri: str, *, cache_dir: Path | None = None) -> BaseModel:
    """Like `resolve_base`, for a machine that loads no weights: see `described_copy`."""
    return _checked(uri, described_copy(uri, cache_dir=cache_dir))


def _checked(uri: str, files: ModelFiles) -> BaseModel:
    path = files.path
    for needed in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (path / needed).is_file():
            raise BaseModelError(
                f"{uri!r} has no {needed}. A base model is a directory in diffusers' layout; save one with "
                "DiffusionPipeline.save_pretrained, or copy the missing part from the original model."
            )
    if reason := why_not(path):
        raise BaseModelError(f"{uri!r} {reason}")
    if is_sdxl(json.loads((path / "unet/config.json").read_text())):
        for part in SDXL_PARTS:
            if not (path / part).is_dir():
                raise BaseModelError(
                    f"{uri!r} has no {part}/, but its UNet has addition_embed_type='text_time' (SDXL), which reads the "
                    f"pooled text of a second text encoder. Copy {part}/ of the original model."
                )
    config = json.loads((path / "scheduler/scheduler_config.json").read_text())
    base = BaseModel(
        uri=uri,
        files=files,
        prediction_type=prediction_type_of(config),
        scheduler_config=config,
        told=_was_told(path / IMPORT_RECORD),
    )
    read_schedule(config)
    return base


def _was_told(record: Path) -> bool:
    """Whether somebody said, when a base was imported, what it predicts."""
    settings = parse(record.read_bytes()).get("settings") if record.is_file() else {}
    return isinstance(settings, dict) and bool(settings.get("prediction"))
