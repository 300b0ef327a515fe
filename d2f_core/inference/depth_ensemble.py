"""`d2f_core.flow.depth.ensemble`, for versions that were registered before it had that name."""

from d2f_core.flow.depth.ensemble import depth_npy, depth_png

__all__ = ["depth_npy", "depth_png"]
