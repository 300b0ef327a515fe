"""python -m tests.pipelines.sdxl_on_a_head DIRECTORY: what the checks of jobs on SDXL take of a small machine.

Writes a base as large as SDXL's, whose tensors are holes in their files, and prints per job the bytes of storages that
were allocated, and the process's peak of resident memory. More than 3 GB of it are refused by the system.
"""

import json
import resource
import sys
from pathlib import Path

GB = 10**9


def peak() -> int:
    """Most bytes that this process has held in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def main(directory: Path) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (3 * GB, 3 * GB))
    from d2f_core import hashing
    from d2f_core.data.sources.config import ImageSource
    from d2f_core.flow.encode.check import check_encode
    from d2f_core.flow.encode.config import EncodeConfig
    from d2f_core.flow.generate.config import GenerateConfig
    from d2f_core.flow.generate.job import check_generate
    from d2f_core.flow.serve.config import ServeConfig
    from d2f_core.flow.serve.service import check_serve
    from d2f_core.model import model_files
    from d2f_core.model.autoencoder import autoencoder_fingerprint
    from d2f_core.model.base import describe_base
    from d2f_core.model.config import LoraConfig, ModelConfig
    from pipelines import finetune, finetune_job
    from pipelines.configs import FinetuneConfig
    from tests.allocated import Allocated
    from tests.image_tables import write_images
    from tests.latent_tables import write_latents
    from tests.model.sparse_base import write_sparse_sdxl

    base, images = str(write_sparse_sdxl(directory / "base")), write_images(str(directory / "images"), 2)
    # Six gigabytes are hashed in ten seconds and a megabyte of memory; this is about the rest.
    model_files.file_sha256 = lambda file: hashing.file_sha256(file) if file.stat().st_size < GB else "0" * 64
    finetune_job.check_tracking = lambda: ""  # no server
    fingerprint = autoencoder_fingerprint(describe_base(base))
    write_latents(str(directory / "latents"), fingerprint, rows=200, rows_per_file=200, captions=1)
    (directory / "prompts.jsonl").write_text(json.dumps({"prompt": "a cat"}))
    output, latents = str(directory / "run"), str(directory / "latents")
    trained = {
        "finetune": ModelConfig(base=base, lora=LoraConfig(preset="small")),
        "finetune fully": ModelConfig(base=base, method="full"),
    }
    checks = {
        name: lambda model=model: finetune.check(FinetuneConfig(model=model, latents=latents, output=output))
        for name, model in trained.items()
    }
    checks |= {
        "generate": lambda: check_generate(
            GenerateConfig(model=base, prompts=str(directory / "prompts.jsonl"), output=str(directory / "made"))
        ),
        "serve": lambda: check_serve(ServeConfig(model=base)),
        "encode": lambda: check_encode(
            EncodeConfig(source=ImageSource(uri=images), base=base, output=str(directory / "encoded"), resolution=64)
        ),
    }
    found = {"imports": {"allocated": 0, "peak": peak()}}
    for name, check in checks.items():
        with Allocated() as made:
            check()
        found[name] = {"allocated": sum(made.large), "peak": peak()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
