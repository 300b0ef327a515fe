"""Training: Ray Train workers, a DeepSpeed engine in each. Independent of what is trained (see `task`)."""
