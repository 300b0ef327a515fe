"""What is installed is what the lock says: every file by its hash, through the user's own pip configuration."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from infra import install
from infra.install import InstallError, Pip, canonical, parts_of, read_lock
from tests.infra.test_project import ROOT, pins

pytestmark = [pytest.mark.timeout(120), pytest.mark.starts_processes]
HOLE = {"torch"}
"""Its builds differ by machine."""
BUILD = {"setuptools", "wheel"}


def locked(name: str) -> dict[str, str]:
    return read_lock((ROOT / name).read_text())


def test_the_locks_hold_every_version_of_the_constraints_once_with_hashes():
    demo, correspondence, dev = (locked(name) for name in install.LOCKS.values())
    both = {**demo, **correspondence, **dev}
    assert len(both) == len(demo) + len(correspondence) + len(dev)
    versions = {name: entry.split()[0].partition("==")[2] for name, entry in both.items()}
    expected = {canonical(name): version for name, version in pins().items()}
    assert {name: versions.get(name) for name in expected if name not in HOLE} == {
        name: version for name, version in expected.items() if name not in HOLE
    }
    for name in both.keys() - expected.keys() - BUILD:
        assert "sys_platform" in both[name], f"{name} is for no other platform, but not among the constraints"
    for name, entry in both.items():
        hashes = entry.split("--hash=sha256:")[1:]
        assert hashes and all(len(one.split()[0]) == 64 for one in hashes), name
    assert {"setuptools", "wheel", "deepspeed"} <= demo.keys() and "torch" not in both and "pytest" in dev
    assert "embreex" in correspondence


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        ([], ["demo"]),
        (["--correspondence"], ["demo", "correspondence"]),
        (["--dev"], ["demo", "correspondence", "dev"]),
    ],
)
def test_the_quickstart_installs_no_extra_and_the_tests_need_them_all(monkeypatch, arguments, kinds):
    looked: list[str] = []
    monkeypatch.setattr(install, "works", lambda python: True)
    monkeypatch.setattr(install, "is_there", lambda venv, kind: looked.append(kind) or True)
    monkeypatch.setattr(sys, "argv", ["install.py", *arguments])
    assert install.main() == 0 and looked == kinds


def test_parts_hold_every_entry_once():
    entries = [f"p{number}==1" for number in range(10)]
    parts = parts_of(entries, 4)
    assert len(parts) == 4 and sorted(entry for part in parts for entry in part) == sorted(entries)
    assert parts_of(["a==1"], 4) == [["a==1"]]


def write_wheel(directory: Path, name: str, content: str) -> str:
    """A wheel of one module; returns its lock entry."""
    file = directory / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{name}.py", content)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: missing\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return f"{name}==1.0 \\\n    --hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True, timeout=100)
    return venv / "bin/python"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip finds wheels, told by the user's configuration, which also names constraints without hashes."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "constraints.txt").write_text("one<2\nother==3\n")
    (tmp_path / "pip.conf").write_text(
        f"[global]\nno-index = true\nfind-links = {tmp_path / 'wheels'}\nconstraint = {tmp_path / 'constraints.txt'}\n"
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    return tmp_path / "wheels"


def test_a_lock_is_installed_from_the_users_own_index_and_nothing_else(python: Path, index: Path):
    entries = [write_wheel(index, name, f"value = {number}") for number, name in enumerate(("one", "two", "three"))]
    install.install(Pip(python), "\n".join(["# a comment", *entries]), with_torch=False)
    code = "import one, two, three; print(one.value, two.value, three.value)"
    assert subprocess.check_output([str(python), "-c", code], text=True).split() == ["0", "1", "2"]


def test_a_missing_dependency_is_told_unless_only_data_are_read(
    python: Path, index: Path, monkeypatch: pytest.MonkeyPatch
):
    install.install(Pip(python), write_wheel(index, "lacking", ""), with_torch=False)
    with pytest.raises(InstallError, match=r"lacking 1\.0 requires missing"):
        Pip(python).check()
    monkeypatch.setattr(install, "DATA_ONLY", {"lacking", "one", "two", "three"})
    Pip(python).check()


def test_a_file_whose_hash_is_not_in_the_lock_is_refused_with_the_packages_name(python: Path, index: Path):
    good = write_wheel(index, "good", "")
    changed = write_wheel(index, "changed", "")
    write_wheel(index, "changed", "import os")
    with pytest.raises(InstallError, match=r"(?s)HASHES.*changed==1\.0"):
        install.install(Pip(python), f"{good}\n{changed}\n", with_torch=False)
    assert subprocess.run([str(python), "-c", "import changed"], stderr=subprocess.DEVNULL).returncode == 1


def test_an_older_python_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(sys, "argv", ["install.py"])
    assert install.main() == 1
    assert "Python 3.10.4: 3.11 or newer is needed. Name one: make PYTHON=python3.11" in capsys.readouterr().err
