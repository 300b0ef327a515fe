"""What encoded captions hold in memory is what the limit says, whatever the micro-batch."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from d2f_core.model.caption_cache import ENCODED_TOGETHER, CaptionCache

BYTES_EACH = 4 * (6 * 8 + 5)
"""Of one caption: `text_states` [6, 8] and `pooled_text` [5] in float32."""


class Encoder:
    """Numbers that say which caption they are of."""

    def __init__(self) -> None:
        self.passes: list[list[str]] = []

    @torch.inference_mode()
    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        self.passes.append(list(captions))
        values = torch.tensor([float(caption or -1) for caption in captions])
        return {"text_states": values[:, None, None].repeat(1, 6, 8), "pooled_text": values[:, None].repeat(1, 5)}


def held(cache: CaptionCache) -> int:
    """Bytes of all memory that the kept tensors keep alive."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for condition in cache._kept.values()
        for value in condition.values()
    }
    return sum(storages.values())


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 16, 40])
def test_what_is_held_is_what_the_limit_says(micro_batch: int) -> None:
    limit = 100 * BYTES_EACH
    cache, most = CaptionCache(Encoder(), limit), 0
    for start in range(0, 400, micro_batch):
        found = cache([str(number) for number in range(start, start + micro_batch)])
        assert found["text_states"][:, 0, 0].tolist() == list(range(start, start + micro_batch))
        most = max(most, held(cache))
        assert held(cache) == cache.held_bytes <= limit
    assert most >= limit - 40 * BYTES_EACH, "and the room is used"


def test_each_caption_is_encoded_once_in_passes_of_one_size() -> None:
    encoder = Encoder()
    cache = CaptionCache(encoder)
    found = [cache(captions)["pooled_text"][:, 0].tolist() for captions in (["1", "2", "1"], ["2", "3"], ["3", "1"])]
    assert found == [[1, 2, 1], [2, 3], [3, 1]]
    assert [len(captions) for captions in encoder.passes] == [ENCODED_TOGETHER] * 2
    assert [captions[0] for captions in encoder.passes] == ["1", "3"]


def test_more_captions_than_have_room_are_encoded_all_the_same() -> None:
    cache = CaptionCache(Encoder(), 3 * BYTES_EACH)
    assert cache([str(number) for number in range(20)])["pooled_text"][:, 0].tolist() == list(range(20))
    assert held(cache) == cache.held_bytes == 3 * BYTES_EACH


def test_conditions_take_part_in_autograd() -> None:
    weight = torch.ones(5, requires_grad=True)
    (CaptionCache(Encoder())(["2"])["pooled_text"] * weight).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0] * 5
