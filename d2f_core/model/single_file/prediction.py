"""What the network of a single file predicts: how files tell it, and the metadata that tells it to other programs.

| told by                                                | read by                | as                              |
|--------------------------------------------------------|------------------------|---------------------------------|
| `d2f_prediction_type` in the metadata                  | this project           | diffusers' name                 |
| empty tensors `v_pred` and `ztsnr`                     | ComfyUI (SDXL), Forge  | v, and zero terminal SNR        |
| `modelspec.prediction_type`, `prediction_type`         | SwarmUI                | epsilon, v, v-zsnr, x0, sd3     |
| nothing                                                | everybody              | the family's published model    |

`sd3` makes SwarmUI sample as a rectified flow; no program has a marker for that. For SD 2.1 ComfyUI guesses from the
weights. Files may be wrong: rectified-flow checkpoints often say epsilon.

Sources: Stability-AI/ModelSpec 1.0.0; ComfyUI comfy/supported_models.py; SwarmUI's override of the prediction type.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from d2f_core.model.single_file.family import SD21, SDXL, Family
from d2f_core.model.single_file.keys import LayoutError
from d2f_core.objective.schedule import FLOW_PREDICTION as FLOW

NAMES = {
    "epsilon": ("epsilon", "eps"),
    "v_prediction": ("v", "v_prediction", "v-prediction", "v_pred", "velocity"),
    "sample": ("x0", "sample"),
    FLOW: ("sd3", "flow", FLOW, "rectified_flow", "rf"),
}
"""diffusers' name of what a network predicts -> names in metadata, of which the first is written."""
V_ZERO_SNR = "v-zsnr"
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
FIELDS = ("modelspec.prediction_type", "prediction_type", "modelspec.predict_key")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a network predicts."""

    kind: str
    """epsilon, v_prediction, sample or flow_prediction."""
    zero_snr: bool = False
    """Whether it was trained with zero terminal SNR."""
    told_by: str = ""
    """What in the file says so."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Names of the empty tensors that tell it."""
        if self.kind != "v_prediction":
            return ()
        return (V_MARKER, ZERO_SNR_MARKER) if self.zero_snr else (V_MARKER,)


def read_prediction(metadata: Mapping[str, str], keys: Collection[str], family: Family) -> Prediction:
    """What a file says that its network predicts.

    Raises:
        LayoutError: the file belongs to another kind of model, or uses a name that is not known.
    """
    if edm := sorted(key for key in keys if key.startswith("edm_")):
        raise LayoutError(f"has the key {edm[0]!r}: a model with EDM's noise levels, which are not known here.")
    if kind := metadata.get("d2f_prediction_type"):
        zero_snr = ZERO_SNR_MARKER in keys
        return Prediction(kind=_named(kind, "d2f_prediction_type"), zero_snr=zero_snr, told_by="d2f_prediction_type")
    if V_MARKER in keys:
        return Prediction(kind="v_prediction", zero_snr=ZERO_SNR_MARKER in keys, told_by=f"the tensor {V_MARKER}")
    if metadata.get("modelspec.noise_process") == "flow":
        return Prediction(kind=FLOW, told_by="modelspec.noise_process")
    for field in FIELDS:
        if value := metadata.get(field):
            zero_snr = value == V_ZERO_SNR
            kind = "v_prediction" if zero_snr else _named(value, field)
            return Prediction(kind=kind, zero_snr=zero_snr, told_by=field)
    return Prediction(kind=family.prediction_type, told_by=f"nothing: as {family.title} was published")


def _named(value: str, field: str) -> str:
    for kind, names in NAMES.items():
        if value in (kind, *names):
            return kind
    known = ", ".join(names[0] for names in NAMES.values())
    raise LayoutError(f"says {field}={value!r}; known are {known}. Correct the metadata.")


def prediction_metadata(prediction: Prediction, family: Family, size: tuple[int, int], title: str) -> dict[str, str]:
    """The metadata of a file for other programs.

    Args:
        size: height and width in pixels of the model's images.
        title: the model's name in programs.
    """
    name = V_ZERO_SNR if prediction.markers[1:] else NAMES[prediction.kind][0]
    resolution = f"{size[1]}x{size[0]}"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(family, prediction),
        "modelspec.implementation": "sgm",
        "modelspec.title": title,
        "modelspec.resolution": resolution,
        "modelspec.prediction_type": name,
        "prediction_type": name,
        "resolution": resolution,
    }


def _architecture(family: Family, prediction: Prediction) -> str:
    if family is SD21:
        return "stable-diffusion-v2-512" if prediction.kind == "epsilon" else "stable-diffusion-v2-768-v"
    return "stable-diffusion-xl-v1-base" if family is SDXL else "stable-diffusion-v1"
