"""Names under which registered versions find this project: each holds a copy of the loader that it was registered with.

Not for new code: `flow/` is where these live. Names and call signatures stay.
"""
