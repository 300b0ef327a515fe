"""Comparing models by the images that they generate."""
