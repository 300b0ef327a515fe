"""Old name of `d2f_core.flow.depth.predictor`, for versions that were registered under it."""

from d2f_core.flow.depth.predictor import DepthPredictor, fill_settings

__all__ = ["DepthMaker", "fill_settings"]


class DepthMaker(DepthPredictor):
    make = DepthPredictor.predict
