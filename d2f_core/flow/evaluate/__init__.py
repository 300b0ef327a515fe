"""Models compared by their images."""
