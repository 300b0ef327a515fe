"""Whether this machine can compile what a training's optimizer needs."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from d2f_core.train.config import TrainConfig


class MissingCompilerError(RuntimeError):
    """An operator must be compiled on this machine, but a tool is missing."""


def _find_tool(name: str) -> str | None:
    """Path of a program, also searched beside the interpreter, where pip installs ninja even if the environment is not
    activated.
    """
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def cpu_adam_is_built() -> bool:
    """Whether DeepSpeed's CPU Adam is installed precompiled, or was compiled on this machine before."""
    from torch.utils.cpp_extension import get_default_build_root

    spec = find_spec("deepspeed")
    if spec and spec.origin and any(Path(spec.origin).parent.glob("ops/adam/cpu_adam_op*.so")):
        return True
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return any(root.glob("**/cpu_adam/cpu_adam.so"))


def missing_compiler(config: TrainConfig) -> str | None:
    """What this machine lacks to run the config's optimizer, in one line with the fix; None if nothing is missing.

    Only `optimizer="cpu_adamw"` is compiled, once per machine and user (about 150 s, kept in TORCH_EXTENSIONS_DIR).
    """
    if config.optimizer != "cpu_adamw":
        return None
    compiler = os.environ.get("CXX", "c++")
    lacking = [] if _find_tool("ninja") else ["ninja"]
    if not cpu_adam_is_built() and not _find_tool(compiler):
        lacking.append(compiler)
    if not lacking:
        return None
    return (
        f"optimizer='cpu_adamw' is compiled where it runs, and {' and '.join(lacking)} cannot be found there. "
        "Install g++ and ninja on every worker's machine, or use optimizer='adamw' with offload='none'."
    )
