"""How a model's captions are read: in how many windows of its text encoder, and up to which layer. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MAX_CHUNKS = 16
"""Most chunks, 1,200 tokens of CLIP's: memory and time of every step grow with them."""


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """How captions become text states. A model is sampled by the rules that it was trained by."""

    chunks: int = 1
    """Windows of the text encoder that a caption may fill. CLIP's window has 77 tokens, 75 of them the caption's: 1
    reads 75 tokens, 3 read 225. Each chunk is encoded by itself between begin and end; their states follow one another,
    and SDXL's pooled text is the first chunk's."""
    clip_skip: int = 0
    """Last layers of CLIP that are left out, counted as diffusers' `clip_skip` counts them: 1 reads the layer before
    the last (of SDXL, the one before that which it reads by itself). For SD 1.5, sd-scripts and A1111 call this 2."""

    def __post_init__(self) -> None:
        if not 1 <= self.chunks <= MAX_CHUNKS:
            raise ValueError(f"captions.chunks={self.chunks} must lie in 1 to {MAX_CHUNKS}. Use 3 for 225 tokens.")
        if self.clip_skip < 0:
            raise ValueError(f"captions.clip_skip={self.clip_skip} must be 0, which reads all layers, or above.")

    def __str__(self) -> str:
        return f"chunks={self.chunks}, clip_skip={self.clip_skip}"


DEFAULT = CaptionRules()
"""One window and all layers, as every release before the rules existed reads captions."""
FIELD = "captions"
"""Name of the rules in the files that carry them, which have it only where the rules are not `DEFAULT`."""


def written_rules(rules: CaptionRules) -> dict[str, Any]:
    """The field that carries the rules in a file; nothing for `DEFAULT`, so that such files stay as they were."""
    return {} if rules == DEFAULT else {FIELD: asdict(rules)}


def read_rules(content: Mapping[str, Any]) -> CaptionRules:
    """The rules in a file's content; `DEFAULT` where it says nothing.

    Raises:
        ValueError: values out of range.
        TypeError: a field that this release does not know.
    """
    return CaptionRules(**content.get(FIELD, {}))


def told_to_others(rules: CaptionRules) -> str:
    """What whoever samples the model with another program must know; empty for `DEFAULT`."""
    told = []
    if rules.chunks > 1:
        told.append(
            f"It was trained on captions in {rules.chunks} chunks, each a window of the text encoder (77 tokens of "
            "CLIP's). A stock pipeline of diffusers reads 77 tokens, and cuts off the rest of a longer prompt."
        )
    if rules.clip_skip:
        told.append(
            f"It needs clip_skip={rules.clip_skip} as diffusers counts (for SD 1.5, sd-scripts and A1111 count "
            f"{rules.clip_skip + 1}), for the negative prompt too, which diffusers' pipelines encode without."
        )
    return " ".join(told)
