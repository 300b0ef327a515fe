"""Pairs and clusters of images that look alike."""
