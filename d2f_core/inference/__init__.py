"""Old import names for registered versions, each of which contains a copy of the loader that it was registered with.

Not for new code, which imports from `flow/`. Names and call signatures must not change.
"""
