"""Where the pipelines run: the embedded local stack, and what a cluster needs."""
