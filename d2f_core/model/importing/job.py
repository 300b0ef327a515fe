"""Imports a checkpoint: its parts are put together in a directory, compared, asked what they predict, and written.

What is written last is `import.json`, which says of what the model was made; it is no part of the model's hash.
"""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f_core import storage
from d2f_core.model.base import IMPORT_RECORD, BaseModel, BaseModelError, local_copy, resolve_base
from d2f_core.model.base_probe import kept_reading
from d2f_core.model.denoiser import load_unet
from d2f_core.model.importing import sources
from d2f_core.model.importing.config import ImportCheckpointConfig, ImportCheckpointError, lora_and_strength
from d2f_core.model.importing.lora_keys import LoraFileError, Shapes
from d2f_core.model.importing.lora_merge import Lora, layer_shapes, merge_loras, open_lora
from d2f_core.model.importing.vae import VaeError, open_vae_file, put_vae_directory, put_vae_file, vae_directory
from d2f_core.model.model_files import described_file
from d2f_core.model.single_file.convert import SCHEDULER, scheduler_config
from d2f_core.model.single_file.prediction import FLOW, Prediction

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class ImportedCheckpoint:
    """A base model that was written, or was there before."""

    output: str
    content_hash: str
    prediction: str
    """epsilon, v_prediction, sample or flow_prediction."""
    was_there: bool


def check_checkpoint_import(config: ImportCheckpointConfig) -> None:
    """Check the source, the autoencoder and the LoRAs by configs and headers.

    Raises:
        ImportCheckpointError, BaseModelError, ScheduleError: what cannot be imported; the reason and the fix.
        UnreachableError: S3 or the hub stays away.
    """
    _check_places(config)
    if _finished(config) is None:
        _examine(config)


def _examine(config: ImportCheckpointConfig) -> str:
    """Check what the import is made of; returns what says what the network predicts, empty if nothing does."""
    with sources.examined(config.source) as found, tempfile.TemporaryDirectory() as work:
        prediction = config.prediction or found.prediction
        if config.vae:
            _check_vae(config.vae, found.configs, Path(work))
        _open_loras(config, found.shapes, found.configs, prediction, lambda uri: described_file(uri, Path(work)))
        _told_scheduler(resolve_base(str(found.configs)), config)
        return "" if found.told_by.startswith("nothing") and not config.prediction else found.told_by


def _check_places(config: ImportCheckpointConfig) -> None:
    for name, example in (("source", "a .safetensors checkpoint"), ("output", "an s3:// prefix or a directory")):
        if not getattr(config, name):
            raise ImportCheckpointError(f"{name} is empty. Give --{name}: {example}.")
    if config.output.endswith(SUFFIX):
        raise ImportCheckpointError(
            f"output={config.output!r} must be a directory. For one file use python -m pipelines.export ldm."
        )
    for uri in (config.source, config.vae, *(lora_and_strength(each)[0] for each in config.lora)):
        storage.check_reachable(uri)
    storage.check_reachable(config.output, write=True)


def _settings(config: ImportCheckpointConfig) -> dict[str, Any]:
    """What the output is made of, as in its record."""
    return json.loads(json.dumps({**dataclasses.asdict(config), "output": None}))


def _finished(config: ImportCheckpointConfig) -> dict[str, Any] | None:
    """The record of the same import, if that is complete; None: there is room for it.

    Raises:
        ImportCheckpointError: something else is there.
    """
    try:
        record = json.loads(storage.read_bytes(storage.join(config.output, IMPORT_RECORD)))
    except FileNotFoundError:
        if storage.list_names(config.output):
            raise ImportCheckpointError(
                f"output={config.output!r} holds files that no import has written. Give an empty place."
            ) from None
        return None
    except ValueError as error:
        raise ImportCheckpointError(
            f"{config.output}/{IMPORT_RECORD} is no JSON ({error}). Give an empty place."
        ) from None
    settings = record.get("settings", {})
    if settings != _settings(config):
        different = sorted(name for name, value in _settings(config).items() if settings.get(name) != value)
        raise ImportCheckpointError(
            f"output={config.output!r} is an import with another {' and '.join(different)}, of "
            f"{settings.get('source')!r}. Give another output, or remove that."
        )
    return record if record["complete"] else None


