"""Diff2Flow's jobs: encoding, sampling, depth, evaluation, serving and publishing."""
