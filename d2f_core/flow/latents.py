"""Latent tables: their columns, and whether they fit the model to be trained."""

from collections.abc import Callable, Sequence

import pyarrow as pa

from d2f_core.data.manifest import Manifest
from d2f_core.data.schema import SchemaError, array_field
from d2f_core.model.caption_rules import DEFAULT, CaptionRules, read_rules

DEPTH_TASK = "image_to_depth"
"""Value of `task` in the fingerprint of a depth latent table."""
FLIPPED = ("flipped_mean", "flipped_std")
"""Columns with the (scaled) moments of the images mirrored left to right, in tables with `flip` in the fingerprint."""
PADDED = "pad"
"""Value of `crop` in the fingerprint of a table of whole images with bars beside them, whose column `mask` tells both
apart."""
KINDS = ("latents", "latents_by_size")
"""Kinds of a latent table, and of several below one URI (see `size_tables`)."""


def latent_schema(
    latent_shape: Sequence[int],
    *,
    text_shape: Sequence[int] | None = None,
    flipped: bool = False,
    masked: bool = False,
) -> pa.Schema:
    """Columns of a latent table.

    Args:
        latent_shape: channels, height, width of the (scaled) moments.
        text_shape: tokens and width of stored text states; None when captions are encoded during training.
        flipped: whether the mirrored images' moments are stored too, in the columns `FLIPPED`.
        masked: whether a column `mask` is 1 where every pixel that a latent covers is of the image, 0 beside it.
    """
    text = pa.string()
    fields = [
        pa.field("sample_id", text, nullable=False),
        pa.field("caption", text, nullable=False),
        array_field("latent_mean", "float16", latent_shape),
        array_field("latent_std", "float16", latent_shape),
        # Height x width in pixels of the encoded image: samples of one bucket can share a batch.
        pa.field("bucket", text, nullable=False),
        pa.field("source_uri", text, nullable=False),
        # Size of the original image, and the box (left, top, right, bottom) that was kept, in pixels of the original.
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        array_field("crop", "int32", (4,)),
    ]
    if text_shape is not None:
        fields.append(array_field("text_state", "float16", text_shape))
    fields += [array_field(name, "float16", latent_shape) for name in FLIPPED * flipped]
    fields += [array_field("mask", "uint8", (1, *latent_shape[1:]))] * masked
    return pa.schema(fields)


def image_columns(manifests: Sequence[Manifest]) -> tuple[str, ...]:
    """Columns that captioned images' tables hold beyond the usual: `FLIPPED`, and `mask` of padded images.

    Raises:
        SchemaError: only some of the tables hold them.
    """
    columns: tuple[str, ...] = ()
    for name, value, its in (("flip", True, FLIPPED), ("crop", PADDED, ("mask",))):
        has = [manifest.fingerprint.get(name) == value for manifest in manifests]
        if any(has) and not all(has):
            raise SchemaError(
                f"Some latent tables hold {', '.join(its)} ({name}={value!r} at their encoding) and some do not. Train "
                "on tables that were encoded alike."
            )
        columns += its * any(has)
    return columns


def depth_latent_schema(latent_shape: Sequence[int]) -> pa.Schema:
    """Columns of a depth latent table: those of `latent_schema` for the depth pictures, with empty captions, and two
    more.

    `joined_mean` is the (scaled) mean of the image's latent; `mask` is 1 where every pixel that a latent covers has a
    depth.

    Args:
        latent_shape: channels, height, width.
    """
    _, height, width = latent_shape
    schema = latent_schema(latent_shape)
    schema = schema.append(array_field("joined_mean", "float16", latent_shape))
    return schema.append(array_field("mask", "uint8", (1, height, width)))


def check_fingerprint(manifest: Manifest, autoencoder_fingerprint: str) -> None:
    """Refuse latents of another autoencoder.

    Raises:
        SchemaError: the table holds no latents, or those of another autoencoder.
    """
    if manifest.kind not in KINDS:
        raise SchemaError(f"The table holds {manifest.kind}, not latents. Run encode_latents on it first.")
    made_with = manifest.fingerprint.get("autoencoder")
    if made_with != autoencoder_fingerprint:
        raise SchemaError(
            f"The latents were made with the autoencoder {made_with}, the base model has {autoencoder_fingerprint}. "
            "Run encode_latents again with this base model, or finetune the base model they were made with."
        )


def caption_rules(manifests: Sequence[Manifest], asked: CaptionRules) -> CaptionRules:
    """The rules by which a training on these tables reads captions: those that the tables were made with, or if they
    say nothing, the rules that its config asks for.

    Raises:
        SchemaError: the tables were made with different rules, or with others than the config asks for.
    """
    first, *others = [read_rules(manifest.fingerprint) for manifest in manifests]
    for other in others:
        if other != first:
            raise SchemaError(
                f"The latent tables were made with the caption rules {first} and {other}. Encode them with equal "
                "captions.chunks and captions.clip_skip."
            )
    says_nothing = first == DEFAULT and not any(manifest.fingerprint.get("text") == "states" for manifest in manifests)
    if asked not in (DEFAULT, first) and not says_nothing:
        raise SchemaError(
            f"The latents were made with the caption rules {first}, and model.captions asks for {asked}. Leave "
            "model.captions out, or encode the images again with these rules."
        )
    return asked if says_nothing else first


def noise_columns(manifests: Sequence[Manifest], base_hash: Callable[[], str]) -> tuple[str, ...]:
    """`("noise",)` if the tables hold pairs, that is, each latent with the noise that a model generated it from; else
    `()`.

    Args:
        base_hash: gives the content hash of the base model to be trained; asked only when there are pairs, since it may
            take reading the whole model.

    Raises:
        SchemaError: the pairs belong to another base model, or only some of the tables have noise.
    """
    makers = [manifest.fingerprint.get("made_by") or {} for manifest in manifests]
    pairs = [maker for maker in makers if maker.get("pairs")]
    for maker in pairs:
        if maker["base"] != (own := base_hash()):
            raise SchemaError(
                f"The pairs were made by a model on the base {maker['base']}, the base to train is {own}. "
                "Generate pairs with the model that is to be straightened."
            )
    if pairs and len(pairs) < len(manifests):
        raise SchemaError("Some latent tables hold pairs and some do not. Train on tables of one kind.")
    return ("noise",) if pairs else ()
