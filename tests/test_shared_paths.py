"""Local paths on several nodes: refused unless each node sees what this one does. A node's disk is a directory here."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from d2f_core import shared_paths
from d2f_core.nodes import Node
from d2f_core.shared_paths import NotSharedError, Question, check_shared

LARGE = b"x" * 300_000


class Nodes:
    """A head with this process, and other nodes; what each sees under the shared root is a directory of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.monkeypatch, self.root = monkeypatch, root
        self.disks: dict[str, Path] = {}
        self.works_here, self.silent, self.asked = True, set[str](), 0
        monkeypatch.setattr(shared_paths, "_workers", lambda: (self.works_here, self.nodes()))
        monkeypatch.setattr(shared_paths, "_ask", self.ask)
        monkeypatch.setattr(shared_paths, "SEEN_SECONDS", 0.0)

    def add(self, name: str, disk: Path) -> None:
        self.disks[name] = disk

    def nodes(self) -> list[Node]:
        return [Node(id=name, address=name, total={"CPU": 1}, free={}) for name in self.disks]

    def ask(self, nodes: Sequence[Node], questions: Sequence[Question], seconds: float) -> dict[str, list[bool]]:
        self.asked += 1
        return {node.id: self.look(node.id, questions) for node in nodes if node.id not in self.silent}

    def look(self, name: str, questions: Sequence[Question]) -> list[bool]:
        plain: Callable[[str], Path] = shared_paths._plain
        with self.monkeypatch.context() as patch:
            patch.setattr(shared_paths, "_plain", lambda path: self.disks[name] / plain(path).relative_to(self.root))
            return shared_paths.look(questions)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """This node's disk, with a model and a table."""
    disk = tmp_path / "here"
    for name, data in {
        "model/unet/config.json": b"{}",
        "model/unet/weights": LARGE,
        "table/manifest.json": b"[]",
    }.items():
        (disk / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / name).write_bytes(data)
    return disk


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, root: Path) -> Nodes:
    monkeypatch.delenv(shared_paths.SHARED, raising=False)
    return Nodes(monkeypatch, root)


def check(root: Path, **reads: str) -> None:
    check_shared(reads={"model": str(root / "model"), "start": "", **reads}, writes={"output": str(root / "runs/one")})


def test_a_single_node_is_asked_nothing(nodes: Nodes, root: Path) -> None:
    check(root)
    assert not nodes.asked and not (root / "runs").exists()


def test_a_shared_disk_passes_and_nothing_is_left_on_it(nodes: Nodes, root: Path) -> None:
    nodes.add("10.0.0.2", root)
    nodes.add("10.0.0.3", root)
    check(root, table=str(root / "table"))
    assert nodes.asked == 1, "all nodes and all paths at once"
    assert sorted(path.name for path in root.iterdir()) == ["model", "table"]
    (root / "runs/one").mkdir(parents=True)
    check(root)
    assert not [*(root / "runs/one").iterdir()]


def test_copies_on_every_node_will_do_for_what_is_read(nodes: Nodes, root: Path, tmp_path: Path) -> None:
    nodes.add("10.0.0.2", Path(shutil.copytree(root, tmp_path / "copy")))
    check_shared(reads={"model": str(root / "model")}, writes={})
    with pytest.raises(NotSharedError, match=r"^output='.*runs/one' is on this job's node, and other nodes do not see"):
        check(root)
    assert not (root / "runs").exists()


@pytest.mark.parametrize("spoil", ["nothing", "missing", "shorter", "other end", "other beginning"])
def test_an_input_that_another_node_lacks_is_refused(nodes: Nodes, root: Path, tmp_path: Path, spoil: str) -> None:
    """The large file differs behind its first and before its last bytes by its size alone."""
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    weights = copy / "model/unet/weights"
    if spoil == "missing":
        shutil.rmtree(copy / "model")
    elif spoil != "nothing":
        other = {"shorter": LARGE[:-1], "other end": LARGE[:-1] + b"y", "other beginning": b"y" + LARGE[1:]}
        weights.write_bytes(other[spoil])
    nodes.add("10.0.0.2", root)
    nodes.add("10.0.0.3", copy)
    reads = {"model": str(root / "model")}
    if spoil == "nothing":
        return check_shared(reads=reads, writes={})
    with pytest.raises(NotSharedError) as caught:
        check_shared(reads=reads, writes={})
    assert str(caught.value) == (
        f"model={str(root / 'model')!r} is on this job's node, and other nodes do not see the same there: 10.0.0.3. On "
        "several nodes a local path must lie on a disk that all of them share. Give s3://..., or a shared disk at the "
        "same path everywhere; D2F_SHARED_PATHS=DIRECTORY names one that is shared although nothing shows it."
    )


