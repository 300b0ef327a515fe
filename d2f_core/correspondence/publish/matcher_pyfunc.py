"""MLflow loader of registered matchers: `mlflow.pyfunc.load_model("models:/matcher@champion")`.

Registering copies this file beside the matcher's files, and MLflow runs the copy, in an environment that has this
project installed. Input: bytes of two image files and points of the first; output: where these lie in the second, and
how sure each is. Import this module only to serve a matcher.
"""

import os
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

try:
    from d2f_core.correspondence.artifact import load_matcher
    from d2f_core.correspondence.matcher import Embedded
    from d2f_core.data.image_rules import ImageRules
    from d2f_core.data.images import decode_image
except ModuleNotFoundError as error:
    raise ImportError(
        f"{error}. MLflow opens this model with the package diff2flow-ray, which is on no package index: install what "
        "the model's requirements.txt lists, and then the package from its source, pip install --no-deps DIRECTORY."
    ) from error

RULES = ImageRules(resolution=1, min_side=1, max_pixels=50_000_000)


class MatcherModel(PythonModel):
    """A trained matcher of points between two images."""

    def load_context(self, context: Any) -> None:
        """Load it; `base_model` and `device` in the model config set the location of its base and the device."""
        config = context.model_config or {}
        device = config.get("device") or os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        base = config.get("base_model") or None
        self.matcher = load_matcher(context.artifacts["model"], device, base_uri=base)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row per pair: `keypoints1`, [points, 2] in pixels of the second image, and `confidence`, [points].

        An image that several rows hold is embedded once.

        Raises:
            ValueError: the bytes are no image, or the points are not [points, 2].
        """
        del context, params
        embedded: dict[bytes, Embedded] = {}
        rows = enumerate(model_input.to_dict("records"))
        return pd.DataFrame([self._row(number, row, embedded) for number, row in rows])

    def _row(self, number: int, row: dict[Any, Any], embedded: dict[bytes, Embedded]) -> dict[str, Any]:
        for name in ("image0", "image1"):
            if not isinstance(row[name], bytes):
                kind = type(row[name]).__name__
                raise ValueError(f"row {number}: {name} is of type {kind}. Give the bytes of an image file.")
            if row[name] not in embedded:
                embedded[row[name]] = self._embed(f"row {number}: {name}", row[name])
        points = _points(row["keypoints0"])
        if points is None:
            raise ValueError(f"row {number}: keypoints0 must be points (x, y), such as [[120.0, 80.0]].")
        found, confidence = self.matcher.match(
            embedded[row["image0"]], embedded[row["image1"]], torch.from_numpy(points)
        )
        return {"keypoints1": found.tolist(), "confidence": confidence.tolist()}

    def _embed(self, what: str, image: bytes) -> Embedded:
        try:
            pixels = np.asarray(decode_image(image, RULES))
        except ValueError as error:
            raise ValueError(f"{what}: {error}. Give the bytes of a PNG, JPEG or WebP file.") from None
        return self.matcher.embed([pixels])[0]


def _points(values: Any) -> np.ndarray | None:
    """Points, float32 [points, 2]; None for anything else."""
    try:
        points = np.array([list(point) for point in values] or np.empty((0, 2)), dtype=np.float32)
    except (TypeError, ValueError):
        return None
    return points if points.ndim == 2 and points.shape[1] == 2 else None


set_model(MatcherModel())
