"""The models that an evaluation compares: versions pinned once and stored at the output."""

import json
from dataclasses import asdict, dataclass

from d2f_core.storage import join, read_bytes, write_bytes
from d2f_core.tracking import get_alias, pin_model

PINS_NAME = "models.json"
REGISTERED = "models:/"
AUTO = "auto"
"""Champion setting for the version that the champion's alias names when the evaluation begins."""


class PinError(ValueError):
    """The output evaluates other models, or the gate may not replace what the alias names."""


@dataclass(frozen=True, kw_only=True)
class Pins:
    """URIs without aliases by role; "" if there is no model in the role."""

    candidate: str
    champion: str
    base: str
    champion_at_start: str | None = None
    """The version that the champion's alias named when these were pinned, whatever is compared; "" if it named none.
    None: an older program pinned them, and did not say."""

    @property
    def models(self) -> dict[str, str]:
        """The compared models' URIs by role."""
        roles = {"candidate": self.candidate, "champion": self.champion, "base": self.base}
        return {role: uri for role, uri in roles.items() if uri}

    def to_json(self) -> bytes:
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(known, indent=1).encode()


def registered_name(uri: str) -> str:
    """NAME of `models:/NAME/VERSION` or `models:/NAME@ALIAS`; empty for any other URI."""
    return uri.removeprefix(REGISTERED).split("@")[0].split("/")[0] if uri.startswith(REGISTERED) else ""


def pin_models(output: str, *, candidate: str, champion: str, champion_alias: str, base: str) -> Pins:
    """Pin the models of an evaluation; a resumed evaluation keeps the champion that it began with.

    Args:
        champion: a URI, "auto" for the version that `champion_alias` of the candidate's name names, or "" for none.
        base: a URI, or "" for none.

    Raises:
        PinError: the output evaluates another candidate, champion or base, or its record of them is damaged.
        TrackingError: a version does not exist.
    """
    at_start = _aliased(candidate, champion_alias)
    if champion == AUTO:
        compared = at_start
    else:
        compared = pin_model(champion) if champion else ""
    pinned = Pins(
        candidate=pin_model(candidate),
        champion=compared,
        base=pin_model(base) if base else "",
        champion_at_start=at_start,
    )
    try:
        there = _read_pins(join(output, PINS_NAME))
    except FileNotFoundError:
        return pinned
    for role in ("candidate", "base"):
        if (old := getattr(there, role)) != (new := getattr(pinned, role)):
            raise PinError(f"{output!r} evaluates the {role} {old!r}, not {new!r}. Give another output.")
    # The champion may have moved since, even to this candidate; the comparison keeps the champion it began with.
    if not (champion == AUTO or there.champion == compared or _moved(champion, there.champion)):
        raise PinError(
            f"{output!r} compares with {there.champion or 'no champion'}, not with {compared or 'no champion'}. Leave "
            "the champion's flag out to go on with that, or give another output."
        )
    return there


def _moved(champion: str, pinned: str) -> bool:
    """Whether a champion given by alias may have been the pinned version when the evaluation began."""
    return "@" in champion and registered_name(champion) == registered_name(pinned) != ""


def _read_pins(place: str) -> Pins:
    try:
        return Pins(**json.loads(read_bytes(place)))
    except (ValueError, TypeError) as error:  # no JSON, or other fields
        raise PinError(
            f"{place!r} is no record of an evaluation's models ({error}). Give another output, or remove the file: the "
            "models are then pinned anew."
        ) from None


def _aliased(candidate: str, alias: str) -> str:
    """The version that the alias of the candidate's name names; "" if there is none."""
    name = registered_name(candidate)
    version = get_alias(name, alias) if name else None
    return f"{REGISTERED}{name}/{version}" if version is not None else ""


def keep_pins(output: str, pins: Pins) -> None:
    """Write the pinned URIs at the output, unless an earlier run already did.

    Raises:
        PinError: another job that began there at the same time has pinned others.
    """
    place = join(output, PINS_NAME)
    try:
        write_bytes(place, pins.to_json(), exclusive=True)
    except FileExistsError:
        if (there := _read_pins(place)) != pins:
            raise PinError(
                f"{output!r} was begun by another job at the same time, with {there.models}, not {pins.models}. Run "
                "this command again: it goes on with those, or says why it cannot."
            ) from None
