"""Places and names that several jobs' recipes share."""

EMOJI_SD = "infra/models/emoji-sd"
"""The base model that comes with this project."""
FLOW_MODEL = "emoji-flow"
"""The registered model of the quickstart."""
DEPTH_MODEL = "emoji-depth"
"""The registered model of the depth workflow."""
DEPTH_DECODER = "s3://d2f/runs/depth-decoder"
DEPTH_BASE = f"{DEPTH_DECODER}/base"
"""emoji-sd with a decoder that knows rendered scenes; `train_autoencoder depth` makes it."""
QUICKSTART = "s3://d2f/workflows/quickstart"
"""Where the quickstart writes."""
OPENMOJI_FEW = "s3://d2f/datasets/openmoji-few"
"""The drawings that it learns from; `make_dataset openmoji-few` makes them."""
CAPTIONS = "captions.jsonl"
"""In its output, and in that of workflows like it: every caption of the dataset as a prompt."""
EVALUATIONS = (2, 4, 10, 25)
"""Network evaluations per image at which models are compared."""

SHOWN_EMOJI = (
    "red apple", "banana", "strawberry", "watermelon", "pizza", "hamburger", "red heart", "blue heart",
    "grinning face", "loudly crying face", "smiling face with sunglasses", "enraged face",
    "cat face", "dog face", "panda", "frog", "fish", "octopus", "sunflower", "evergreen tree",
    "rocket", "rainbow", "snowman", "star",
)  # fmt: skip
"""Drawings that previews and contact sheets show."""
