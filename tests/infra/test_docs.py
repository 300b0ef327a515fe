"""Links and commands of the pages lead somewhere, and the page about the code is what the code says."""

import os
import re
import shlex
from pathlib import Path

import pytest

from infra import code_page, docs_check, docs_commands
from infra.command_lines import known_flags, problem

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = ("ray ", "pip ", "aws ", "git ")
RAYS_OWN = {"--address", "--runtime-env-json"}
"""Flags of `ray job submit` that pages explain by themselves."""
VARIABLE = re.compile(r"[\"']((?:D2F|MLFLOW|AWS|RAY)_[A-Z0-9_]+)[\"']")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_the_page_about_the_code_is_what_the_code_says() -> None:
    assert code_page.PAGE.read_text() == code_page.page(), "run `make docs`"


def test_every_file_says_what_it_is_for() -> None:
    files = [file for room in code_page.ROOMS for file in (ROOT / room).rglob("*.py") if file.name != "__init__.py"]
    assert not [str(file.relative_to(ROOT)) for file in files if len(code_page.phrase(file)) < 20]


def test_the_readme_is_short_enough_to_be_read() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110 and sum(len(line.split()) for line in lines) <= 1050


def page_with(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize("page", docs_commands.pages(), ids=lambda page: page.name)
def test_every_command_of_a_page_is_read_by_its_own_command_line(page: Path) -> None:
    read = [(command, problem(command.argv)) for command in docs_commands.commands(page)]
    assert not [f"{docs_commands.place(page, c.line)}: {' '.join(c.argv)}: {wrong}" for c, wrong in read if wrong]


@pytest.mark.parametrize("page", docs_commands.pages(), ids=lambda page: page.name)
def test_every_block_names_its_language_and_each_of_commands_has_a_mark(page: Path) -> None:
    for block in docs_commands.blocks(page):
        assert block.language in (docs_commands.SHELL, docs_commands.INLINE, *docs_commands.OTHERS), block
        assert block.language in docs_commands.OTHERS or block.treatment in docs_commands.MARKS


def test_every_flag_in_a_sentence_is_one_of_ours_or_of_a_tool_that_is_named() -> None:
    for page in docs_commands.pages():
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`([^`]*--[^`]*)`", text):
            if not span.startswith(TOOLS):
                unknown = {*re.findall(r"(?<![\w-])--[a-z][\w.-]+", span)} - known_flags() - RAYS_OWN
                assert not unknown, f"{page.name}: {span}"


def test_the_index_leads_to_every_page() -> None:
    shown = {*docs_commands.pages(), *docs_commands.WITHOUT_COMMANDS, ROOT / "THIRD_PARTY.md"}
    assert {*PAGES} <= shown


def test_the_page_about_configuration_names_every_variable_of_the_code() -> None:
    files = [file for room in ("d2f_core", "pipelines", "infra") for file in (ROOT / room).rglob("*.py")]
    named = {name for file in files for name in VARIABLE.findall(file.read_text())}
    page = (ROOT / "docs/configuration.md").read_text()
    assert len(named) > 20 and not sorted(name for name in named if f"`{name}`" not in page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_python_blocks_import_is_there(page: Path) -> None:
    for block in docs_commands.blocks(page):
        imports = [line.split("#")[0] for line in block.text.splitlines() if line.startswith(("import ", "from "))]
        if block.language == "python":
            compile(block.text, docs_commands.place(page, block.line), "exec")
            exec("\n".join(imports), {})


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python -m pipelines.finetune emoji-lorra", "unknown recipe 'emoji-lorra'"),
        ("python -m pipelines.finetune emoji-lora --train.num-stepz 2", "--train.num-stepz"),
        (
            "python -m pipelines.finetune emoji-lora --train.num-workers 8 --train.micro-batch-size 8",
            "global_batch_size",
        ),
        ("python -m pipelines.finetune --config x.yaml --train.num-stepz 2", "--train.num-stepz"),
        ("ray job submit --working-dir . -- python -m pipelines.finetune emoji-lorra", "unknown recipe"),
        ("ray job submit --work-dir . -- python -m pipelines.finetune emoji-lora", "--work-dir"),
        ("ray job send", "no command 'send'"),
        ("python -m infra.local submit -- python -m pipelines.finetune emoji-lorra", "unknown recipe"),
        ("python -m infra.local upp", "upp"),
        ("python -m pipelines.finetunes emoji-lora", "no such module"),
        ("python -m benchmarks.chaos --killz 2", "--killz"),
        ("python -m benchmarks.conversion_error --resultz x", "--resultz"),
        ("make quickstarts", "no such target"),
        ("python -m pytest tests/no_such_test.py", "does not exist"),
        ("python -c 'import ('", "does not understand"),
        ("python no_such_file.py", "no such file"),
        ("pyhton -m pipelines.finetune emoji-lora", "not known here"),
    ],
)
def test_a_command_that_cannot_work_is_found(tmp_path: Path, command: str, said: str) -> None:
    page = page_with(tmp_path, f"# Page\n\n<!-- parse -->\n```bash\n{command}\n```\n")
    (found,) = docs_commands.commands(page)
    assert found.line == 5 and said in str(problem(found.argv))


