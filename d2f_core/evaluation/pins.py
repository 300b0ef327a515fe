"""The models that an evaluation compares: versions pinned once and stored at the output; the champion's alias moves
last.
"""

import json
import logging
from dataclasses import asdict, dataclass

from d2f_core.storage import join, read_bytes, write_bytes
from d2f_core.tracking import get_alias, pin_model, promote

logger = logging.getLogger(__name__)

PINS_NAME = "models.json"
REGISTERED = "models:/"
AUTO = "auto"
"""Champion setting for the version that the champion's alias names when the evaluation begins."""


class PinError(ValueError):
    """The output evaluates other models, or the alias moved during the evaluation."""


@dataclass(frozen=True, kw_only=True)
class Pins:
    """URIs without aliases by role; "" if there is no model in the role."""

    candidate: str
    champion: str
    base: str

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def registered_name(uri: str) -> str:
    """NAME of `models:/NAME/VERSION` or `models:/NAME@ALIAS`; empty for any other URI."""
    return uri.removeprefix(REGISTERED).split("@")[0].split("/")[0] if uri.startswith(REGISTERED) else ""


def pin_models(output: str, *, candidate: str, champion: str, champion_alias: str, base: str) -> Pins:
    """Pin the models of an evaluation; a resumed evaluation keeps the champion that it began with.

    Args:
        champion: a URI, "auto" for the version that `champion_alias` of the candidate's name names, or "" for none.
        base: a URI, or "" for none.

    Raises:
        PinError: the output evaluates another candidate or base, or its record of them is damaged.
        TrackingError: a version does not exist.
    """
    pinned = Pins(
        candidate=pin_model(candidate),
        champion=_champion(candidate, champion, champion_alias),
        base=pin_model(base) if base else "",
    )
    try:
        there = _read_pins(join(output, PINS_NAME))
    except FileNotFoundError:
        return pinned
    for role in ("candidate", "base"):
        if (old := getattr(there, role)) != (new := getattr(pinned, role)):
            raise PinError(f"{output!r} evaluates the {role} {old!r}, not {new!r}. Give another output.")
    # The champion may have moved since, even to this candidate; the comparison keeps the champion it began with.
    return there


def _read_pins(place: str) -> Pins:
    try:
        return Pins(**json.loads(read_bytes(place)))
    except (ValueError, TypeError) as error:  # no JSON, or other fields
        raise PinError(
            f"{place!r} is no record of an evaluation's models ({error}). Give another output, or remove the file: the "
            "models are then pinned anew."
        ) from None


def _champion(candidate: str, champion: str, alias: str) -> str:
    if champion != AUTO:
        return pin_model(champion) if champion else ""
    name = registered_name(candidate)
    version = get_alias(name, alias) if name else None
    return f"{REGISTERED}{name}/{version}" if version is not None else ""


def keep_pins(output: str, pins: Pins) -> None:
    """Write the pinned URIs at the output, unless an earlier run already did."""
    try:
        write_bytes(join(output, PINS_NAME), pins.to_json(), exclusive=True)
    except FileExistsError:
        return


def promote_candidate(pins: Pins, *, champion: str, champion_alias: str) -> None:
    """Move the alias to the candidate, a registered version, unless it has moved since the evaluation began.

    Args:
        champion: as given to `pin_models`.

    Raises:
        PinError: the alias now names a version other than the one compared.
    """
    name, version = registered_name(pins.candidate), pins.candidate.rsplit("/", 1)[-1]
    now = get_alias(name, champion_alias)
    if now == version:
        return
    if champion == AUTO and now != (pins.champion.rsplit("/", 1)[-1] or None):
        raise PinError(
            f"{name}@{champion_alias} moved to version {now} while this evaluation ran against "
            f"{pins.champion or 'none'}. Evaluate again at another output."
        )
    promote(name, version, champion_alias)
    logger.info("%s@%s is now version %s", name, champion_alias, version)
