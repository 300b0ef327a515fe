"""Captions as people write them: which ones of an image are taken, and which are refused, with the reason."""

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.sample import MAX_TEXT_BYTES, Sample, whole_text

CAPTION_COLUMNS = ("caption", "text")
"""Caption columns tried, in this order, when none is given."""
BYTE_ORDER_MARK = "\ufeff"


class CaptionError(ValueError):
    """A caption that is not taken; the message is the ledger's reason."""


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """Which captions are taken."""

    read: bool = True
    """False: none, and every sample's caption is None."""
    column: str | None = None
    several: str | None = None
    """Of several captions, `first`, or `all` for a sample each; None refuses them."""
    default: str | None = None
    """Caption of an image that has none."""

    def choose(self, found: Sequence[str]) -> list[str | None]:
        """The captions of an image's samples, without a byte order mark; None for a sample without one.

        Raises:
            CaptionError: there are several, or they are no text.
        """
        if not self.read:
            return [None]
        texts = list(dict.fromkeys(map(plain_text, found)))
        captions = [text for text in texts if text.strip()] or texts[:1]
        if len(captions) > 1 and self.several is None:
            raise CaptionError(
                f"several_captions: {len(captions)} of one image. Give --source.captions first, or all for one "
                "sample each"
            )
        if not captions or (len(captions) == 1 and not captions[0].strip()):
            return [captions[0] if captions and self.default is None else self.default]
        return list(captions if self.several == "all" else captions[:1])


def caption_rules(source: ImageSource, *, read: bool) -> CaptionRules:
    if not read:
        return CaptionRules(read=False)
    return CaptionRules(column=source.caption_column, several=source.captions, default=source.default_caption)


def captioned(
    source_uri: str, image: bytes, captions: Callable[[], Sequence[str]], rules: CaptionRules
) -> Iterator[Sample]:
    """An image's samples, one unless each of several captions makes one.

    Args:
        captions: returns those that there are; may raise CaptionError, which becomes the sample's problem.
    """
    try:
        chosen = rules.choose(captions() if rules.read else ())
    except CaptionError as error:
        yield Sample(source_uri=source_uri, image=None, caption=None, problem=str(error))
        return
    for number, caption in enumerate(chosen):
        place = source_uri if len(chosen) == 1 else f"{source_uri}#caption={number}"
        yield Sample(source_uri=place, image=image, caption=caption)


def decode_text(data: bytes) -> str:
    """The text of a caption file; bytes that are not UTF-8 become U+FFFD, which the caption check refuses.

    Raises:
        CaptionError: it is UTF-16.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CaptionError("bad_caption: UTF-16. Save it as UTF-8")
    return data.decode("utf-8", errors="replace")


def plain_text(text: str) -> str:
    """The text without a byte order mark and lone surrogates.

    Raises:
        CaptionError: it holds NUL characters.
    """
    if "\0" in text:
        raise CaptionError("bad_caption: NUL characters, as in UTF-16 without a mark. Save it as UTF-8")
    if len(text) > MAX_TEXT_BYTES:
        raise CaptionError(f"bad_caption: {len(text):,} characters, at most {MAX_TEXT_BYTES:,} are read")
    return whole_text(text.removeprefix(BYTE_ORDER_MARK))


def find_captions(record: Mapping[str, Any], column: str | None) -> list[str]:
    """The captions in a record, a text or a list of texts; empty when there are none."""
    for name in (column,) if column else CAPTION_COLUMNS:
        value = record.get(name)
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and any(isinstance(item, str) for item in value):
            return [item for item in value if isinstance(item, str)]
    return []
