"""Which views are rendered, of how many objects."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "val", "test"]
CategoryName = Literal["bike", "bird", "car", "chair", "person", "plane", "quadruped", "teapot"]
ALL_CATEGORIES: tuple[CategoryName, ...] = get_args(CategoryName)


@dataclass(frozen=True, kw_only=True)
class MakeViewsConfig:
    """Rendered views of procedural objects, with their exact geometry, as a table."""

    output: str = "s3://d2f/datasets/views"
    """Where the table goes: s3://bucket/key or a local path."""
    categories: tuple[CategoryName, ...] = ALL_CATEGORIES
    size: int = 160
    """Height and width of the images in pixels."""
    train_meshes: int = 20
    """Objects of each category in the split `train`. Splits share no object and no texture."""
    val_meshes: int = 5
    test_meshes: int = 7
    views_per_mesh: int = 8
    """Images of each object, from all around it."""
    seed: int = 0
    meshes_per_part: int = 4
    """Objects per output file, the most that is lost when a task is killed."""
    num_tasks: int = 2
    """Files rendered in parallel, one logical CPU each."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty. Give s3://bucket/key or a local path.")
        unknown = [name for name in self.categories if name not in ALL_CATEGORIES]
        if unknown or not self.categories or len(set(self.categories)) < len(self.categories):
            raise ValueError(
                f"categories={list(self.categories)} must be one or more of {', '.join(ALL_CATEGORIES)}, each once."
            )
        if not 16 <= self.size <= 1024:
            raise ValueError(f"size={self.size} is not between 16 and 1024 pixels. Choose the resolution to train at.")
        for name in ("views_per_mesh", "meshes_per_part", "num_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        counts = [self.num_meshes(split) for split in get_args(Split)]
        if min(counts) < 0 or not sum(counts):
            raise ValueError(
                f"train_meshes, val_meshes, test_meshes = {counts}: none may be negative, and one must be above 0."
            )

    def num_meshes(self, split: Split) -> int:
        """Objects of each category in a split."""
        return {"train": self.train_meshes, "val": self.val_meshes, "test": self.test_meshes}[split]

    def meshes(self) -> Iterator[tuple[Split, CategoryName, int]]:
        """Split, category and number of every object, in the order of the table's rows."""
        for split in get_args(Split):
            for category in self.categories:
                for number in range(self.num_meshes(split)):
                    yield split, category, number

    @property
    def num_parts(self) -> int:
        return -(-len(list(self.meshes())) // self.meshes_per_part)
