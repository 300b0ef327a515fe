"""Captioned images and latents on object storage: their schemas, manifests, readers and order."""
