"""Encoding images to latent tables."""
