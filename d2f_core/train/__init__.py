"""Training: Ray Train workers, a DeepSpeed engine in each. Knows nothing about what is trained."""
