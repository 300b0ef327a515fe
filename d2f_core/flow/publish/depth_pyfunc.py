"""MLflow loader of registered depth models: `mlflow.pyfunc.load_model("models:/depth@champion")`.

Registering copies this file beside the model's files, and MLflow runs the copy, in an environment that has this project
installed. Input: bytes of image files; output: maps as bytes of .npy and 16-bit PNG files. Settings are given in
columns, one value per image, or as `params`, which apply to all images. Import this module only to serve a model.
"""

import os
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

try:
    from d2f_core.data.images import prepare_image
    from d2f_core.data.schema import sample_id
    from d2f_core.flow.depth.ensemble import depth_npy, depth_png
    from d2f_core.flow.depth.plan import image_rules
    from d2f_core.flow.depth.predictor import DepthPredictor, fill_settings
    from d2f_core.model.artifact import load_model
except ModuleNotFoundError as error:
    raise ImportError(
        f"{error}. MLflow opens this model with the package diff2flow-ray, which is on no package index: install what "
        "the model's requirements.txt lists, and then the package from its source, pip install --no-deps DIRECTORY."
    ) from error

WHOLE = {"num_inference_steps": "steps", "seed": "seed", "ensemble": "ensemble"}
SETTINGS = {**WHOLE, "solver": "solver", "shift": "shift"}
"""Name of a setting in MLflow -> name in this project."""
MAX_PIXELS = 50_000_000


class DepthModel(PythonModel):
    """A trained model that predicts depth up to scale and shift."""

    def load_context(self, context: Any) -> None:
        """Load the model; `base_model` and `device` in the model config set the location of its base and the device."""
        config = context.model_config or {}
        device = config.get("device") or os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE")
        model = load_model(context.artifacts["model"], base_uri=config.get("base_model") or None)
        self.predictor = DepthPredictor(model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row per image: `depth` and `uncertainty` (.npy, float32, 0 near, 1 far) and `depth_png` (16 bits).

        Every image keeps its aspect; its long side is resized to the model's resolution.

        Raises:
            ValueError: the bytes are no image, a setting is invalid, or a map is not finite.
        """
        del context
        each = model_input.explode("image")  # MLflow reads {"image": [a, b]} as one row
        rows = [{**(params or {}), **_given(row)} for row in each.to_dict("records")]
        return pd.DataFrame([self._row(number, row) for number, row in enumerate(rows)])

    def _row(self, number: int, row: Mapping[str, Any]) -> dict[str, bytes]:
        given = _given(row)  # MLflow sets missing params to None
        image = given.get("image")
        if not isinstance(image, bytes):
            raise ValueError(f"row {number} has image of type {type(image).__name__}. Give the bytes of an image file.")
        settings = {SETTINGS[name]: value for name, value in given.items() if name in SETTINGS}
        settings |= {name: int(settings[name]) for name in WHOLE.values() if name in settings}
        model = self.predictor.model
        rules = image_rules("whole", max(model.default_size), 1, MAX_PIXELS, model.base.pixels_per_latent)
        try:
            prepared = prepare_image(image, rules)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}. Give the bytes of a PNG, JPEG or WebP file.") from None
        filled = fill_settings(model, **settings)
        (made,) = self.predictor.predict(prepared.pixels[None], [sample_id(image, "")], filled)
        if made.depth is None or made.uncertainty is None:
            raise ValueError(f"row {number}: {made.error}. Take another solver or more steps.")
        return {
            "depth": depth_npy(made.depth),
            "depth_png": depth_png(made.depth),
            "uncertainty": depth_npy(made.uncertainty),
        }


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without missing values (None or NaN in pandas)."""
    return {name: value for name, value in row.items() if not pd.isna(value)}


set_model(DepthModel())
