"""Keeps what coverage has counted in processes that end without a word: Ray kills its actors, tests kill workers.

Python imports it when it starts, for `make coverage` names its directory in PYTHONPATH.
"""

import importlib.util
import os
import threading
import time

SECONDS = 1.0


def save_again_and_again() -> None:
    import coverage

    while True:
        time.sleep(SECONDS)
        if counting := coverage.Coverage.current():
            counting.save()


# A process that a counted one has started, in an environment that can count.
if "COVERAGE_PROCESS_CONFIG" in os.environ and importlib.util.find_spec("coverage"):
    threading.Thread(target=save_again_and_again, daemon=True).start()
