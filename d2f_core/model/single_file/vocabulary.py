"""CLIP's tokenizer, whose vocabulary a single-file checkpoint lacks: from a tokenizer's directory or a Python package.

The vocabulary follows from a list of merges, which is looked for in
    1. `D2F_CLIP_VOCABULARY`: a tokenizer's directory or its merges.txt, or OpenAI's bpe_simple_vocab_16e6.txt.gz
    2. an installed package that ships OpenAI's file: open_clip (open-clip-torch) or clip (openai-clip)
and is compared with the published list by its hash, so that a model's files do not depend on where it came from.
"""

import gzip
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from d2f_core.model.single_file.keys import LayoutError

VARIABLE = "D2F_CLIP_VOCABULARY"
PACKAGES = ("open_clip", "clip")
PACKED, MERGES = "bpe_simple_vocab_16e6.txt.gz", "merges.txt"
COUNT = 48_894
"""Merges of the 262,000 in OpenAI's file that CLIP uses."""
SHA256 = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
"""Of these merges, each with a line's end."""
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_merges() -> list[str]:
    """CLIP's merges in their order, each as two symbols with a space between.

    Raises:
        LayoutError: no list of merges is found, or it is another one.
    """
    place = next(_places(), None)
    if place is None:
        raise LayoutError(
            f"has no tokenizer's vocabulary, and none is found here. Set {VARIABLE} to the tokenizer directory of any "
            "Stable Diffusion (with merges.txt), or run `pip install --no-deps open-clip-torch`, which brings it."
        )
    try:
        packed = place.read_bytes()
        text = (gzip.decompress(packed) if place.suffix == ".gz" else packed).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LayoutError(f"needs CLIP's vocabulary, and {str(place)!r} cannot be read ({error}).") from None
    merges = text.split("\n")[1 : 1 + COUNT]  # the first line is a version
    if _digest(merges) != SHA256:
        raise LayoutError(
            f"needs CLIP's vocabulary, and {str(place)!r} is another one: its first {COUNT:,} merges have sha256 "
            f"{_digest(merges)[:12]}, CLIP's {SHA256[:12]}. Set {VARIABLE} to the tokenizer of a Stable Diffusion."
        )
    return merges


def _digest(merges: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{merge}\n" for merge in merges).encode()).hexdigest()


def _places() -> Iterator[Path]:
    if given := os.environ.get(VARIABLE):
        place = Path(given).expanduser()
        names = (MERGES, f"tokenizer/{MERGES}", PACKED)
        yield next((place / name for name in names if (place / name).is_file()), place)
    for package in PACKAGES:  # found without an import
        spec = importlib.util.find_spec(package)
        for directory in (spec.submodule_search_locations or ()) if spec else ():
            if (place := Path(directory, PACKED)).is_file():
                yield place


def write_vocabulary(directory: Path, merges: Sequence[str]) -> None:
    """Write merges.txt and vocab.json, as CLIPTokenizer reads them: bytes, bytes that end a word, merges, two marks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    joined = (merge.replace(" ", "") for merge in merges)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *joined, START, END]
    (directory / MERGES).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    numbers = {token: number for number, token in enumerate(tokens)}
    (directory / "vocab.json").write_text(json.dumps(numbers))
