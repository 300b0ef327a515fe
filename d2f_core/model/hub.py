"""Models of a hub, as owner/name or owner/name@revision, fetched to this machine.

Without a revision all weights in safetensors are fetched, in whatever variants the hub has them: the content hashes of
models trained on such a base cover them. With a revision, which may be a branch, a tag or a commit, the files that are
read are fetched alone.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from d2f_core.cache import kept
from d2f_core.hashing import HASHED_SUFFIXES, cache_root, one_at_a_time
from d2f_core.model.weight_files import DIFFUSERS_NAME, read_files, shard_names
from d2f_core.retry import GaveUpError, UnreachableError, is_network_trouble, keep_trying

HUB_SECONDS = 20.0
"""How long a model hub that does not answer is asked again; its client repeats some requests by itself."""
INDEX = "model_index.json"
NOT_WEIGHTS = (".json", ".txt", ".model")
Got = TypeVar("Got")


class HubError(ValueError):
    """A hub has no such model, or refuses it: what stands behind its name in the message."""


class UnreachableHub(HubError, UnreachableError):
    """The hub was away for longer than repetitions bridge."""


def is_hub_id(uri: str) -> bool:
    """Whether a base's URI names a model of a hub, if no such directory is on this machine."""
    name = uri.partition("@")[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).parent.is_dir()


def fetch(uri: str, parts: Sequence[str]) -> Path:
    """A directory on this machine with a hub's model.

    Args:
        parts: directories of a model that are fetched.

    Raises:
        HubError: the hub has no such model or revision, or refuses it.
        UnreachableHub: it stays away.
    """
    import huggingface_hub

    name, at, revision = uri.partition("@")
    if at:
        if not revision:
            raise HubError("has no revision behind the @. Give a branch, a tag or a commit, or leave the @ out.")
        return _fetch_read_files(name, revision)
    patterns = [*(f"{part}/*{suffix}" for part in parts for suffix in HASHED_SUFFIXES), INDEX]
    return Path(_asked(name, lambda: huggingface_hub.snapshot_download(name, allow_patterns=patterns)))


def size(uri: str) -> int:
    """Bytes of the safetensors in the directories of a hub's model, the most that `fetch` brings here; 0 when the hub's
    client is told to stay offline.

    Raises:
        the errors of `fetch`.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return 0
    name, _, revision = uri.partition("@")
    ask = lambda: huggingface_hub.HfApi().model_info(name, revision=revision or None, files_metadata=True)  # noqa: E731
    files = _asked(name, ask).siblings or []
    weights = [file for file in files if "/" in file.rfilename and file.rfilename.endswith(".safetensors")]
    return sum(file.size or 0 for file in weights)


def _fetch_read_files(name: str, revision: str) -> Path:
    """A directory of links to the files of a revision that are read when the model is loaded."""
    import huggingface_hub

    if re.fullmatch("[0-9a-f]{40}", revision) and (known := _place(name, revision)).is_dir() and _is_whole(known):
        with one_at_a_time(known):
            if known.is_dir():
                return kept(known, f"{name}@{revision}")  # a commit never changes
    listed = _asked(name, lambda: huggingface_hub.HfApi().list_repo_files(name, revision=revision))
    small = [file for file in listed if file.endswith(NOT_WEIGHTS) and file.count("/") < 2]
    download = lambda files: huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files)  # noqa: E731
    snapshot = Path(_asked(name, lambda: download(small)))
    wanted = sorted(_read(snapshot, listed))
    snapshot = Path(_asked(name, lambda: download(wanted)))
    target = _place(name, snapshot.name)
    with one_at_a_time(target):
        if not target.is_dir() or not _is_whole(target):
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            for file in wanted:
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                (partial / file).symlink_to((snapshot / file).resolve())
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        return kept(target, f"{name}@{revision}")


def _place(name: str, commit: str) -> Path:
    return cache_root() / "models" / f"{name.replace('/', '--')}--{commit}"


def _is_whole(place: Path) -> bool:
    """Whether the files are still there to which a directory links."""
    return all(link.exists() for link in place.rglob("*"))


def _read(snapshot: Path, listed: Sequence[str]) -> set[str]:
    """Of a revision's files, those that are read: told by the same rules as of a directory, in one of empty weights."""
    with tempfile.TemporaryDirectory() as place:
        for file in listed:
            there = Path(place, file)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes((snapshot / file).read_bytes() if (snapshot / file).is_file() else b"")
        own = Path(place, "config.json")  # of an autoencoder alone
        alone = own.is_file() and json.loads(own.read_text()).get("_class_name") == "AutoencoderKL"
        lists = {f"{DIFFUSERS_NAME}.index.json"} & set(listed)
        more = {"config.json", *shard_names(Path(place), DIFFUSERS_NAME), *lists} if alone else set[str]()
        return (read_files(Path(place)) | {INDEX} | more) & set(listed)


def _asked(name: str, ask: Callable[[], Got]) -> Got:
    try:
        return keep_trying(f"fetch {name} from the hub", ask, patience=_patience)
    except Exception as error:
        cause = error.__cause__ or error
        kind = UnreachableHub if isinstance(error, GaveUpError) else HubError
        raise kind(
            f"is no local directory and could not be fetched from the hub ({type(cause).__name__}). Check the "
            "spelling and the network, or download it and give the directory."
        ) from cause


def _patience(error: Exception) -> float:
    return HUB_SECONDS if _hub_is_away(error) else 0.0


def _hub_is_away(error: BaseException) -> bool:
    """Whether the same download may succeed later: no answer, or one of a server in trouble."""
    from httpx2 import TransportError
    from huggingface_hub.errors import OfflineModeIsEnabled

    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OfflineModeIsEnabled):  # a setting, though it is a ConnectionError
            return False
        status = getattr(getattr(link, "response", None), "status_code", 0)
        if isinstance(link, TransportError) or status == 429 or status >= 500 or is_network_trouble(link):
            return True
        link = link.__cause__
    return False
