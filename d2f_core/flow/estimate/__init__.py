"""Estimates of what a finetuning needs, before it is started."""
