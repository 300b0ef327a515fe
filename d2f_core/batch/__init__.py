"""Shared parts of batch jobs on Ray Data, independent of what the jobs make."""
