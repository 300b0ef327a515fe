"""Counts what a piece of code gets from S3: `with bytes_got() as got: ...` leaves the bytes by key."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from d2f_core import s3 as s3_session


@contextmanager
def bytes_got() -> Iterator[dict[str, int]]:
    """Key -> bytes that S3 has answered to GETs of it."""
    got: dict[str, int] = {}

    def note(parsed: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        asked.append(int(parsed["ContentLength"]))

    def name(params: dict[str, Any], **_: Any) -> None:
        keys.append(params["Key"])

    asked, keys = list[int](), list[str]()
    session = s3_session.session()
    session.register("before-parameter-build.s3.GetObject", name, unique_id="test-name")
    session.register("after-call.s3.GetObject", note, unique_id="test-note")
    s3_session.open_s3(attempts=1).clear_instance_cache()
    try:
        yield got
    finally:
        session.unregister("before-parameter-build.s3.GetObject", unique_id="test-name")
        session.unregister("after-call.s3.GetObject", unique_id="test-note")
        for key, size in zip(keys, asked, strict=True):
            got[key] = got.get(key, 0) + size