@pytest.mark.parametrize(
    "command",
    [
        "python -m pipelines.finetune emoji-lora --train.num-steps 2",
        "python -m pipelines.finetune --config s3://d2f/runs/one/config.yaml --train.num-steps 2",
        "python -m pipelines.serve --help",
        "python -m infra.local submit --quiet -- python -m pipelines.workflow quickstart",
        "ray job submit --address http://HEAD:8265 --working-dir . -- python -m pipelines.evaluate quickstart",
        "make RECIPE=depth quickstart",
    ],
)
def test_a_command_that_can_work_is_not_started(command: str) -> None:
    assert problem(shlex.split(command)) is None


def test_commands_are_what_a_shell_makes_of_the_page(tmp_path: Path) -> None:
    text = """`make test`, `pipelines.finetune emoji-lora` and `python -m pipelines.generate RECIPE` in a sentence.

<!-- parse -->
```bash
S="python -m infra.local submit -- python -m"    # a comment
submit() {
    ray job submit -- "$@"
}
$S pipelines.one --prompt "red apple" \\
    --seed 1 && make two
```

```text
make nothing
```
<!-- run -->
```bash
submit three
```
"""
    found = [(command.line, command.argv) for command in docs_commands.commands(page_with(tmp_path, text))]
    submitted = tuple(shlex.split("python -m infra.local submit -- python -m pipelines.one --prompt 'red apple'"))
    assert found == [
        (9, (*submitted, "--seed", "1")),
        (10, ("make", "two")),
        (18, ("ray", "job", "submit", "--", "three")),
        (1, ("make", "test")),
        (1, ("python", "-m", "pipelines.finetune", "emoji-lora")),
        (1, ("python", "-m", "pipelines.generate")),
    ]


def test_a_block_that_no_shell_understands_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bash does not understand"):
        docs_commands.commands(page_with(tmp_path, "<!-- parse -->\n```bash\nif true\n```\n"))


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("", "no mark"),
        ("<!-- rnu -->", "no mark but '<!-- rnu -->'"),
        ("some prose", "no mark but ''"),
        ("<!-- record -->", "has a date"),
        ("<!-- run 2026-11-22 -->", "alone has a date"),
        ("<!-- record yesterday -->", "no mark"),
    ],
)
def test_a_block_without_a_known_mark_is_refused(tmp_path: Path, mark: str, said: str) -> None:
    (block,) = docs_commands.blocks(page_with(tmp_path, f"{mark}\n```bash\nmake test\n```\n"))
    with pytest.raises(ValueError, match=f"page.md:3.*{said}"):
        assert block.treatment


def test_what_makes_a_command_small_belongs_to_a_command_of_a_page_and_is_read_by_it() -> None:
    pages = docs_commands.pages()
    shown = [command.argv for page in pages for command in docs_commands.read(page, docs_check.to_run(page))]
    for name in docs_check.TOY:
        matching = [argv for argv in shown if name in " ".join(argv)]
        assert matching, name
        assert not [wrong for argv in matching if (wrong := problem(docs_check.small(argv, {})))]


def test_a_command_is_made_small_and_finds_what_the_reader_has() -> None:
    shown = shlex.split("ray job submit --address http://HEAD:8265 -- python -m pipelines.workflow depth --x /data/y")
    made = docs_check.small(shown, {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1", "HOME": "/home"})
    assert made[:5] == ["ray", "job", "submit", "--address", "http://127.0.0.1:1"]
    assert made[10:14] == ["--x", "/home/y", "--dataset.num-scenes", "80"]


def test_only_pages_with_something_to_run_can_be_asked_for() -> None:
    first, *_ = docs_check.chosen([])
    assert docs_check.chosen([str(ROOT / "docs/depth.md")]) == [first, ROOT / "docs/depth.md"]
    with pytest.raises(ValueError, match=r"security\.md has no block to run"):
        docs_check.chosen([str(ROOT / "docs/security.md")])


def test_pages_are_run_in_a_copy_with_the_packages_of_this_checkout(tmp_path: Path) -> None:
    docs_check.copy_project(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    assert (tmp_path / ".venv").resolve() == (ROOT / ".venv").resolve()
    assert not (tmp_path / ".git").exists() and not list(tmp_path.rglob("__pycache__"))


@pytest.mark.starts_processes
def test_a_page_runs_until_a_command_fails_and_says_which(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = """<!-- run -->
```bash
NUMBER=1
python -c "print($NUMBER + 1)"
python - <<'END'
print("begins", flush=True)
raise SystemExit(3)
END
python -c "print('never')"
```
"""
    project, shown_in = tmp_path / "machine/project", tmp_path / "pages"
    for directory in (project, shown_in):
        directory.mkdir(parents=True)
    for name in (".venv", "infra"):
        (project / name).symlink_to(ROOT / name)
    code = docs_check.run_page(page_with(shown_in, text), project, os.environ)
    shown = capfd.readouterr().out
    assert code == 3 and "page.md:4: python -c 'print(1 + 1)'" in shown
    assert "page.md:5" in shown and "begins" in shown and "failed (3)" in shown and "never" not in shown
