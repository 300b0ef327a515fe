"""Checkpoints: one set of safetensors by parameter name, whatever the number of workers and the ZeRO stage.

    OUTPUT/checkpoints/step-00000500.ATTEMPT/weights-0.safetensors    fp32 weights, one file per worker's share
                                             exp_avg-0.safetensors    optimizer moments
                                             exp_avg_sq-0.safetensors
                                             ema-0.safetensors        averages
                                             manifest.json            written last: sizes, sha256, step, samples

A directory without a manifest does not exist. Nothing is ever overwritten: each attempt at a step has its own
directory.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from safetensors.torch import load, save
from torch import Tensor

from d2f_core import storage

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    kind: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    step: int
    """Optimizer steps done."""
    samples: int
    """Position in the data order: samples consumed."""
    identity: str
    """Hash of what must not change within a run: model, data, loss, seed, batch."""
    num_workers: int
    files: tuple[CheckpointFile, ...]
    format_version: int = FORMAT_VERSION


def checkpoints_uri(output: str) -> str:
    return storage.join(output, "checkpoints")


def directory_name(step: int, attempt: str) -> str:
    return f"step-{step:08d}.{attempt}"


def write_share(uri: str, rank: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> list[CheckpointFile]:
    """Write one worker's share, kind -> parameter name -> tensor."""
    files = []
    for kind, named in tensors.items():
        if not named:
            continue
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()})
        path = f"{kind}-{rank}.safetensors"
        storage.write_bytes(storage.join(uri, path), data)
        files.append(CheckpointFile(kind=kind, path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return files


def write_manifest(uri: str, manifest: CheckpointManifest) -> None:
    """Make the checkpoint exist; every share must have been written."""
    payload = json.dumps(asdict(manifest), indent=1, sort_keys=True).encode()
    storage.write_bytes(storage.join(uri, MANIFEST), payload, exclusive=True)


def read_manifest(uri: str) -> CheckpointManifest:
    """Raises FileNotFoundError when there is none, CheckpointError for another format."""
    fields = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
    if fields.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{uri} has format_version={fields.get('format_version')!r}; this release reads {FORMAT_VERSION}. "
            "Resume with the release that wrote it, or choose another output."
        )
    return CheckpointManifest(**{**fields, "files": tuple(CheckpointFile(**file) for file in fields["files"])})


def list_checkpoints(output: str) -> list[tuple[str, CheckpointManifest]]:
    """(uri, manifest) of every complete checkpoint, oldest step first."""
    found = []
    for name in storage.list_names(checkpoints_uri(output)):
        uri = storage.join(checkpoints_uri(output), name)
        try:
            found.append((uri, read_manifest(uri)))
        except FileNotFoundError:
            continue  # a save that did not finish
    return sorted(found, key=lambda item: item[1].step)


def latest_checkpoint(output: str, identity: str) -> tuple[str, CheckpointManifest] | None:
    """The newest complete checkpoint of this very run.

    Raises:
        CheckpointError: the output holds a run of another configuration.
    """
    found = list_checkpoints(output)
    if not found:
        return None
    uri, manifest = found[-1]
    if manifest.identity != identity:
        raise CheckpointError(
            f"{output} holds a run with another model, data, loss, seed or batch (identity {manifest.identity[:12]}, "
            f"this one is {identity[:12]}). Choose another --output, or go back to that run's config.yaml."
        )
    return uri, manifest


def read_tensors(uri: str, manifest: CheckpointManifest, kind: str) -> dict[str, Tensor]:
    """All parameters' tensors of one kind, every file's sha256 checked.

    Raises:
        CheckpointError: a file's content is not what was written.
    """
    tensors: dict[str, Tensor] = {}
    for file in manifest.files:
        if file.kind != kind:
            continue
        data = storage.read_bytes(storage.join(uri, file.path))
        digest = hashlib.sha256(data).hexdigest()
        if digest != file.sha256:
            raise CheckpointError(
                f"{uri}/{file.path} has sha256 {digest[:12]}, its manifest says {file.sha256[:12]}: the file was "
                "damaged. Delete this checkpoint's directory; the run then resumes from the one before."
            )
        tensors.update(load(data))
    return tensors


def remove_old(output: str, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and left-overs of saves before them."""
    complete = list_checkpoints(output)
    kept = {uri for uri, _ in complete[-keep:]}
    oldest_kept = min((manifest.step for _, manifest in complete[-keep:]), default=0)
    for name in storage.list_names(checkpoints_uri(output)):
        uri = storage.join(checkpoints_uri(output), name)
        if uri not in kept and int(name.removeprefix("step-").partition(".")[0]) < oldest_kept:
            logger.info("removing old checkpoint %s", uri)
            storage.remove_tree(uri)
