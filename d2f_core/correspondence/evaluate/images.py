"""Which images of pairs can be used, and what they hold: each is read and decoded once, before a matcher is asked."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

from d2f_core.correspondence.evaluate.measure import RULES, both
from d2f_core.data.images import BadImageError, decode_image
from d2f_core.data.quarantine import BadSample
from d2f_core.data.sources.pair_sample import PairImage, PairSample

THREADS = 8


@dataclass(frozen=True, kw_only=True)
class ImageContent:
    """What was found in an image's file."""

    sha256: str = ""
    """Of the file's bytes, in hex digits."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels, upright."""
    problem: str = ""
    """Why the image cannot be used: a code and a detail."""


def read_contents(pairs: Sequence[PairSample]) -> dict[str, ImageContent]:
    """The content of every image of pairs, by the image's key."""
    distinct = {image.key: image for pair in pairs for image in both(pair)}
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(distinct, pool.map(_content, distinct.values()), strict=True))


def _content(image: PairImage) -> ImageContent:
    try:
        data = image.read()
        return ImageContent(sha256=sha256(data).hexdigest(), size=decode_image(data, RULES).size)
    except BadImageError as error:
        return ImageContent(problem=str(error))
    except FileNotFoundError:
        return ImageContent(problem="no_image: the file is gone")


def images_digest(pairs: Sequence[PairSample], contents: Mapping[str, ImageContent]) -> str:
    """Hash of what the images of pairs hold, in order: it changes with any of their bytes, and not with their place."""
    every = (contents[image.key].sha256 for pair in pairs for image in both(pair))
    return sha256(" ".join(every).encode()).hexdigest()[:16]


def split_usable(
    pairs: Sequence[PairSample], contents: Mapping[str, ImageContent]
) -> tuple[list[PairSample], list[BadSample]]:
    """The pairs whose images can both be used, and the ledger of the others."""
    problems = [next(_problems(pair, contents), None) for pair in pairs]
    ledger = [
        BadSample(source_uri=pair.source_uri, sample_id=pair.pair_id, reason=problem)
        for pair, problem in zip(pairs, problems, strict=True)
        if problem
    ]
    return [pair for pair, problem in zip(pairs, problems, strict=True) if not problem], ledger


def _problems(pair: PairSample, contents: Mapping[str, ImageContent]) -> Iterator[str]:
    for image in both(pair):
        content, place = contents[image.key], image.uri or image.image_id
        if content.problem:
            yield f"{content.problem} ({place})"
        elif content.size != tuple(image.size):
            yield f"bad_annotation: {place} is {content.size}, its pair says {tuple(image.size)}"
