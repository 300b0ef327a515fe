"""Which matchers are compared on which pairs. Imports neither torch nor a model."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from d2f_core.batch.config import AwaitedPoolConfig
from d2f_core.correspondence.embed.config import TeacherConfig
from d2f_core.data.sources.config import PairSource
from d2f_core.identity import since

FLOORS = ("random", "same pixel", "box copy", "HOG")
"""What every matcher is compared with."""
MODEL = "model"
"""What a training calls the directory of its matcher."""
LONGEST_NAME = 60


class EvaluateMatchesError(ValueError):
    """An evaluation cannot run as asked; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class ViewPairsConfig:
    """Pairs of rendered views: different things of one category."""

    views: str = ""
    """Table of views; empty: none."""
    split: Literal["train", "val", "test"] = "val"
    per_range: int = 10
    """Most pairs of each category in each range of angles between the views."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_range < 1:
            raise EvaluateMatchesError(f"per_range={self.per_range} must be at least 1. Use 10 to 40.")


@dataclass(frozen=True, kw_only=True)
class MatcherChoice:
    """One matcher to compare: a trained one, a vision transformer as it is, or teachers together."""

    name: str
    uri: str = ""
    """A trained matcher, or a vision transformer in transformers' layout."""
    size: int = 0
    """Height and width of its input in pixels; 0: a trained matcher's own."""
    layers: int = 0
    """Of a vision transformer: the block that is read, counted from 1; 0: the last."""
    normalisation: str = "imagenet"
    """Of a vision transformer's input."""
    teachers: tuple[TeacherConfig, ...] = ()
    shares: tuple[float, ...] = ()
    """Of the teachers; empty: equal."""

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[\w .+-]{{1,{LONGEST_NAME}}}", self.name):
            raise EvaluateMatchesError(f"name={self.name!r} of a matcher must be letters, digits, spaces and . + - _.")
        if bool(self.uri) == bool(self.teachers):
            raise EvaluateMatchesError(f"matcher {self.name!r} needs either a uri or teachers.")
        if self.shares and (len(self.shares) != len(self.teachers) or not all(share > 0 for share in self.shares)):
            raise EvaluateMatchesError(f"shares={self.shares} of {self.name!r}: give one above 0 for each teacher.")
        if any(teacher.prompt == "category" for teacher in self.teachers):
            raise EvaluateMatchesError(
                f"a teacher of {self.name!r} has prompt='category', and here nothing tells it one. Use 'generic'."
            )


CHAMPION = "champion"
"""Name of the champion among the matchers."""


@dataclass(frozen=True, kw_only=True)
class MatcherGateConfig:
    """When a registered matcher becomes the champion; every rule is paired over images."""

    candidate: str = ""
    """Name or URI of the matcher that is judged; empty: none is. It must beat every floor."""
    champion: str = "auto"
    """URI of the matcher that it must be better than; auto: the version that the champion's alias
    names, if there is one; empty: none."""
    must_beat: tuple[str, ...] = ()
    """Names of further matchers that it must beat, such as its untrained base."""
    tolerance: float = 0.0
    """By which share of the champion's PCK it may be worse; 0: it must be better."""
    least_pairs: int = 50
    """Fewer pairs judge nobody: their intervals are too narrow."""
    alpha: float = 0.1
    average: Literal["point", "image", "category"] = "image"
    confident: bool = True
    """Ask it of the worse end of the paired difference's interval, not only of the value."""
    confidence: float = since(0.99, before=0.99)
    """One-sided confidence of each comparison: of equal matchers, at most the share 1 - confidence passes."""
    promote: bool = True
    """Move the champion's alias to a candidate that passes, when it is a registered version."""
    champion_alias: str = "champion"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise EvaluateMatchesError(f"gate.tolerance={self.tolerance} must lie from 0 to below 1. Use 0.")
        if not 0.5 < self.confidence < 1:
            raise EvaluateMatchesError(f"gate.confidence={self.confidence} must lie between 0.5 and 1. Use 0.99.")
        if self.least_pairs < 1:
            raise EvaluateMatchesError(f"gate.least_pairs={self.least_pairs} must be at least 1. Use 50.")
        if not 0 < self.alpha <= 1:
            raise EvaluateMatchesError(f"gate.alpha={self.alpha} must lie above 0 and at most at 1. Use 0.1.")
        if not self.champion_alias:
            raise EvaluateMatchesError("gate.champion_alias is empty. Use 'champion'.")

    @property
    def metric(self) -> str:
        """Name of what is compared."""
        return f"pck_{self.alpha:g}_by_{self.average}"


