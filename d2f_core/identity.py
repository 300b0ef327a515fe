"""Identity of stored work: the fields that determine it as JSON values, and their hash.

Checkpoints, tables, plans and stages store such an identity, and work is resumed only if it is equal. A field that is
added to a dataclass later is declared with `since`, so that work stored before is neither refused nor repeated.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")

BEFORE, ONLY, IN_FILES = "value before the field existed", "when the field says anything", "in files too"


def since(default: T, *, before: T, only: tuple[str, object] | None = None, in_files: bool = False) -> T:
    """Declare a dataclass field that was added after work had been stored without it.

    Args:
        default: the field's value in a new config.
        before: the value that describes the behaviour before the field existed. With it, the identity is that of a
            config without the field.
        only: another field and its value without which this field says nothing, and is not part of the identity.
        in_files: a config file without the field means `before` (see `filled`); otherwise it means the default.
    """
    return cast(T, dataclasses.field(default=default, metadata={BEFORE: before, ONLY: only, IN_FILES: in_files}))


def filled(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config file, with those fields of `since(..., in_files=True)` that are missing, in nested
    dataclasses too.
    """
    found, hints = dict(given), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = given.get(field.name)
        if field.metadata.get(IN_FILES) and field.name not in given:
            found[field.name] = field.metadata[BEFORE]
        elif isinstance(value, Mapping) and dataclasses.is_dataclass(hints[field.name]):
            found[field.name] = filled(cast(type, hints[field.name]), value)
    return found


def identity_values(config: Any) -> dict[str, Any]:
    """A dataclass's fields by name, nested ones too, without those of `since` that have their `before` value."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        only = field.metadata.get(ONLY)
        if only and getattr(config, only[0]) != only[1]:
            continue
        if BEFORE not in field.metadata or field.metadata[BEFORE] != value:
            found[field.name] = _values(value)
    return found


def _values(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return identity_values(value)
    if isinstance(value, Mapping):
        return {name: _values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_values(item) for item in value]
    return value


def canonical_json(value: object) -> bytes:
    """Canonical JSON of a value, for hashing and comparing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def identity_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of the values' canonical JSON."""
    return hashlib.sha256(canonical_json(values)).hexdigest()


def stage_key(config: Any, inputs: Mapping[str, str]) -> str:
    """Hash of a stage's config (a dataclass) and the digests of its inputs; equal keys mean equal work."""
    value = {"config": _whole_numbers(identity_values(config)), "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _whole_numbers(value: Any) -> Any:
    """The value with whole floats as integers: YAML may hold 1.0 where the code has 1."""
    if isinstance(value, dict):
        return {name: _whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two identities for a message: each field with both values; empty if they are equal."""
    names = [*now, *(name for name in there if name not in now)]
    return [f"{name} was {there.get(name)}, now {now.get(name)}" for name in names if there.get(name) != now.get(name)]
