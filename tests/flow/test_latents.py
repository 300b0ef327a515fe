"""Latent tables: their columns, and which of them a model can learn from."""

import dataclasses

import pytest

from d2f_core.data.manifest import Manifest
from d2f_core.data.schema import SchemaError, check_schema
from d2f_core.flow.latents import (
    FLIPPED,
    caption_rules,
    check_fingerprint,
    depth_latent_schema,
    image_columns,
    latent_schema,
    noise_columns,
)
from d2f_core.model.caption_rules import DEFAULT, CaptionRules, written_rules


def test_latents_of_another_autoencoder_are_refused():
    manifest = Manifest(kind="latents", files=(), fingerprint={"autoencoder": "aa"})
    check_fingerprint(manifest, "aa")
    with pytest.raises(SchemaError, match=r"autoencoder aa, the base model has bb. Run encode_latents again"):
        check_fingerprint(manifest, "bb")
    with pytest.raises(SchemaError, match="holds images, not latents"):
        check_fingerprint(dataclasses.replace(manifest, kind="images"), "aa")


def test_a_depth_latent_table_is_a_latent_table_with_two_more_columns():
    schema = depth_latent_schema((4, 8, 8))
    check_schema(schema, latent_schema((4, 8, 8)), where="table")
    assert set(schema.names) - set(latent_schema((4, 8, 8)).names) == {"joined_mean", "mask"}


def test_mirrored_latents_and_masks_are_read_where_all_tables_hold_them():
    plain = Manifest(kind="latents", files=())
    flipped = dataclasses.replace(plain, fingerprint={"flip": True})
    padded = dataclasses.replace(plain, fingerprint={"flip": True, "crop": "pad"})
    assert image_columns([plain, plain]) == () and image_columns([flipped, flipped]) == FLIPPED
    assert image_columns([padded]) == (*FLIPPED, "mask")
    both = latent_schema((4, 8, 8), flipped=True, masked=True)
    assert set(both.names) - set(latent_schema((4, 8, 8)).names) == {*FLIPPED, "mask"}
    with pytest.raises(SchemaError, match=r"tables hold flipped_mean, flipped_std \(flip=True at their encoding\) and"):
        image_columns([flipped, plain])
    with pytest.raises(SchemaError, match=r"tables hold mask \(crop='pad' at their encoding\) and some do not"):
        image_columns([flipped, padded])


def test_pairs_are_read_with_their_noise_and_not_beside_tables_without():
    plain = Manifest(kind="latents", files=())
    pairs = dataclasses.replace(plain, fingerprint={"made_by": {"pairs": True, "base": "b1"}})
    assert noise_columns([plain, plain], lambda: "b1") == () and noise_columns([pairs], lambda: "b1") == ("noise",)
    with pytest.raises(SchemaError, match="on the base b1, the base to train is b2"):
        noise_columns([pairs], lambda: "b2")
    with pytest.raises(SchemaError, match="Some latent tables hold pairs and some do not"):
        noise_columns([pairs, plain], lambda: "b1")


def table(rules: CaptionRules = DEFAULT, **properties) -> Manifest:
    return Manifest(kind="latents", files=(), fingerprint={**properties, **written_rules(rules)})


LONG, SKIPPED = CaptionRules(chunks=3), CaptionRules(clip_skip=1)


def test_a_training_reads_captions_as_its_tables_say_and_else_as_its_config_does():
    assert caption_rules([table()], DEFAULT) == DEFAULT and caption_rules([table()], LONG) == LONG
    assert caption_rules([table(LONG), table(LONG)], DEFAULT) == LONG == caption_rules([table(LONG)], LONG)


@pytest.mark.parametrize(
    ("tables", "asked", "message"),
    [
        ([table(LONG), table(SKIPPED)], DEFAULT, "chunks=3, clip_skip=0 and chunks=1, clip_skip=1.*equal"),
        ([table(), table(LONG)], LONG, "chunks=1, clip_skip=0 and chunks=3, clip_skip=0"),
        ([table(LONG)], SKIPPED, "chunks=3, clip_skip=0, and model.captions asks for chunks=1, clip_skip=1"),
        ([table(text="states")], LONG, "chunks=1, clip_skip=0, and model.captions asks for chunks=3"),
    ],
)
def test_rules_that_contradict_each_other_are_refused_with_both(tables, asked, message):
    with pytest.raises(SchemaError, match=message):
        caption_rules(tables, asked)
