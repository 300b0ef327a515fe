"""Pairs of images with their teachers' match targets, as a table that a student is trained on."""
