"""Whether a network's files hold what its config asks for, told by their headers: no tensor is read or allocated.

The libraries themselves only warn of weights that are missing, and leave these empty or draw them at random.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2f_core.model.base import BaseModel, BaseModelError
from d2f_core.model.safetensors_header import HeaderError, read_header
from d2f_core.model.weight_files import DIFFUSERS_NAME, TRANSFORMERS_NAME, shard_names

POSITIONS = "position_ids"


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """Names of the tensors in which files and network differ; false when there are none."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    """Of another shape in the files than in the network."""
    retyped: tuple[str, ...] = ()
    """Whole numbers or float8 in the files: quantised weights, which are nothing without their scales."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped or self.retyped)

    def __str__(self) -> str:
        told = (
            (self.missing, "it lacks {} tensors, such as {}"),
            (self.reshaped, "{} of its tensors have other shapes than the config's, such as {}"),
            (self.retyped, "{} of its tensors are quantised, and not in float16, bfloat16 or float32, such as {}"),
            (self.unexpected, "{} of its tensors are not known to the config, such as {}"),
        )
        return ", and ".join(text.format(len(names), list(names[:3])) for names, text in told if names)


def meta_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on torch's meta device, by its header.

    Raises:
        HeaderError: the file is no safetensors, or was cut off or damaged in its header.
    """
    return {
        name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        for name, tensor in read_header(file).items()
    }


def header_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """Name -> tensor on torch's meta device, of a network's one file or of its shards.

    Raises:
        HeaderError: a file is missing, or was cut off or damaged in its header; one sentence with the file's name.
    """
    found: dict[str, Tensor] = {}
    for shard in shard_names(directory, name):
        try:
            found.update(meta_tensors(directory / shard))
        except FileNotFoundError:
            raise HeaderError(f"{directory.name}/{shard} is missing. Copy the weights again.") from None
        except HeaderError as error:
            raise HeaderError(f"{directory.name}/{shard} {error}") from None
    return found


def require_safetensors(base: BaseModel, part: str, kind: str) -> None:
    """Raise BaseModelError when a part of a base has no weights in safetensors.

    Args:
        kind: class of the part's network, as `library.Name`.
    """
    directory = base.path / part
    if any(directory.glob("*.safetensors")):
        return
    library, _, name = kind.partition(".")
    if any(directory.glob("*.bin")):
        raise BaseModelError(
            f"{base.uri!r} has no safetensors in {part}/, but .bin files, which are pickles and may run code. If you "
            f"trust them, convert them: python -c \"from {library} import {name} as N; N.from_pretrained('{part}', "
            f"use_safetensors=False).save_pretrained('{part}')\""
        )
    raise BaseModelError(f"{base.uri!r} has no safetensors in {part}/. Copy the weights of the original model there.")


def diffusers_misfit(network: nn.Module, directory: Path) -> Misfit:
    """How the files of a diffusers network differ from it; it may be on torch's meta device.

    Raises:
        HeaderError: see `header_tensors`.
    """
    found = header_tensors(directory, DIFFUSERS_NAME)
    cast(Any, network)._fix_state_dict_keys_on_load(found)  # names of older releases, as `from_pretrained` does it
    return misfit({name: tensor.shape for name, tensor in network.state_dict().items()}, found)


def misfit(wanted: dict[str, torch.Size], found: dict[str, Tensor]) -> Misfit:
    """How the tensors of files differ from the shapes that a network has."""
    both = wanted.keys() & found.keys()
    return Misfit(
        missing=_sorted(wanted.keys() - found.keys()),
        unexpected=_sorted(found.keys() - wanted.keys()),
        reshaped=_sorted(name for name in both if wanted[name] != found[name].shape),
        retyped=_sorted(name for name in both if not is_plain(found[name])),
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor of weights holds their values, which whole numbers and float8 need scales for."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def odd_prefix(found: Misfit) -> str:
    """How all unknown names begin that end in a missing one; empty: none, or not all of them alike."""
    first, last = (found.missing[0], found.missing[-1]) if found.missing else ("", "")
    begins = {name.removesuffix(first) for name in found.unexpected if first and name.endswith(f".{first}")}
    alike = [begin for begin in begins if begin + last in found.unexpected]
    return alike[0] if len(alike) == 1 else ""


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


def transformers_on_meta(kind: Any, config: Any, directory: Path) -> tuple[Any, Misfit]:
    """A transformers network on torch's meta device, and how its files differ from it.

    The library compares them itself, with its own table of older names.

    Args:
        kind: the network's class.

    Raises:
        HeaderError: see `header_tensors`.
    """
    state = header_tensors(directory, TRANSFORMERS_NAME)
    with silent_transformers():
        network, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    unread = set(info["unexpected_keys"])
    return network, Misfit(
        missing=_sorted(info["missing_keys"]),
        unexpected=_sorted(unread),
        reshaped=_sorted(name for name, *_ in info["mismatched_keys"]),
        # Older releases saved lists of positions too, which no network reads.
        retyped=_sorted(
            name
            for name, tensor in state.items()
            if name not in unread and not name.endswith(POSITIONS) and not is_plain(tensor)
        ),
    )


def automatic_on_meta(directory: Path) -> tuple[Any, Misfit]:
    """`transformers_on_meta` of the network that `AutoModel` makes of a directory.

    Raises:
        ValueError: transformers knows no network for its config; `HeaderError` is one too.
    """
    from transformers import MODEL_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"transformers knows no network for a {type(config).__name__}")
    return transformers_on_meta(MODEL_MAPPING[type(config)], config, directory)


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No bar in a job's log for each file, and no report of differences, which the checks tell as an error."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def require_fit(base: BaseModel, part: str, compare: Callable[[], Misfit]) -> None:
    """Raise BaseModelError when the files of a base's network lack what its config asks for.

    Args:
        part: the network's directory in the base.
        compare: finds the differences; tensors that the config does not know are never read, and may stay.
    """
    try:
        found = compare()
    except HeaderError as error:
        raise BaseModelError(f"{base.uri!r}: {error}") from None
    if lacking := replace(found, unexpected=()):
        raise BaseModelError(
            f"{base.uri!r}: {part}/ does not hold what its config.json asks for: {lacking}. {_fix(found)}"
        )


def _fix(found: Misfit) -> str:
    if prefix := odd_prefix(found):
        return f"The names in the file begin with {prefix!r}: save it again without that, or copy the original's."
    return "Copy that directory of the original model."
