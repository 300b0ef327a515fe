"""Infrastructure: the embedded local stack, installation, and the tools for lock files and docs."""