def _open_loras(
    config: ImportCheckpointConfig, shapes: Shapes, configs: Path, prediction: str, fetch: Any
) -> list[Lora]:
    unet_config = json.loads((configs / "unet/config.json").read_text())
    opened = []
    for uri, strength in map(lora_and_strength, config.lora):
        try:
            opened.append(open_lora(fetch(uri), strength, shapes, unet_config, prediction))
        except LoraFileError as error:
            raise ImportCheckpointError(f"{uri!r} {error}") from None
    return opened


def _check_vae(uri: str, configs: Path, work: Path) -> None:
    with _vae_named(uri):
        if uri.endswith(SUFFIX):
            open_vae_file(described_file(uri, work), json.loads((configs / "vae/config.json").read_text()))
        else:
            vae_directory(_vae_copy(uri))


def _vae_copy(uri: str) -> Path:
    return local_copy(sources.with_revision(uri), chosen=lambda name: "/" not in name or name.startswith("vae/"))


@contextmanager
def _vae_named(uri: str) -> Iterator[None]:
    try:
        yield
    except VaeError as error:
        raise ImportCheckpointError(f"{uri!r} {error}") from None


def _put_vae(uri: str, made: Path) -> None:
    target = made / "vae"
    before = json.loads((target / "config.json").read_text()).get("scaling_factor")
    with _vae_named(uri):
        if uri.endswith(SUFFIX):
            with storage.local_file(uri, made.parent) as file:
                put_vae_file(open_vae_file(file, json.loads((target / "config.json").read_text())), target)
            return
        put_vae_directory(vae_directory(_vae_copy(uri)), target)
    after = json.loads((target / "config.json").read_text()).get("scaling_factor")
    if after != before:
        logger.warning(
            "%s has scaling_factor=%s, and the checkpoint's own autoencoder %s: the network has seen latents of the "
            "latter alone, so that this fits only if the two put out the same",
            uri, after, before,
        )  # fmt: skip


def _told_scheduler(base: BaseModel, config: ImportCheckpointConfig) -> dict[str, Any]:
    """The scheduler config with what the user says of the network.

    Raises:
        ScheduleError, ImportCheckpointError: it cannot be so.
    """
    told = base.read_as(config.prediction)
    found = dict(told.scheduler_config)
    if config.prediction == FLOW and not base.is_flow:
        found = scheduler_config(dict(base.scheduler_config), Prediction(kind=FLOW), {})
    if config.zero_snr is None:
        return found
    if config.zero_snr and told.prediction_type != "v_prediction":
        raise ImportCheckpointError(
            f"zero_snr with a network that predicts {told.prediction_type}: only one of v_prediction says anything at "
            "pure noise. Leave it out, or add --prediction v_prediction."
        )
    more = {"timestep_spacing": "trailing"} if config.zero_snr else {}
    return {**found, "rescale_betas_zero_snr": config.zero_snr, **more}


def import_checkpoint(config: ImportCheckpointConfig) -> ImportedCheckpoint:
    """Write a base model; nothing is done when the same import is there.

    Raises:
        ImportCheckpointError, BaseModelError, ScheduleError: what cannot be imported; the reason and the fix.
        UnreachableError: S3 or the hub stays away.
    """
    _check_places(config)
    if (record := _finished(config)) is not None:
        return _imported(config, record, was_there=True)
    told_by = _examine(config)
    with _work_place(config.output) as work:
        made = work / "model"
        source = sources.write(config.source, made)
        if config.vae:
            _put_vae(config.vae, made)
        base = resolve_base(str(made))
        scheduler = _told_scheduler(base, config)
        (made / SCHEDULER).write_text(json.dumps(scheduler, indent=2, sort_keys=True) + "\n")
        _merge(config, made, str(scheduler["prediction_type"]))
        base = _checked(config, made, told_by)
        record = _record(config, base, source)
        _put(made, config.output, record)
    return _imported(config, record, was_there=False)


