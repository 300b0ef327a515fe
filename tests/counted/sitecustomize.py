"""Keeps what coverage has counted in processes that end without a word: Ray kills its actors, tests kill workers.

Python imports it when it starts, for `make coverage` names its directory in PYTHONPATH.
"""

import importlib.util
import os
import threading
import time

SECONDS = 1.0
saving = threading.Lock()


def save_again_and_again() -> None:
    import coverage

    while True:
        time.sleep(SECONDS)
        with saving:
            if counting := coverage.Coverage.current():
                counting.save()


def begin() -> None:
    threading.Thread(target=save_again_and_again, daemon=True).start()


def begin_in_fork() -> None:
    saving.release()
    begin()


# A process that a counted one has started, in an environment that can count.
if "COVERAGE_PROCESS_CONFIG" in os.environ and importlib.util.find_spec("coverage"):
    begin()
    # A fork while the thread saves would leave coverage's own locks taken in the child for ever.
    os.register_at_fork(before=saving.acquire, after_in_parent=saving.release, after_in_child=begin_in_fork)
