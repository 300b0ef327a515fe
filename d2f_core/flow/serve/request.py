"""Parses and checks the body of an image request; needs no model."""

import json
import math
from typing import Any, Protocol

from d2f_core.flow.generate.prompts import SAMPLE_ID
from d2f_core.objective.solver import ADAPTIVE

WHOLE = {"seed": 0, "steps": 1, "height": 1, "width": 1, "num_images": 1}
"""Integer fields and the minimum of each."""
REAL = ("guidance", "shift")
TEXTS = ("prompt", "negative_prompt", "sample_id", "solver", "time_grid")
FIELDS = (*TEXTS, *REAL, *WHOLE)
LARGEST = 2**63 - 1


class RequestError(ValueError):
    """A request cannot be served as asked; the message gives the value, the rule and the fix."""


class Limits(Protocol):
    """Limits on one request."""

    @property
    def max_prompt_characters(self) -> int: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def max_pixels(self) -> int: ...
    @property
    def max_images(self) -> int: ...


def parse_request(body: bytes, limits: Limits) -> list[dict[str, Any]]:
    """The arguments of `fill_request` for each requested image; images of one request differ in their seeds.

    Raises:
        RequestError: the body is no JSON object, or has an unknown field, a wrong type or a value beyond a limit.
    """
    try:
        asked = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"The body is not JSON ({str(error)[:100] or type(error).__name__}). Send an object."
        ) from None
    if not isinstance(asked, dict):
        raise RequestError(f'The body is a {type(asked).__name__}. Send an object such as {{"prompt": "a cat"}}.')
    if unknown := sorted(asked.keys() - {*FIELDS}):
        raise RequestError(f"Unknown fields {str(unknown)[:200]}. Known are {', '.join(FIELDS)}: remove the others.")
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        _check(name, value)
    if not given.get("prompt"):
        raise RequestError("prompt is missing or empty. Say what to draw.")
    _check_limits(given, limits)
    count, seed = given.pop("num_images", 1), given.pop("seed", 0)
    return [{**given, "seed": seed + number} for number in range(count)]


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _check(name: str, value: Any) -> None:
    shown = repr(value)[:80]
    if name in TEXTS:
        if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
            raise RequestError(f"{name}={shown} must be text of whole characters. Correct it.")
    elif name in REAL:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            raise RequestError(f"{name}={shown} must be a finite number. Correct it, or leave it out.")
    elif isinstance(value, bool) or not isinstance(value, int) or not WHOLE[name] <= value <= LARGEST:
        raise RequestError(f"{name}={shown} must be a whole number of at least {WHOLE[name]}. Correct it.")
    if name == "sample_id" and value and not SAMPLE_ID.fullmatch(str(value)):
        raise RequestError(f"sample_id={shown} must be 1 to 128 letters, digits, '.', '_' or '-'. Correct it.")


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _check_limits(given: dict[str, Any], limits: Limits) -> None:
    for name in ("prompt", "negative_prompt"):
        length = len(given.get(name, ""))
        if length > limits.max_prompt_characters:
            raise RequestError(
                f"{name} has {length} characters; this service takes {limits.max_prompt_characters}. Shorten it."
            )
    for name, most in (("steps", limits.max_steps), ("num_images", limits.max_images)):
        if given.get(name, 0) > most:
            raise RequestError(f"{name}={given[name]} is above {most}, the most that this service does. Ask for less.")
    if given.get("solver") in ADAPTIVE:
        raise RequestError(
            f"solver={given['solver']!r} takes as many steps as it likes, which no limit on steps binds. Use euler, "
            "midpoint, heun, rk4 or ddim."
        )
    sides = [given[name] for name in ("height", "width") if name in given]
    if sides and sides[0] * sides[-1] > limits.max_pixels:
        raise RequestError(
            f"{sides[0]} x {sides[-1]} pixels are above {limits.max_pixels}, the most that this service draws. "
            "Ask for a smaller height or width."
        )
