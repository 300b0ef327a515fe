"""What importing a full-size single file takes: resident memory and written bytes, beside the file's size.

    python -m benchmarks.import_checkpoint --results docs/results/import_checkpoint.json

Writes a file of SD 1.5's tensors in float32 with random numbers (4.3 GB; the tokenizer alone is a small one) and runs
`pipelines.import_checkpoint` on it, to a directory beside it. Needs 14 GB of disk. The network is asked what it
predicts, for which its UNet is loaded; `idle` is the same command that has nothing left to do.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from d2f_core.model.single_file.convert import CONFIGS
from d2f_core.model.single_file.family import SD15, read_parts
from d2f_core.model.single_file.tensor_file import writing
from tests.model.tiny_sdxl import END, write_tokenizer

CHILD = """
import json, resource, runpy, sys
sys.argv = ["import_checkpoint", *sys.argv[1:]]
runpy.run_module("pipelines.import_checkpoint", run_name="__main__")
io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak_bytes": peak, "written_bytes": int(io["wchar"]), "read_bytes": int(io["rchar"])}))
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    results: Path | None = None


def write_file(file: Path) -> None:
    """A checkpoint of random numbers, with its configs beside it."""
    configs = Path(shutil.copytree(CONFIGS / SD15.name, file.with_suffix(".configs")))
    shutil.rmtree(configs / "tokenizer", ignore_errors=True)
    write_tokenizer(configs / "tokenizer", END)
    parts, generator = read_parts(configs, SD15), torch.Generator().manual_seed(0)
    shapes = {entry.key: ("float32", tuple(part.key_shape(entry))) for part in parts for entry in part.entries}
    with writing(file, shapes, {"format": "pt"}) as out:
        for key, (_, shape) in shapes.items():
            out.write(key, 0.02 * torch.randn(shape, generator=generator))


def measured(file: Path, output: Path, cache: Path) -> dict[str, Any]:
    """Peak of the command's resident memory, with the pages of files that it maps, and the bytes that it wrote."""
    arguments = ["checkpoint", "--source", str(file), "--output", str(output), "--prediction", "epsilon"]
    variables = {**os.environ, "D2F_CACHE": str(cache)}
    begun = time.perf_counter()
    told = subprocess.check_output([sys.executable, "-c", CHILD, *arguments], text=True, env=variables, timeout=1800)
    return {**json.loads(told.splitlines()[-1]), "seconds": time.perf_counter() - begun}


def main() -> None:
    config = tyro.cli(Config)
    with tempfile.TemporaryDirectory() as directory:
        file, output, cache = (Path(directory, name) for name in ("sd15.safetensors", "out", "cache"))
        write_file(file)
        size = file.stat().st_size
        runs = [measured(file, output, cache) for _ in range(2)]
    done, idle = runs
    found = {
        "file_bytes": size,
        "import": done,
        "idle": idle,
        "memory over idle, as a share of the file": (done["peak_bytes"] - idle["peak_bytes"]) / size,
        "written, as a share of the file": done["written_bytes"] / size,
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(found, indent=2))
    if config.results:
        config.results.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
