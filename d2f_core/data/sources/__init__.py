"""Images as they lie around, alone, with captions (both: `images`) or with depth (`depth`).

A source is first planned, from its listing alone, into shards that tasks can read on their own; plan and order of the
samples are the same every time, which is what lets a job be resumed.
"""
