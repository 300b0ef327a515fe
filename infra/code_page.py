"""python -m infra.code_page: write docs/code.md, a phrase per file, from the first sentences of module docstrings."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/code.md"
ROOMS = ("d2f_core", "pipelines", "infra")
HEAD = """# The code

A phrase for each file; a room's own comes first. `make docs` writes this page from the files' docstrings.
"""


def phrase(file: Path) -> str:
    """First sentence of the module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.) (?=[A-Z`])", text)[0]
    return re.sub(r":? `(python|ray) [^`]*`", "", sentence).rstrip(".:").replace("|", "\\|")


def page() -> str:
    parts = [HEAD]
    directories = sorted({file.parent for room in ROOMS for file in (ROOT / room).rglob("*.py")})
    for directory in directories:
        parts.append(f"## {directory.relative_to(ROOT).as_posix()}\n")
        own = directory / "__init__.py"
        if own.exists() and phrase(own):
            parts.append(f"{phrase(own)}.\n")
        files = [file for file in sorted(directory.glob("*.py")) if file.name not in ("__init__.py", "__main__.py")]
        rows = [f"| [{file.name}](../{file.relative_to(ROOT).as_posix()}) | {phrase(file)} |" for file in files]
        parts.append("\n".join(["| file | |", "|---|---|", *rows]) + "\n" if rows else "")
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    PAGE.write_text(page())
