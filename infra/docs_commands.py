"""The commands that the docs show, as a shell parses them.

bash runs a page's blocks as one session, with every program replaced by one that records its arguments. So line
continuations, `&&`, comments, variables and functions mean the same as for a reader who copies the blocks one after
another.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "docs/README.md"
WITHOUT_COMMANDS = {INDEX, ROOT / "docs/code.md"}
"""Pages that are not checked: the index, and the page that is generated from docstrings."""
SHELL = "bash"
OTHERS = ("python", "text", "json", "yaml")
"""Languages of blocks without commands. Every block must name its language, so that none is skipped by mistake."""
INLINE = "inline"
MARK = re.compile(r"<!-- (?P<name>\w+)(?: (?P<date>\d{4}-\d{2}-\d{2}))? -->")
MARKS = {
    "run": "`make docs-check` runs it, at toy size",
    "parse": "it needs a cloud account, real weights, a GPU or too long a time: it is read by its own command line",
    "record": "what was run on that date for figures of the page, in hours or at another commit: read likewise",
}
IN_A_SENTENCE = re.compile(r"(?<!`)`((?:python -m |pipelines\.|benchmarks\.|infra\.|make |pytest |ray )[^`]*)`(?!`)")
PLACEHOLDER = re.compile(r" (\.\.\.|RECIPE|TARGET|--)( |$)")
"""Placeholder in a command in a sentence; of such a command only `python -m MODULE` is checked."""
NOTE_PROGRAMS = r"""
command_not_found_handle() { printf '%s\0' "${BASH_LINENO[-2]}" "$#" "$@" >&3; }
for name in cd source . .venv/bin/python; do
    eval "$name() { command_not_found_handle $name \"\$@\"; }"
done
PATH=/nowhere
"""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page, or a command in a sentence."""

    page: Path
    line: int
    """Line number of the text's first line, counted from 1."""
    language: str
    """Language as named in the page, or INLINE."""
    text: str
    mark: str = ""
    """The line before the block if it is an HTML comment."""

    @property
    def treatment(self) -> str:
        """How the block is checked: one of `MARKS`; a command in a sentence is parsed.

        Raises:
            ValueError: the mark is missing or unknown, or a record has no date.
        """
        if self.language == INLINE:
            return "parse"
        found = MARK.fullmatch(self.mark)
        if not found or found["name"] not in MARKS:
            known = ", ".join(f"<!-- {name} -->" for name in MARKS)
            raise ValueError(f"{place(self.page, self.line)}: no mark but {self.mark!r} before the block. Use {known}.")
        if (found["name"] == "record") != bool(found["date"]):
            raise ValueError(f"{place(self.page, self.line)}: {self.mark!r}. A record alone has a date: "
                             "<!-- record 2026-11-22 -->.")  # fmt: skip
        return found["name"]


@dataclass(frozen=True, kw_only=True)
class Command:
    page: Path
    line: int
    argv: tuple[str, ...]


def place(page: Path, line: int) -> str:
    """Location such as `docs/page.md:12`, which editors and terminals can open."""
    return f"{page.relative_to(ROOT) if page.is_relative_to(ROOT) else page}:{line}"


def pages() -> list[Path]:
    """Pages with commands, in the reading order of the index."""
    targets = re.findall(r"\]\(([\w./-]+\.md)[)#]", INDEX.read_text())
    found = dict.fromkeys((INDEX.parent / target).resolve() for target in targets)
    return [page for page in found if page not in WITHOUT_COMMANDS]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, then the commands in its sentences."""
    found: list[Block] = []
    prose: list[str] = []
    opened, language, mark = 0, "", ""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        fence = re.match(r"\s*```(\w*)", line)
        prose.append("" if fence or opened else line)
        if fence and opened:
            text = "\n".join(lines[opened : number - 1])
            found.append(Block(page=page, line=opened + 1, language=language, text=text, mark=mark))
            opened = 0
        elif fence:
            before = lines[number - 2].strip() if number > 1 else ""
            opened, language, mark = number, fence[1], before if before.startswith("<!--") else ""
    return [*found, *_in_sentences(page, "\n".join(prose))]


def _in_sentences(page: Path, prose: str) -> list[Block]:
    """Commands in sentences; `pipelines.NAME` counts as `python -m pipelines.NAME`."""
    found = []
    for match in IN_A_SENTENCE.finditer(prose):
        text = re.sub(r"^(?=pipelines|benchmarks|infra)", "python -m ", " ".join(match[1].split()))
        if ".NAME" in text:
            continue
        if PLACEHOLDER.search(text):
            text = " ".join(text.split()[:3]) if text.startswith("python") else ""
        line = prose.count("\n", 0, match.start()) + 1
        found.append(Block(page=page, line=line, language=INLINE, text=text))
    return found


def session(chosen: Iterable[Block]) -> str:
    """A shell script of blocks of one page, each at its original line number."""
    lines: dict[int, str] = {}
    for block in chosen:
        for number, line in enumerate(block.text.splitlines(), start=block.line):
            lines[number] = f"{lines[number]}; {line}" if number in lines else line
    return "".join(lines.get(number, "") + "\n" for number in range(1, max(lines, default=0) + 1))


def commands(page: Path) -> list[Command]:
    """All commands of a page: those of its blocks, then those of its sentences.

    Raises:
        ValueError: see `read`.
    """
    found = blocks(page)
    return [command for kind in (SHELL, INLINE) for command in read(page, [b for b in found if b.language == kind])]


def read(page: Path, chosen: Sequence[Block]) -> list[Command]:
    """The commands that a shell would start in some blocks of a page.

    Raises:
        ValueError: bash cannot parse the blocks; its message, which names the line.
    """
    with tempfile.TemporaryDirectory() as directory:
        for name, text in (("notes", ""), ("before", NOTE_PROGRAMS), (page.name, session(chosen))):
            Path(directory, name).write_text(text)
        command = ["bash", "-c", f"exec 3>>notes; BASH_ENV=before exec bash {page.name}"]
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            raise ValueError(f"bash does not understand the blocks: {' '.join(done.stderr.split())}")
        words = Path(directory, "notes").read_text().split("\0")[:-1]
    found = []
    while words:
        line, count, *words = words
        found.append(Command(page=page, line=int(line), argv=tuple(words[: int(count)])))
        words = words[int(count) :]
    return found
