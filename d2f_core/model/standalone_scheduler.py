"""The diffusers scheduler as one Python file that needs torch and diffusers alone, made from this project's own source.

Of each module the definitions that the scheduler uses are taken over as they stand, so the file computes the same bits.
"""

import ast
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

MODULES = (
    "d2f_core.objective.path",
    "d2f_core.objective.schedule",
    "d2f_core.objective.alignment",
    "d2f_core.objective.solver",
    "d2f_core.model.run_timesteps",
    "d2f_core.model.finite_outputs",
    "d2f_core.model.diffusers_scheduler",
)
"""Modules to take from, each after those that it imports."""
NAME = "Diff2FlowScheduler"
PROJECT = "d2f_core"
HEADER = '''"""Diff2FlowScheduler for diffusers in one file, which needs torch and diffusers alone. Do not edit it.

    import diff2flow_scheduler  # this file, beside your program
    pipeline = DiffusionPipeline.from_pretrained("an exported model")

Written by `python -m pipelines.export scheduler` of diff2flow-ray (Apache License 2.0).
"""

from __future__ import annotations

'''
FOOTER = f'''

# Exported models name this module, and diffusers takes the class from modules that a program has imported.
if importlib.util.find_spec("{PROJECT}") is None:
    sys.modules["{MODULES[-1]}"] = sys.modules[__name__]
else:
    importlib.import_module("{MODULES[-1]}")
'''
Definitions = Mapping[str, list[ast.stmt]]
"""Name -> its statements at a module's top level; the docstring of a constant is the second."""


def standalone_scheduler() -> str:
    """The source of the file.

    Raises:
        ValueError: a name that is used has two definitions, or none in `MODULES`.
    """
    sources = {name: Path(str(import_module(name).__file__)).read_text() for name in MODULES}
    trees = {name: ast.parse(source) for name, source in sources.items()}
    defined = {name: dict(_definitions(tree.body)) for name, tree in trees.items()}
    used = _reachable(defined)
    own, others = _imports([statement for tree in trees.values() for statement in tree.body])
    for name in sorted(used & own):
        if (count := sum(name in names for names in defined.values())) != 1:
            raise ValueError(f"{name!r} is defined in {count} of {', '.join(MODULES)}. Rename it, or add its module.")
    parts = [
        _source(sources[module], statements)
        for module, definitions in defined.items()
        for name, statements in definitions.items()
        if name in used
    ]
    imports = {"import importlib.util", "import sys", *(others[name] for name in used & others.keys())}
    return HEADER + "\n".join(sorted(imports)) + "\n\n\n" + "\n\n\n".join(parts) + "\n" + FOOTER


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, list[ast.stmt]]]:
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            yield statement.name, [statement]
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            yield ast.unparse(target), [statement, after] if documented and after else [statement]


def _imports(body: list[ast.stmt]) -> tuple[set[str], dict[str, str]]:
    """Names that are imported from this project, and those from elsewhere with the statement that imports each."""
    own, others = set[str](), dict[str, str]()
    for statement in body:
        if isinstance(statement, ast.Import):
            others |= {alias.asname or alias.name: ast.unparse(ast.Import([alias])) for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and str(statement.module).startswith(PROJECT):
            own |= {alias.asname or alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            single = {alias.asname or alias.name: [alias] for alias in statement.names}
            others |= {name: ast.unparse(ast.ImportFrom(statement.module, alias, 0)) for name, alias in single.items()}
    return own, others


def _reachable(defined: Mapping[str, Definitions]) -> set[str]:
    """All names that the scheduler's definition uses, and those that their definitions use."""
    used, to_do = {NAME}, [NAME]
    while to_do:
        name = to_do.pop()
        statements = [statement for definitions in defined.values() for statement in definitions.get(name, [])]
        nodes = (node for statement in statements for node in ast.walk(statement))
        new = {node.id for node in nodes if isinstance(node, ast.Name)} - used
        used |= new
        to_do += new
    return used


def _source(text: str, statements: list[ast.stmt]) -> str:
    """The lines of a definition, with its decorators."""
    decorators = [node.lineno for node in getattr(statements[0], "decorator_list", [])]
    return "\n".join(text.splitlines()[min([statements[0].lineno, *decorators]) - 1 : statements[-1].end_lineno])
