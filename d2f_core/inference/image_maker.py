"""Old name of `d2f_core.flow.generate.sampler`, for versions that were registered under it."""

from d2f_core.flow.generate.sampler import ImageSampler, Request, encode_image, fill_request

__all__ = ["ImageMaker", "Request", "encode_image", "fill_request"]


class ImageMaker(ImageSampler):
    make = ImageSampler.sample
