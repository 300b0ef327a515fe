"""URIs and names that several jobs' recipes share."""

EMOJI_SD = "infra/models/emoji-sd"
"""The base model that comes with this project."""
FLOW_MODEL = "emoji-flow"
"""Name of the quickstart's registered model."""
DEPTH_MODEL = "emoji-depth"
"""Name of the depth workflow's registered model."""
MATCHER = "matcher"
"""Name of the distillation's registered model."""
DEPTH_DECODER = "s3://d2f/runs/depth-decoder"
DEPTH_BASE = f"{DEPTH_DECODER}/base"
"""emoji-sd with a decoder trained on rendered scenes; made by `train_autoencoder depth`."""
QUICKSTART = "s3://d2f/workflows/quickstart"
"""Output URI of the quickstart."""
OPENMOJI_FEW = "s3://d2f/datasets/openmoji-few"
"""Image table that the quickstart trains on; made by `make_dataset openmoji-few`."""
OPENMOJI_TRAIN, OPENMOJI_TEST = "s3://d2f/datasets/openmoji-train", "s3://d2f/datasets/openmoji-test"
"""Image tables of all drawings but every eighth, and of these; made by `make_dataset openmoji-train` and
`openmoji-test`."""
CAPTIONS = "captions.jsonl"
"""Prompt file in the output of the quickstart and similar workflows: every caption of the dataset."""
EVALUATIONS = (2, 4, 10, 25)
"""Network evaluations per image at which models are compared."""

SHOWN_EMOJI = (
    "red apple", "banana", "strawberry", "watermelon", "pizza", "hamburger", "red heart", "blue heart",
    "grinning face", "loudly crying face", "smiling face with sunglasses", "enraged face",
    "cat face", "dog face", "panda", "frog", "fish", "octopus", "sunflower", "evergreen tree",
    "rocket", "rainbow", "snowman", "star",
)  # fmt: skip
"""Names of the drawings that previews and contact sheets show."""
