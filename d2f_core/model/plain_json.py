"""Parses JSON that may come from anybody: an object of limited depth, with no key twice and no number that is none."""

import json
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 32


class NotPlainError(ValueError):
    """Why a text is refused: the rule and the fix, which follow its file's name in the message."""


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        NotPlainError: it is no JSON object, is nested too deep, has a key twice, or holds NaN or an infinite number.
    """
    try:
        content = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise NotPlainError(f"is not plain JSON ({error}). Take it from the original model.") from None
    if not isinstance(content, dict):
        raise NotPlainError(f"holds a {type(content).__name__}, not a JSON object. Take it from the original model.")
    if max(depth for _, _, depth in entries(content)) > MAX_DEPTH:
        raise NotPlainError(f"is nested more than {MAX_DEPTH} deep. Take it from the original model.")
    return content


def entries(content: Any) -> Iterator[tuple[str | None, Any, int]]:
    """(key, value, depth) of every value, without recursion."""
    left: list[tuple[str | None, Any, int]] = [(None, content, 0)]
    while left:
        key, value, depth = left.pop()
        yield key, value, depth
        if isinstance(value, dict):
            left += [(name, part, depth + 1) for name, part in value.items()]
        elif isinstance(value, list):
            left += [(None, part, depth + 1) for part in value]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("it has a key twice")
    return values


def _not_a_number(text: str) -> Any:
    raise ValueError(f"it holds {text}")
