"""Images of pairs whose bytes are in Ray's object store: once each, however many chunks of pairs ask for them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ray

from d2f_core.correspondence.evaluate.measure import both
from d2f_core.data.sources.pair_sample import PairImage, PairSample


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedImage(PairImage):
    """An image without its bytes, and where they are."""

    shared_key: str
    place: "ray.ObjectRef[bytes]"

    @property
    def key(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the image with its bytes."""
        return self.shared_key

    def read(self) -> bytes:
        return ray.get(self.place)


def share_images(pairs: Sequence[PairSample]) -> list[PairSample]:
    """The pairs, with the bytes of their images put into the object store; an image that is a file stays one."""
    places: dict[str, ray.ObjectRef[bytes]] = {}

    def shared(image: PairImage) -> PairImage:
        if image.data is None or image.uri is not None:
            return image
        if image.key not in places:
            places[image.key] = ray.put(image.data)
        return SharedImage(
            image_id=image.image_id, size=image.size, box=image.box, keypoints=image.keypoints,
            shared_key=image.key, place=places[image.key],
        )  # fmt: skip

    return [
        replace(pair, source=shared(source), target=shared(target))
        for pair, (source, target) in ((pair, both(pair)) for pair in pairs)
    ]
