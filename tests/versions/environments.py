"""Virtual environments with other releases of the libraries that read exports, and without this project.

torch is not installed again: a .pth file in each environment leads to a folder of links to the torch of .venv, and to
nothing else of it.
"""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from d2f_core.flow.publish.job import REQUIREMENTS
from d2f_core.tracking.pyfunc_files import pinned

DIRECTORY = Path(os.environ.get("D2F_VERSIONS", Path(__file__).parents[2] / ".versions"))
"""Ignored by git, about 3 GB; `rm -r` it to begin anew."""
LINKED = ("torch", "torchgen", "functorch")
MLFLOW = "mlflow 3.17"
ENVIRONMENTS: Mapping[str, Sequence[str]] = {
    "diffusers 0.30": (
        "diffusers==0.30.3", "transformers==4.46.3", "peft==0.13.2", "accelerate==1.0.1", "huggingface_hub==0.25.2",
    ),
    "diffusers 0.34": ("diffusers==0.34.0", "transformers==4.51.3", "peft==0.17.1", "accelerate==1.7.0"),
    "diffusers 0.38": ("diffusers==0.38.0", "transformers==5.5.4", "peft==0.19.1", "accelerate==1.13.0"),
    "diffusers 0.42": ("diffusers==0.42.1", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0"),
    MLFLOW: ("mlflow==3.17.2", *(pinned(name) for name in REQUIREMENTS if name != "torch")),
}  # fmt: skip
"""Name -> requirements. That for MLflow holds what a registered model's requirements.txt lists."""


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is created or completed first."""
    place = DIRECTORY / name.replace(" ", "-")
    mark, wanted = place / "installed.json", json.dumps([torch.__version__, *ENVIRONMENTS[name]])
    python = place / "bin/python"
    if mark.is_file() and mark.read_text() == wanted:
        return python
    venv.create(place, clear=True, with_pip=True)
    _link_torch(place)
    command = [python, "-m", "pip", "install", "--quiet", "torch", "safetensors", *ENVIRONMENTS[name]]
    subprocess.run([*map(str, command)], check=True)
    mark.write_text(wanted)
    return python


def _link_torch(place: Path) -> None:
    """Let an environment import the torch that runs this program, and pip see that it is there.

    The links lie outside the environment, so that pip never removes a file through them.
    """
    shared, installed = DIRECTORY / "torch", Path(torch.__file__).parents[1]
    shared.mkdir(parents=True, exist_ok=True)
    for target in (*(installed / name for name in LINKED), *installed.glob("torch-*.dist-info")):
        link = shared / target.name
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    library = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (place / library / "torch.pth").write_text(f"{shared}\n")
