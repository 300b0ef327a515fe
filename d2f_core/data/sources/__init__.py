"""Readers of image collections: images alone or with captions (`images`), images with depth (`depth`), pairs of images
with keypoints (`pairs`).

A source is first planned, from its listing alone, into shards that tasks can read on their own; plan and order of the
samples are the same every time, which is what lets a job be resumed.
"""
