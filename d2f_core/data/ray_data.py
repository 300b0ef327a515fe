"""What every Ray Data execution of this project is told."""

import sys

import ray.data

INIT_DEATHS = 3
"""Actors in a row that may die while they load before a job ends: one is a node or its memory, more are the code."""


def configure(dataset: ray.data.Dataset) -> None:
    """Set what holds for this dataset and what is derived from it.

    Ray Data ends an execution in which no block moves for 30 minutes. Here one block may be long work by right (64
    prompts at 50 steps), and a job that was ended so would end again each time. An actor that dies is found by Ray.
    """
    context = dataset.context
    context.execution_no_progress_timeout_s = -1
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
