"""Judging models, independent of what they produce: values with confidence intervals, and the promotion gate."""