def test_many_blind_nodes_are_told_in_one_line(nodes: Nodes, root: Path, tmp_path: Path) -> None:
    for number in range(128):
        nodes.add(f"10.0.1.{number:03d}", tmp_path / "empty")
    with pytest.raises(NotSharedError, match=r"there: 10\.0\.1\.000, 10\.0\.1\.001, 10\.0\.1\.002, \.\.\.\. On"):
        check(root)


def test_a_node_that_does_not_answer_is_named_and_refuses_nothing(nodes: Nodes, root: Path, caplog) -> None:
    nodes.add("10.0.0.2", root)
    nodes.add("10.0.0.3", root)
    nodes.silent.add("10.0.0.3")
    check(root)
    assert "1 of 2 nodes did not say in 60 s whether they see" in caplog.text


@pytest.mark.parametrize(
    "path",
    ["s3://bucket/run", "models:/m@champion", "mlflow-artifacts:/1", "", "owner/name", "/none/such", "https://h/x"],
)
def test_other_places_are_nobodys_disk(nodes: Nodes, path: str) -> None:
    nodes.add("10.0.0.2", Path("/none"))
    written = {"output": path} if path.startswith(("s3:", "models:")) else {}
    check_shared(reads={"model": path}, writes=written)
    assert not nodes.asked


def test_the_projects_own_files_are_found_where_ray_has_copied_them(nodes: Nodes, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "project/infra").mkdir(parents=True)
    (tmp_path / "project/infra/model").write_bytes(b"1")
    monkeypatch.setattr(shared_paths, "PROJECT_ROOT", tmp_path / "project")
    monkeypatch.setattr(nodes, "look", lambda name, questions: shared_paths.look(questions))
    nodes.add("10.0.0.2", tmp_path)
    check_shared(reads={"base": "infra/model"}, writes={})
    assert nodes.asked == 1


@pytest.mark.parametrize(("mounts", "passes"), [("", False), ("nfs4", True), ("fuse.juicefs", True), ("ext4", False)])
def test_a_head_without_cpus_refuses_its_own_disk_while_no_node_is_there(
    nodes: Nodes, root: Path, monkeypatch, tmp_path: Path, mounts: str, passes: bool
) -> None:
    nodes.works_here = False
    (table := tmp_path / "proc/self/mounts").parent.mkdir(parents=True)
    table.write_text(f"/dev/sda / ext4 rw 0 0\nhost:/x {root} {mounts or 'xfs'} rw 0 0\n")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    if passes:
        return check(root)
    with pytest.raises(
        NotSharedError, match=r"^model='.*' is on a disk of this job's node, which has no CPUs .* s3://"
    ):
        check(root)


def test_paths_that_are_said_to_be_shared_are_believed(nodes: Nodes, root: Path, monkeypatch) -> None:
    nodes.add("10.0.0.2", Path("/none"))
    monkeypatch.setenv(shared_paths.SHARED, f"/else:{root / 'runs'}")
    with pytest.raises(NotSharedError, match="model="):
        check(root)
    monkeypatch.setenv(shared_paths.SHARED, f"{root}")
    check(root)
    assert not (root / "runs").exists()


def test_an_output_that_is_a_file_is_refused_in_a_line(nodes: Nodes, root: Path) -> None:
    nodes.add("10.0.0.2", root)
    with pytest.raises(NotSharedError, match=r"manifest\.json' cannot be written to \(.*exists.*\)\. Choose another"):
        check_shared(reads={}, writes={"output": str(root / "table/manifest.json")})
    assert (root / "table/manifest.json").read_bytes() == b"[]"


def test_every_job_that_uses_a_cluster_asks_its_nodes() -> None:
    files = {file.name: file.read_text() for file in Path("pipelines").glob("*.py")}
    assert [name for name, text in files.items() if "ray.init(" in text] == ["cluster.py"]
    asking = {name for name, text in files.items() if re.search(r"\bconnect\(reads=", text)}
    assert asking == {
        "depth.py", "distillation.py", "embed_images.py", "embed_pairs.py", "encode_depth.py", "encode_latents.py",
        "evaluate.py", "evaluate_depth.py", "evaluate_matches.py", "generate.py", "import_images.py",
        "make_dataset.py", "make_views.py", "mine_pairs.py", "photos.py", "predict_depth.py", "reflow.py", "serve.py",
        "text_to_image.py", "training.py",
    }  # fmt: skip
