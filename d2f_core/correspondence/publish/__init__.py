"""Trained matchers as versions of a registered model."""
