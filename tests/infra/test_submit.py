"""What a quiet `submit` shows of a job."""

import io

from d2f_core.progress import TOLD, tell
from infra.local.submit import show

LOG = [
    "2026-11-22 12:00:00,000\tINFO worker.py:1691 -- Using address 127.0.0.1:1\n",
    f"{TOLD}[1/2] draw pictures ...\n",
    "(raylet) WARNING: 8 PYTHON worker processes have been started\n",
    f"{TOLD} ... 120 images in 2 s\n",
    f"{TOLD}[2/2] train ...\n",
    "Loading weights: 100%|##########| 103/103\n",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_what_is_told_is_shown_two_halves_as_one_line():
    screen = io.StringIO()
    show(LOG, screen)
    assert screen.getvalue() == "[1/2] draw pictures ... 120 images in 2 s\n[2/2] train\n"


def test_a_terminal_shows_the_seconds_of_what_is_under_way(monkeypatch):
    monkeypatch.setattr("infra.local.submit.CLOCK_SECONDS", 0.02)

    def slowly():
        import time

        for line in LOG:
            yield line
            time.sleep(0.1)

    screen = Terminal()
    show(slowly(), screen)
    assert " s\b\b" in screen.getvalue() and screen.getvalue().endswith("\n")


def test_a_line_that_is_told_begins_so(capsys):
    tell("[1/2] draw pictures ...")
    assert capsys.readouterr().out == ">>> [1/2] draw pictures ...\n"
