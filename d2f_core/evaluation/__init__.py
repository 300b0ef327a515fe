"""Judgement, whatever is judged: values with intervals, and the gate."""
