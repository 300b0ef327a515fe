"""Depth maps from images: prediction and evaluation."""
