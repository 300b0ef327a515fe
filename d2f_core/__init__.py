"""Diff2Flow: turn a diffusion model into a flow matching model, on Ray."""

import gc

# Importing torch, transformers and diffusers creates a million permanent objects. Garbage collection after every 700
# new ones (Python's default) takes a fifth of the 13 s of CPU time that a worker needs to start.
if gc.get_threshold()[0]:
    gc.set_threshold(max(10_000, gc.get_threshold()[0]))
