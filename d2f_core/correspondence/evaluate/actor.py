"""The actor of an evaluation: asks matchers about chunks of pairs, and writes their answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

from d2f_core.correspondence.evaluate.answers import (
    ALIGNED,
    AS_PUBLISHED,
    EXACT,
    FLOOR,
    Answer,
    answer_rows,
    write_answers,
)  # fmt: skip
from d2f_core.correspondence.evaluate.chunks import Chunk
from d2f_core.correspondence.evaluate.config import EvaluateMatchesConfig, MatcherChoice
from d2f_core.correspondence.evaluate.hog import hog_matcher
from d2f_core.correspondence.evaluate.matchers import build_matchers
from d2f_core.correspondence.evaluate.measure import EmbeddedImages, asked_points, both, predict_by
from d2f_core.correspondence.evaluate.pose_align import answer_mirrored, distance
from d2f_core.correspondence.matcher import Matcher
from d2f_core.correspondence.matching import PUBLISHED
from d2f_core.data.sources.pair_sample import PairSample
from d2f_core.device import reserved_device


def groups(choices: Sequence[MatcherChoice]) -> list[list[int]]:
    """Numbers of the matchers that are asked about a pair one after another, because they share a teacher.

    The last group has one number more than there are choices: that of the floor HOG, on the last matcher's grid.
    """
    found: list[list[int]] = []
    for number, choice in enumerate(choices):
        joined = [g for g in found if any({*choices[other].teachers} & {*choice.teachers} for other in g)]
        found = [g for g in found if g not in joined]
        found.append(sorted([number, *(other for g in joined for other in g)]))
    found.sort(key=lambda group: group[-1])
    return [*found[:-1], [*found[-1], len(choices)]]


class MatchScorer:
    """Ray Data actor: the numbers of a group of matchers and of a chunk of pairs -> a file with their answers."""

    def __init__(self, config: EvaluateMatchesConfig, chunks: Sequence["ray.ObjectRef[Chunk]"]) -> None:
        torch.set_num_threads(config.cpus_per_actor)
        self._config, self._chunks, self._device = config, chunks, reserved_device()
        self._groups = groups(config.compared)
        self._group = -1
        self._asked: dict[int, AskedMatcher | AskedFloor] = {}

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        group, number = int(batch["group"][0]), int(batch["chunk"][0])
        self._load(group)
        chunk = ray.get(self._chunks[number])
        write_answers(self._config.output, group, number, pa.concat_tables(self._answers(chunk)))
        return {"group": [group], "chunk": [number]}

    def _load(self, group: int) -> None:
        """Hold the matchers of a group, and no others."""
        if group == self._group:
            return
        self._group, self._asked = -1, {}
        choices = self._config.compared
        numbers = [number for number in self._groups[group] if number < len(choices)]
        matchers = dict(zip(numbers, build_matchers([choices[n] for n in numbers], self._device), strict=True))
        self._asked |= {number: AskedMatcher(each, self._config.pose_align) for number, each in matchers.items()}
        if len(choices) in self._groups[group]:
            last = matchers[len(choices) - 1]
            self._asked[len(choices)] = AskedFloor(hog_matcher(last.grid, last.preparation.fit))
        self._group = group

    def _answers(self, chunk: Chunk) -> Iterator[pa.Table]:
        for number, pair in zip(chunk.numbers, chunk.pairs, strict=True):
            for matcher, asked in self._asked.items():
                for answer in asked.answers(pair, chunk):
                    yield answer_rows(matcher, number, answer)


class AskedMatcher:
    """A matcher with the images it has seen, asked about pairs in every way that is compared."""

    def __init__(self, matcher: Matcher, pose_align: bool) -> None:
        self._matcher, self._pose_align = matcher, pose_align
        self._images = EmbeddedImages(matcher)
        self._published = replace(matcher, decoding=PUBLISHED)

    def answers(self, pair: PairSample, chunk: Chunk) -> Iterator[Answer]:
        points = asked_points(pair)
        exact, published = (
            predict_by(each, self._images, chunk.batches)(pair, points) for each in (self._matcher, self._published)
        )
        yield Answer(decoding=EXACT, positions=exact[0], confidence=exact[1])
        yield Answer(decoding=AS_PUBLISHED, positions=published[0], confidence=published[1])
        if self._pose_align:
            yield self._aligned(pair, chunk, exact)

    def _aligned(self, pair: PairSample, chunk: Chunk, exact: tuple[Tensor, Tensor]) -> Answer:
        source, target = both(pair)
        batch = chunk.batches[source.key]
        mirrored = self._images.get(source, batch, flipped=True)
        plain, there = self._images.get(source, batch), self._images.get(target, chunk.batches[target.key])
        if flipped := distance(mirrored, there) < distance(plain, there):
            exact = answer_mirrored(self._matcher, pair, mirrored, there, exact)
        return Answer(decoding=ALIGNED, positions=exact[0], confidence=exact[1], flipped=flipped)


class AskedFloor:
    """A floor that looks at the images, asked like a matcher, but only once."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher, self._images = matcher, EmbeddedImages(matcher)

    def answers(self, pair: PairSample, chunk: Chunk) -> Iterator[Answer]:
        found = predict_by(self._matcher, self._images, chunk.batches)(pair, asked_points(pair))
        yield Answer(decoding=FLOOR, positions=found[0], confidence=found[1])
