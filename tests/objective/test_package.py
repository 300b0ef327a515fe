"""What someone has to read to know the method, and what it stands on."""

import ast
import sys
from pathlib import Path

import d2f_core.objective

FILES = sorted(Path(str(d2f_core.objective.__file__)).parent.glob("*.py"))


def test_it_imports_torch_alone_and_torchdiffeq_where_a_solver_asks_for_it():
    found = set()
    for node in (node for file in FILES for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    others = {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name.split(".")[0] for name in others if not name.startswith("d2f_core.objective")} == {
        "torch",
        "torchdiffeq",
    }


def test_it_is_read_in_half_an_hour():
    assert sum(len(file.read_text().splitlines()) for file in FILES) < 850
