"""Images to depth."""
