"""Counts captions and prompts that are longer than the text encoder reads, and says so: the rest of them is cut off."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import pyarrow.parquet as pq

from d2f_core.data.manifest import TableFile
from d2f_core.model.base import BaseModel, describe_base
from d2f_core.model.caption_rules import MAX_CHUNKS, CaptionRules
from d2f_core.model.text_encoder import DescribedTextEncoder, describe_text_encoder
from d2f_core.retry import one_line
from d2f_core.storage import arrow_filesystem, join, retried

logger = logging.getLogger(__name__)

TOGETHER = 10_000
"""Texts that are cut into tokens at once."""


def cut_captions(output: str, files: Sequence[TableFile], base: str, rules: CaptionRules) -> dict[str, int]:
    """For a table's manifest: `captions_cut`, and `tokens_cut_at_most` of one of them; nothing if none is cut.

    A base that has no text encoder (latents can be made without one) leaves the captions uncounted.

    Args:
        output: URI of the table.
        files: the table's, already written.
        base: URI of the base model whose text encoder reads the captions.
    """
    try:
        encoder = describe_text_encoder(describe_base(base).read_captions(rules))
    except (ValueError, OSError) as error:  # OSError: transformers, of a tokenizer without its files
        logger.info("%s: long captions are not counted: %s", output, one_line(error))
        return {}
    cut, count = _cut(encoder, _captions(output, files))
    if not cut:
        return {}
    each = encoder.read_at_most // encoder.rules.chunks
    chunks = encoder.rules.chunks + -(-max(cut) // each)
    fix = f" A table with --captions.chunks {chunks} keeps all of them." if chunks <= MAX_CHUNKS else ""
    _say(output, cut, count, "captions", encoder, fix)
    return {"captions_cut": len(cut), "tokens_cut_at_most": max(cut)}


def cut_prompts(place: str, prompts: Iterable[str], base: BaseModel) -> dict[str, int]:
    """For the manifest of what a model drew: `prompts_cut`, and `tokens_cut_at_most` of one; nothing if none is cut.

    Args:
        place: URI of the prompts.
        base: the model's, which says how prompts are read.
    """
    encoder = describe_text_encoder(base)
    cut, count = _cut(encoder, prompts)
    if not cut:
        return {}
    _say(place, cut, count, "prompts", encoder, "")
    return {"prompts_cut": len(cut), "tokens_cut_at_most": max(cut)}


def _cut(encoder: DescribedTextEncoder, texts: Iterable[str]) -> tuple[list[int], int]:
    """The number of tokens cut off, of each text that loses some; and the number of texts."""
    rest, cut, count = iter(texts), list[int](), 0
    while some := list(islice(rest, TOGETHER)):
        cut += [tokens for tokens in encoder.cut_tokens(some) if tokens]
        count += len(some)
    return cut, count


def _captions(output: str, files: Sequence[TableFile]) -> Iterator[str]:
    """The captions of a table; nothing else of its files is read."""
    for file in files:
        fs, path = arrow_filesystem(join(output, file.path))
        table = retried(f"read {file.path}", lambda: pq.read_table(path, columns=["caption"], filesystem=fs))  # noqa: B023
        yield from table["caption"].to_pylist()


def _say(place: str, cut: Sequence[int], count: int, what: str, encoder: DescribedTextEncoder, fix: str) -> None:
    logger.warning(
        "%s: %d of %d %s are longer than the %d tokens that the text encoder reads, by %d at most; the rest of them is "
        "cut off.%s",
        place, len(cut), count, what, encoder.read_at_most, max(cut), fix,
    )  # fmt: skip
