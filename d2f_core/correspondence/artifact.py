"""A trained matcher as files: the adapters, which network they belong to, and how images and points are treated.

matcher.json    the base and its hash, blocks, preparation, decoding, and how it was trained
adapter/        as PEFT saves it
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from d2f_core import storage
from d2f_core.correspondence.config import StudentConfig
from d2f_core.correspondence.matcher import Matcher, transformer_matcher
from d2f_core.correspondence.matching import Decoding
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.student import add_adapters, load_network, merge, trained
from d2f_core.model.base import described_copy, local_copy
from d2f_core.model.lora import read_adapter
from d2f_core.tracking import resolve_model

DESCRIPTION, ADAPTER = "matcher.json", "adapter"
FORMAT = 1


class MatcherError(ValueError):
    """A trained matcher cannot be used; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class MatcherDescription:
    """What a matcher's files say of it."""

    student: StudentConfig
    base_hash: str
    """Of the files of the student's base; another one is refused."""
    preparation: Preparation
    decoding: Decoding
    training: Mapping[str, Any]
    """How it came to be: step, teachers, losses."""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, place: str) -> "MatcherDescription":
        """Raises MatcherError for anything that `to_json` did not write."""
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(
                student=StudentConfig(**content.pop("student")),
                preparation=Preparation(**content.pop("preparation")),
                decoding=Decoding(**content.pop("decoding")),
                **content,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MatcherError(
                f"{place!r} describes no matcher ({error}). Copy it from where it was trained."
            ) from None


def save_matcher(
    directory: Path,
    network: PeftModel,
    description: MatcherDescription,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a student's adapters with their description.

    Args:
        weights: of the adapters by their names in the network, which may then be on "meta"; None: the network's own.
    """
    # No embedding is adapted, and looking for one would ask the hub.
    network.save_pretrained(str(directory / ADAPTER), state_dict=weights, save_embedding_layers=False)
    (directory / ADAPTER / "README.md").unlink(missing_ok=True)  # PEFT's unfilled template, with this machine's paths
    (directory / DESCRIPTION).write_text(description.to_json())


def upload_matcher(target: str, weights: Mapping[str, Tensor], description: MatcherDescription) -> str:
    """Write a matcher to a URI, from the trained weights by their names in the network; returns the URI.

    Raises:
        MatcherError: their names are not those of the student's trained parameters.
    """
    network = add_adapters(load_network(description.student, "meta"), description.student, seed=0)
    own = dict(trained(network))
    if odd := sorted(own.keys() ^ weights.keys()):
        raise MatcherError(f"{len(odd)} trained weights belong to another student, such as {odd[0]!r}. Use its config.")
    with tempfile.TemporaryDirectory() as directory:
        save_matcher(Path(directory), network, description, dict(weights))
        storage.upload_tree(Path(directory), target, last=DESCRIPTION)
    return target


def describe_matcher(uri: str) -> MatcherDescription:
    """What is said of the matcher at a URI; no weights are read.

    Raises:
        MatcherError: there is none.
    """
    place = storage.join(resolve_model(uri), DESCRIPTION)
    try:
        return MatcherDescription.from_json(storage.read_bytes(place).decode(), place)
    except FileNotFoundError:
        raise MatcherError(f"{uri!r} holds no {DESCRIPTION}. Give the directory of a trained matcher.") from None


def load_student(
    uri: str, device: str | torch.device = "cpu", *, base_uri: str | None = None
) -> tuple[PeftModel, MatcherDescription]:
    """The student with its trained adapters, in evaluation mode.

    Args:
        uri: the matcher's directory, or models:/NAME@ALIAS.
        base_uri: where its base is now; None: as recorded.

    Raises:
        MatcherError: there is none, or its base is another than it was trained on.
    """
    description = describe_matcher(uri)
    student = replace(description.student, base=base_uri or description.student.base)
    if (found := described_copy(student.base).hash()) != description.base_hash:
        raise MatcherError(
            f"{uri!r} was trained on a base with the hash {description.base_hash[:12]}; that of "
            f"{student.base!r} is {found[:12]}. Put the first one back, or say where it is now."
        )
    network = add_adapters(load_network(student, device), student, seed=0)
    set_adapters(network, uri)
    return network.to(device).eval(), description


def set_adapters(network: nn.Module, uri: str) -> None:
    """Set a student's adapters to those of the matcher at a URI, whatever has become of that one's base.

    Raises:
        MatcherError: they are of other layers, or of another rank.
    """
    saved = read_adapter(local_copy(resolve_model(uri)) / ADAPTER)
    own = get_peft_model_state_dict(cast(Any, network))
    wanted, found = ({(name, tuple(value.shape)) for name, value in each.items()} for each in (own, saved))
    if odd := sorted(name for name, _ in wanted ^ found):
        raise MatcherError(
            f"{len(odd)} adapters of {uri!r} are not this student's, such as {odd[0]!r}. Use its config."
        )
    set_peft_model_state_dict(cast(Any, network), saved)


def load_matcher(
    uri: str, device: str | torch.device = "cpu", decoding: Decoding | None = None, *, base_uri: str | None = None
) -> Matcher:
    """The matcher at a URI, with its adapters merged.

    Args:
        base_uri: see `load_student`.

    Raises:
        MatcherError: see `load_student`.
    """
    student, description = load_student(uri, device, base_uri=base_uri)
    return transformer_matcher(uri, merge(student), description.preparation, decoding or description.decoding)
