"""Checkpoints as one file in Stable Diffusion's original layout, written from models and read as base models."""
