"""Diff2Flow: turn a diffusion model into a flow matching model, on Ray."""
