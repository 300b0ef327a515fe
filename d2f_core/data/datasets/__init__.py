"""Data sets that this project generates: captioned drawings, and rendered scenes with depth."""
