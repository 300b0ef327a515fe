"""How long a call is repeated, by a clock that the calls move themselves."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from d2f_core import retry
from d2f_core.retry import GaveUpError, keep_trying

LIMIT = 60.0


class Clock:
    """Stands still but for `sleep` and what a call takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    yield clock


def failing(clock: Clock, *, takes: float, times: int) -> SimpleNamespace:
    """A transfer that lasts for `takes` seconds and breaks so many times."""
    made = SimpleNamespace(attempts=0)

    def call() -> str:
        made.attempts += 1
        clock.sleep(takes)
        if made.attempts <= times:
            raise ConnectionResetError("cut")
        return "sent"

    made.call = call
    return made


def tried(call: SimpleNamespace) -> str:
    return keep_trying("send it", call.call, patience=lambda error: LIMIT)


@pytest.mark.parametrize("times", [1, 2])
def test_a_transfer_that_breaks_later_than_the_limit_is_repeated(clock: Clock, times: int) -> None:
    assert tried(failing(clock, takes=200.0, times=times)) == "sent"


def test_the_time_counts_from_the_first_failure(clock: Clock) -> None:
    transfer = failing(clock, takes=19.0, times=99)
    with pytest.raises(GaveUpError, match=r"could not send it in \d attempts over \d+ s: cut"):
        tried(transfer)
    assert 19.0 + LIMIT <= clock.now < 19.0 + LIMIT + 2 * 19.0, (
        "the first attempt does not count, a last one may be long"
    )


def test_a_third_failure_beyond_the_limit_is_the_last(clock: Clock) -> None:
    transfer = failing(clock, takes=200.0, times=99)
    with pytest.raises(GaveUpError, match="in 3 attempts over 6"):
        tried(transfer)


def test_an_error_without_time_is_raised_as_it_is(clock: Clock) -> None:
    transfer = failing(clock, takes=1.0, times=9)
    with pytest.raises(ConnectionResetError):
        keep_trying("send it", transfer.call, patience=lambda error: 0.0)
    assert transfer.attempts == 1
