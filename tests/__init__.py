"""A regular package, because a dependency of the demo installs a top-level `tests` of its own."""