@dataclass(frozen=True, kw_only=True)
class MatchesWork:
    """The matchers, the pairs, and what is made of them."""

    matchers: tuple[MatcherChoice, ...] = ()
    uris: tuple[str, ...] = since((), before=())
    """Trained matchers to compare beside `matchers`; each is named by the part of its URI that tells it apart."""
    size: int = since(0, before=0)
    """Height and width in pixels of what the matchers of `uris` are given; 0: each one's own."""
    pairs: PairSource = field(default_factory=PairSource)
    """Pairs of images with keypoints: SPair-71k or one's own."""
    views: ViewPairsConfig = field(default_factory=ViewPairsConfig)
    """In place of `pairs`."""
    output: str = ""
    """Where points.parquet, scores.json and report.html are written. Repeating the command goes on with what is
    missing; another comparison is refused there."""
    pose_align: bool = since(False, before=False)
    """Whether each matcher is also asked with its source mirrored where that is nearer to the target. This uses labels:
    which keypoints a mirror swaps."""
    batch_size: int = since(1, before=1)
    """Images per forward pass. On a GPU 16; on CPUs more than 1 gain nothing, and slow a convolutional network down."""
    chunk_size: int = since(256, before=256)
    """Most pairs per unit of work, the most that is lost when an actor is killed."""
    alphas: tuple[float, ...] = (0.1, 0.05, 0.01)
    replicates: int = 1000
    """Resampled sets of pairs for the 95 % intervals."""
    shown: int = 6
    """Pairs that the report shows, and as many of the worst."""
    seed: int = 0
    gate: MatcherGateConfig = field(default_factory=MatcherGateConfig)
    experiment: str = "distilldift"
    """MLflow experiment; empty: no run."""


@dataclass(frozen=True, kw_only=True)
class EvaluateMatchesConfig(AwaitedPoolConfig, MatchesWork):
    """Matchers compared on pairs of images, in every protocol at once, beside floors."""

    num_actors: int = 1

    def __post_init__(self) -> None:
        self.check_counts("replicates", "shown", "batch_size", "chunk_size", error=EvaluateMatchesError)
        names = [matcher.name for matcher in self.compared]
        if not names or len({*names, *FLOORS}) < len(names) + len(FLOORS):
            raise EvaluateMatchesError(
                f"matchers are called {names}. Give at least one, each with a name of its own, and none of "
                f"{', '.join(FLOORS)}."
            )
        self._check_gate(names)
        if bool(self.pairs.uri) == bool(self.views.views):
            raise EvaluateMatchesError("give either pairs.uri or views.views: pairs of images, or a table of views.")
        if not self.output:
            raise EvaluateMatchesError("output is empty. Give --output URI.")
        if not self.alphas or not all(0 < alpha <= 1 for alpha in self.alphas):
            raise EvaluateMatchesError(f"alphas={self.alphas} must lie above 0 and at most at 1. Use 0.1 0.05 0.01.")

    @property
    def compared(self) -> tuple[MatcherChoice, ...]:
        """`matchers`, then those of `uris`."""
        names = names_of(self.uris)
        return (
            *self.matchers,
            *(MatcherChoice(name=name, uri=uri, size=self.size) for name, uri in zip(names, self.uris, strict=True)),
        )

    def _check_gate(self, names: list[str]) -> None:
        gate = self.gate
        if not gate.candidate:
            return
        judged = self.judged
        unknown = sorted({*gate.must_beat} - {*names})
        if judged is None or unknown:
            what = f"gate.must_beat names {unknown[0]!r}" if unknown else f"gate.candidate names {gate.candidate!r}"
            raise EvaluateMatchesError(f"{what}, which is none of the matchers {names}.")
        if judged.name in gate.must_beat:
            raise EvaluateMatchesError(f"gate.must_beat holds the candidate {judged.name!r} itself. Leave it out.")
        if not judged.uri:
            raise EvaluateMatchesError(f"gate.candidate={gate.candidate!r} has no uri: teachers cannot be promoted.")

    @property
    def judged(self) -> MatcherChoice | None:
        """The matcher that the gate judges."""
        wanted = self.gate.candidate
        return next((each for each in self.compared if wanted in (each.name, each.uri)), None) if wanted else None


def names_of(uris: Sequence[str]) -> list[str]:
    """A name for each URI: the parts of its path that tell it from the others, such as `seed-1 refined` of
    `s3://runs/seed-1/refined/model`; of a single one the last part. `models:/NAME@ALIAS` is NAME ALIAS, and
    `models:/NAME/3` NAME version 3.

    Raises:
        EvaluateMatchesError: one is empty, or given twice.
    """
    if registered := [uri for uri in uris if uri.startswith("models:/")]:
        others = iter(names_of([uri for uri in uris if uri not in registered]))
        return [_registered(uri) if uri in registered else next(others) for uri in uris]
    parts = [re.split("/+", re.sub(f"/{MODEL}/*$", "", uri).rstrip("/")) for uri in uris]
    if not all(part[-1] for part in parts) or len(set(map(tuple, parts))) < len(parts):
        raise EvaluateMatchesError(f"uris={list(uris)} must each name another directory. Leave out what is twice.")
    first, last = _alike(parts), _alike([each[::-1] for each in parts]) if len(parts) > 1 else 0
    chosen = [each[min(max(first, 1), len(each) - 1) :][: max(1, len(each) - first - last)] for each in parts]
    return [" ".join(re.sub(r"[^\w.+-]", "-", part) for part in each)[-LONGEST_NAME:] for each in chosen]


def _registered(uri: str) -> str:
    return uri.removeprefix("models:/").replace("/", " version ").replace("@", " ")


def _alike(lists: Sequence[Sequence[str]]) -> int:
    """In how many entries the lists begin alike."""
    columns = zip(*lists, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
