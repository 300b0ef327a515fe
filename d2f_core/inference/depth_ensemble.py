"""Old name of `d2f_core.flow.depth.ensemble`, for versions that were registered under it."""

from d2f_core.flow.depth.ensemble import depth_npy, depth_png

__all__ = ["depth_npy", "depth_png"]