def _imported(config: ImportCheckpointConfig, record: dict[str, Any], *, was_there: bool) -> ImportedCheckpoint:
    return ImportedCheckpoint(
        output=config.output,
        content_hash=record["content_hash"],
        prediction=record["prediction"],
        was_there=was_there,
    )


@contextmanager
def _work_place(output: str) -> Iterator[Path]:
    """A directory that is removed at the end: beside a local output, so that the model is moved there at once."""
    parent = None if storage.is_s3(output) else Path(storage.filesystem(output)[1]).parent
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".importing-") as work:
        yield Path(work)


def _merge(config: ImportCheckpointConfig, made: Path, prediction: str) -> None:
    with ExitStack() as files:
        fetch = lambda uri: files.enter_context(storage.local_file(uri, made.parent))  # noqa: E731
        loras = _open_loras(config, layer_shapes(made), made, prediction, fetch)
        try:
            merge_loras(made, loras)
        except LoraFileError as error:
            raise ImportCheckpointError(f"{' + '.join(config.lora)} {error}") from None
    for text, lora in zip(config.lora, loras, strict=True):
        logger.info("%s: merged into %d layers", text, len(lora.changes))


def _checked(config: ImportCheckpointConfig, made: Path, told_by: str) -> BaseModel:
    """The model, after its parts were compared with their configs, and its network was asked what it predicts."""
    base = dataclasses.replace(resolve_base(str(made)), uri=config.source)
    base = base.read_as(config.prediction)
    sources.check_all(base)
    try:
        load_unet(base)
    except BaseModelError as error:
        if (reading := kept_reading(base)) is None:
            raise
        raise ImportCheckpointError(
            f"{str(error).split(': it leaves')[0]}. Say --prediction {reading.best} (in the workflow of photos "
            "--base-prediction) if that is so."
        ) from None
    reading = kept_reading(base)
    if reading is None:
        logger.warning("%s: its network takes inputs that cannot be asked what it predicts", config.source)
        return base
    left = ", ".join(f"{kind} {share:.2f}" for kind, share in reading.left.items())
    logger.info("%s: %s; asked, its network leaves of %s", config.source, base.prediction_type, left)
    if not told_by and not config.prediction and not reading.fits(base.prediction_type):
        raise ImportCheckpointError(
            f"{config.source!r} does not say what its network predicts, and its answers fit nothing (what they leave "
            f"unexplained: {left}). Say it: --prediction {base.prediction_type} as the family's published model, or "
            "v_prediction, sample, flow_prediction (in the workflow of photos --base-prediction)."
        )
    return base


def _record(config: ImportCheckpointConfig, base: BaseModel, source: dict[str, str]) -> dict[str, Any]:
    return {
        "settings": _settings(config),
        "complete": True,
        **source,
        "content_hash": base.content_hash,
        "prediction": base.prediction_type,
    }


def _put(made: Path, output: str, record: dict[str, Any]) -> None:
    """Bring the model to its place, its record last."""
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    if not storage.is_s3(output):
        (made / IMPORT_RECORD).write_text(text)
        target = Path(storage.filesystem(output)[1])
        if target.is_dir():
            target.rmdir()  # which is empty, or else was refused
        made.rename(target)
        return
    unfinished = json.dumps({**record, "complete": False}).encode()  # so that a killed import may be gone on with
    storage.write_bytes(storage.join(output, IMPORT_RECORD), unfinished)
    storage.upload_tree(made, output)
    storage.write_bytes(storage.join(output, IMPORT_RECORD), text.encode())
