"""What stands beside a merged network's weights, so that stock transformers prepares images as its matcher does."""

import json

from d2f_core.correspondence.artifact import MatcherDescription
from d2f_core.correspondence.preparation import NORMALISATIONS, Preparation

BILINEAR = 2
"""Number of the filter, as PIL and transformers count them."""


def processor_config(preparation: Preparation) -> str:
    """The preprocessor_config.json of a preparation; empty where stock transformers has none that does the same."""
    if preparation.fit != "stretch":
        return ""
    mean, std = NORMALISATIONS[preparation.normalisation]
    return json.dumps(
        {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": preparation.size, "width": preparation.size},
            "resample": BILINEAR,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": mean,
            "image_std": std,
        },
        indent=2,
    )


def merged_readme(description: MatcherDescription) -> str:
    """How the network is used for matching without this project."""
    preparation, decoding = description.preparation, description.decoding
    return (
        "A vision transformer whose patch tokens match between images of things of one kind: its adapters are merged, "
        "and stock `transformers` opens it.\n\n"
        "```python\nfrom transformers import AutoImageProcessor, AutoModel\n\n"
        'processor, model = AutoImageProcessor.from_pretrained("."), AutoModel.from_pretrained(".")\n'
        'tokens = model(**processor(images, return_tensors="pt")).last_hidden_state\n```\n\n'
        f"- Input: {preparation.size} x {preparation.size} pixels, fit `{preparation.fit}`, normalisation "
        f"`{preparation.normalisation}`; that is preprocessor_config.json when it is here.\n"
        "- The patch tokens are the last height / patch x width / patch ones, row by row. Divide each by its length: "
        "the product of two is their cosine.\n"
        f"- How this project reads a position from the cosines: {decoding}.\n"
    )
