"""Loaded text encoders, and captions longer than their window: chunks that are encoded one by one and joined.

A caption's tokens are cut into windows of `max_length`, each between the tokenizer's tokens of begin and end and padded
as a short caption is. A caption that fills fewer windows than the rules ask for ends in empty ones, so that every
caption, the empty one included, gives the same number of tokens. A1111 and ComfyUI read long prompts so; sd-scripts
trains on the same chunks, but keeps begin and end only around all of them: 227 tokens for three chunks, 231 here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2f_core.model.caption_rules import DEFAULT, CaptionRules


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder; every caption gives the same number of tokens."""

    network: Any
    tokenizer: Any
    max_length: int
    """Tokens per chunk of a caption; what is longer than all chunks is truncated."""
    masked: bool
    """Whether padding is masked in the encoder and zero in its output. CLIP was trained with unmasked padding."""
    fingerprint: str
    rules: CaptionRules = DEFAULT

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Text states, float32 [len(captions), chunks * max_length, width]."""
        tokens = tokens_of(self.tokenizer, captions, self.max_length, self.rules.chunks).to(self.network.device)
        if self.masked:
            states = self.network(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.float()
            return _joined(states * tokens.attention_mask[..., None], self.rules.chunks)
        if not self.rules.clip_skip:
            return _joined(self.network(tokens.input_ids).last_hidden_state.float(), self.rules.chunks)
        layers = self.network(tokens.input_ids, output_hidden_states=True).hidden_states
        # The last norm belongs to whatever layer is read, as in diffusers: the UNet was trained on normed states.
        return _joined(self.network.final_layer_norm(layers[-1 - self.rules.clip_skip]).float(), self.rules.chunks)

    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`text_states`, float32 [len(captions), chunks * max_length, width]."""
        return {"text_states": self.encode(captions)}


@dataclass(frozen=True)
class TextEncoderPair:
    """SDXL's two frozen CLIP text encoders; both read the whole caption."""

    networks: tuple[Any, Any]
    tokenizers: tuple[Any, Any]
    max_length: int
    """Tokens per chunk of a caption; what is longer than all chunks is truncated."""
    zeros_for_empty: bool
    """Whether the empty caption gives zeros: `force_zeros_for_empty_prompt` in model_index.json, true when not given.

    It holds wherever a caption is empty: dropped captions in training, empty and negative prompts in sampling. So the
    unconditional half of guidance is the one that was trained. (diffusers uses zeros when no negative prompt is given,
    but encodes an empty string that is given as one.)
    """
    fingerprint: str
    rules: CaptionRules = DEFAULT

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Only the text states, float32 [len(captions), chunks * max_length, sum of both widths]."""
        return self.condition(captions)["text_states"]

    @torch.inference_mode()
    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`text_states` and `pooled_text`, float32 [len(captions), ...]; the pooled text is the first chunk's."""
        states, pooled, chunks = [], None, self.rules.chunks
        for network, tokenizer in zip(self.networks, self.tokenizers, strict=True):
            # Padding is not masked in either encoder, as in their training; the second one pads with "!".
            tokens = tokens_of(tokenizer, captions, self.max_length, chunks).to(network.device)
            output = network(tokens.input_ids, output_hidden_states=True)
            states.append(_joined(output.hidden_states[-2 - self.rules.clip_skip].float(), chunks))
            pooled = output.get("text_embeds")
        assert pooled is not None
        condition = {"text_states": torch.cat(states, -1), "pooled_text": pooled[::chunks].float()}
        empty = [index for index, caption in enumerate(captions) if not caption]
        if self.zeros_for_empty and empty:
            for value in condition.values():
                value[empty] = 0
        return condition


def tokens_of(tokenizer: Any, captions: Sequence[str], max_length: int, chunks: int = 1) -> Any:
    """`input_ids` and `attention_mask` [len(captions) * chunks, max_length]: each caption's chunks in a row."""
    whole: dict[str, Any] = {
        "padding": "max_length", "max_length": max_length, "truncation": True, "return_tensors": "pt",
    }  # fmt: skip
    if chunks == 1:
        return tokenizer(list(captions), **whole)
    found = tokenizer([*captions, ""], return_overflowing_tokens=True, **whole)
    rows: list[list[int]] = [[] for _ in range(len(captions) + 1)]
    for row, caption in enumerate(found.pop("overflow_to_sample_mapping").tolist()):
        rows[caption].append(row)
    *given, empty = rows
    chosen = [row for each in given for row in (each + chunks * empty)[:chunks]]
    for name in ("input_ids", "attention_mask"):
        found[name] = found[name][chosen]
    return found


def _joined(states: Tensor, chunks: int) -> Tensor:
    """States of chunks [captions * chunks, tokens, width] -> of captions [captions, chunks * tokens, width]."""
    return states.reshape(-1, chunks * states.shape[1], states.shape[2])
