"""The files with which MLflow's own tools load a model: MLmodel, a script of this project, signature and example."""

import importlib.metadata
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL_PART = "artifacts/model"
"""Path of the model's own files inside its MLflow artifacts."""
PROJECT = "diff2flow-ray"


@dataclass(frozen=True, kw_only=True)
class Loader:
    """How MLflow loads a model: by models-from-code, so that nothing is pickled.

    Types are MLflow's: string, long, double, binary, and with [] behind it a list, as in double[][].
    """

    script: Path
    """Python file that calls `mlflow.models.set_model`; MLflow runs a copy of it. It gets the model's files as
    `context.artifacts["model"]`."""
    inputs: Mapping[str, str]
    """Required column -> type."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Optional column -> type; may also be given as a parameter, which applies to all rows."""
    outputs: Mapping[str, str]
    example: Mapping[str, Any]
    """One row of input."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that `mlflow.pyfunc.load_model(..., model_config=...)` can change, with their defaults."""
    requirements: Sequence[str] = ()
    """Packages that the script imports, this project's modules included; they are pinned to the installed releases."""


def grey_png() -> bytes:
    """An image file for an example of input."""
    from PIL import Image

    sink = io.BytesIO()
    Image.new("RGB", (16, 16), (128, 128, 128)).save(sink, format="PNG")
    return sink.getvalue()


def write_pyfunc(
    target: Path, loader: Loader, files: Mapping[str, bytes], *, model_bytes: int, run_id: str, model_id: str
) -> None:
    """Write MLflow's files to the new directory `target`, and `files` to the place of the model's own files in it.

    The model's own files are not copied: they may be large, and are uploaded directly.

    Args:
        model_bytes: size of the model's own files, for MLflow's pages.
    """
    import pandas as pd
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    model = Model(run_id=run_id, model_uuid=model_id, model_id=model_id)
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch, Path(MODEL_PART).name)
        part.mkdir()
        for name, content in files.items():
            (part / name).write_bytes(content)
        save_model(
            path=str(target),
            python_model=str(loader.script),
            artifacts={"model": str(part)},
            signature=_signature(loader),
            input_example=pd.DataFrame([dict(loader.example)]),
            model_config=dict(loader.settings),
            pip_requirements=[pinned(name) for name in loader.requirements],
            mlflow_model=model,
            uv_project_path=scratch,  # or a uv.lock in the current directory would become part of the model
        )
    saved = Model.load(str(target))
    saved.model_size_bytes = (saved.model_size_bytes or 0) + model_bytes
    _forget_this_machine(saved)
    saved.save(str(target / "MLmodel"))
    _name_this_project(target / "requirements.txt")


def _forget_this_machine(model: Any) -> None:
    """Leave the paths that lead into the model, and none of the machine that wrote it, of which nothing is read."""
    flavor = model.flavors["python_function"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]


def _name_this_project(requirements: Path) -> None:
    """Say in a comment, which pip passes over, what pip cannot fetch."""
    lines = (
        f"# And {PROJECT}=={importlib.metadata.version(PROJECT)}, which is on no package index: install these, and",
        "# then its source, by pip install --no-deps DIRECTORY",
    )
    requirements.write_text("\n".join((*lines, requirements.read_text())))


def _signature(loader: Loader) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    required = [ColSpec(type=_type(kind), name=name) for name, kind in loader.inputs.items()]
    optional = [ColSpec(type=_type(kind), name=name, required=False) for name, kind in loader.optional.items()]
    return ModelSignature(
        inputs=Schema([*required, *optional]),
        outputs=Schema([ColSpec(type=_type(kind), name=name) for name, kind in loader.outputs.items()]),
        params=ParamSchema([ParamSpec(name, kind, None) for name, kind in loader.optional.items()]),
    )


def _type(name: str) -> Any:
    """MLflow's type of this name."""
    from mlflow.types import DataType
    from mlflow.types.schema import Array

    return Array(_type(name.removesuffix("[]"))) if name.endswith("[]") else DataType[name]


def pinned(package: str) -> str:
    """A requirement that a package index can serve, without the local part of a version such as 2.13.0+cpu."""
    return f"{package}=={importlib.metadata.version(package).partition('+')[0]}"
