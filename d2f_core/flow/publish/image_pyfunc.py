"""MLflow loader of registered text-to-image models: `mlflow.pyfunc.load_model("models:/emoji-flow@champion")`.

Registering copies this file beside the model's files, and MLflow runs the copy, in an environment that has this project
installed. Input: prompts; output: PNG bytes, as in mlflow.diffusers. Its settings are given in columns, one value per
image, or as `params`, which apply to all images. Import this module only to serve a model.
"""

import os
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

try:
    from d2f_core.flow.generate.sampler import ImageSampler, Request, encode_image, fill_request
    from d2f_core.model.artifact import load_model
except ModuleNotFoundError as error:
    raise ImportError(
        f"{error}. MLflow opens this model with the package diff2flow-ray, which is on no package index: install what "
        "the model's requirements.txt lists, and then the package from its source, pip install --no-deps DIRECTORY."
    ) from error

WHOLE = {"num_inference_steps": "steps", "height": "height", "width": "width", "seed": "seed"}
SETTINGS = {
    **WHOLE,
    "guidance_scale": "guidance",
    "negative_prompt": "negative_prompt",
    "solver": "solver",
    "shift": "shift",
}
"""Name of a setting in MLflow -> name in this project."""


class ImageModel(PythonModel):
    """A trained model that generates images from prompts."""

    def load_context(self, context: Any) -> None:
        """Load the model; `base_model` and `device` in the model config set the location of its base and the device."""
        config = context.model_config or {}
        device = config.get("device") or os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE")
        model = load_model(context.artifacts["model"], base_uri=config.get("base_model") or None)
        self.sampler = ImageSampler(model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[bytes]:
        """PNG bytes of one image per prompt.

        Raises:
            ValueError: a row has no prompt, a setting is invalid, or an image is not finite.
        """
        del context
        each = model_input.explode("prompt")  # MLflow reads {"prompt": ["a", "b"]} as one row
        rows = [{**(params or {}), **_given(row)} for row in each.to_dict("records")]
        made = self.sampler.sample([self._request(number, row) for number, row in enumerate(rows)])
        pictures = []
        for number, image in enumerate(made):
            if image.pixels is None:
                raise ValueError(f"row {number}: {image.error}. Lower guidance_scale, or take another solver.")
            pictures.append(encode_image(image.pixels))
        return pictures

    def _request(self, number: int, row: Mapping[str, Any]) -> Request:
        given = _given(row)
        if not isinstance(given.get("prompt"), str):
            raise ValueError(f"row {number} has prompt={given.get('prompt')!r}. Give a text.")
        settings = {SETTINGS[name]: value for name, value in given.items() if name in SETTINGS}
        settings |= {name: int(settings[name]) for name in WHOLE.values() if name in settings}
        return fill_request(self.sampler.model, prompt=given["prompt"], **settings)


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without missing values (None or NaN in pandas)."""
    return {name: value for name, value in row.items() if not pd.isna(value)}


set_model(ImageModel())
