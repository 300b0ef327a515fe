"""Generating images from prompts."""
