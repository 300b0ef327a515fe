"""Folders, tars and parquet files as people have them, two captioned pictures each, and what becomes of each.

`python -m tests.data.sources.source_zoo` prints the table of docs/sources.md.
"""

import io
import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.pictures import file_bytes, pixels, tar_bytes

A, B = file_bytes(pixels(0)), file_bytes(pixels(1), "JPEG")
TEXTS = {"a.txt": b"a cat", "b.txt": b"a dog"}
CAT, DOG = {"a.png": A, "a.txt": b"a cat"}, {"b.jpg": B, "b.txt": b"a dog"}
PAIR = {"a.png": A, "b.jpg": B, **TEXTS}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One row of the table."""

    name: str
    becomes: str
    """`read`: both pictures with their captions. `ledger`: some get an entry. `refused`: the job does not start."""
    detail: str = ""
    """For the reader; of the ledger and of refusals, it begins with a word of the reason."""
    make: Callable[[Path], Any]
    settings: dict[str, Any] = field(default_factory=dict)


def files(content: dict[str, bytes]) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for name, data in content.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)

    return make


def tar(content: dict[str, bytes]) -> Callable[[Path], None]:
    return files({"x.tar": tar_bytes(content)})


def parquet(**columns: Any) -> Callable[[Path], None]:
    return files({"x.parquet": parquet_bytes(**columns)})


def parquet_bytes(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [A, B], "text": ["a cat", "a dog"]} | columns), sink)
    return sink.getvalue()


def lines(*rows: Any) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def pictures(**more: bytes) -> dict[str, bytes]:
    return {"a.png": A, "b.jpg": B} | {name.replace("__", "."): content for name, content in more.items()}


def linked(root: Path) -> None:
    files({"elsewhere/" + name: data for name, data in PAIR.items()})(root.parent)
    (root / "link").symlink_to(root.parent / "elsewhere")


ROWS = ({"file_name": "a.png", "text": "a cat"}, {"file_name": "b.jpg", "text": "a dog"})
SEVERAL = (*ROWS, {"file_name": "b.jpg", "text": "a hound"})
VIEWS = parquet(image=pa.array([A, B], pa.binary_view()), text=pa.array(["a cat", "a dog"]).dictionary_encode())
LISTS = pa.array([["a cat"], ["a dog", "a hound"]])
NFD = unicodedata.normalize("NFD", "é.png")


def row(name: str, becomes: str, make: Callable[[Path], Any], detail: str = "", **settings: Any) -> Layout:
    return Layout(name=name, becomes=becomes, detail=detail, make=make, settings=settings)


FOLDERS = [
    row("`a.png` with `a.txt`, in folders or not", "read", files({f"sub/{n}": d for n, d in PAIR.items()})),
    row("`a.caption`, `a.png.txt`, `A.TXT`", "read", files(pictures(a__caption=b"a cat", b__jpg__TXT=b"a dog"))),
    row("`a.json` beside each", "read", files(pictures(a__json=lines(ROWS[0]), b__json=lines(ROWS[1])))),
    row("`metadata.jsonl`, `captions.jsonl`", "read", files(pictures(metadata__jsonl=lines(*ROWS)))),
    row(
        "`metadata.csv`",
        "read",
        files(pictures(metadata__csv=b'file_name,text\na.png,a cat\nb.jpg,"a dog"\n')),
        "columns `file_name` (or `filename`, `path`) and the caption's",
    ),
    row(
        "`metadata.parquet` beside images",
        "read",
        files(pictures(metadata__parquet=parquet_bytes(file_name=["a.png", "b.jpg"]))),
    ),
    row(
        '`meta_*.json`, `metadata.json`: `{name: {"caption" or "tags": ...}}`',
        "read",
        files(pictures(meta_cap__json=lines({"a": {"caption": "a cat"}, "b": {"tags": "a dog"}}))),
        "kohya's; names may lack the extension. Read where no text file or `.jsonl` is",
    ),
    row(
        "names in a table with `\\`, `./`, `../` or another Unicode form",
        "read",
        files(
            {
                NFD: A,
                "sub/b.jpg": B,
                "metadata.jsonl": lines(
                    {"file_name": "é.png", "text": "a cat"}, {"file_name": "x\\..\\sub\\b.jpg", "text": "a dog"}
                ),
            }
        ),
    ),
    row(
        "a name in a table that no file has",
        "ledger",
        files(pictures(metadata__jsonl=lines(*ROWS, {"file_name": "/home/me/c.png", "text": "c"}))),
        "`no_image`",
    ),
    row("UTF-8 with a byte order mark", "read", files({**PAIR, "a.txt": b"\xef\xbb\xbfa cat"})),
    row("UTF-16, NUL characters", "ledger", files({**PAIR, "a.txt": "a cat".encode("utf-16")}), "`bad_caption`"),
    row("an image without a caption", "ledger", files(pictures(a__txt=b"a cat")), "`no_caption`"),
    row(
        "the same, `--source.default-caption TEXT`",
        "read",
        files(pictures(a__txt=b"a cat")),
        default_caption="a dog",
    ),
    row(
        "one image twice in a table", "refused", files(pictures(metadata__jsonl=lines(*SEVERAL))), "`several captions`"
    ),
    row(
        "the same, `--source.captions first`",
        "read",
        files(pictures(metadata__jsonl=lines(*SEVERAL))),
        "`all`: a sample each",
        captions="first",
    ),
    row("`a.png` and `a.jpg` with one `a.txt`", "refused", files({**PAIR, "a.jpg": B}), "`share the caption`"),
    row(
        "the same, `--source.image-extension jpg`",
        "read",
        files({"a.png": B, "a.jpg": A, "b.jpg": B, **TEXTS}),
        "the `.png` are no images then",
        image_extension="jpg",
    ),
    row(
        "captions in `.txt` and `metadata.jsonl`", "refused", files({**PAIR, "metadata.jsonl": lines(*ROWS)}), "`both`"
    ),
    row(
        "JPEG named `.jpe`, `.jfif`, `.pjpeg`, `.JPG`",
        "read",
        files({"a.png": A, "b.JFIF": B, **TEXTS}),
        "any picture is read by its content",
    ),
    row(
        "a raw photo or `.psd`, `.svg` without a picture of its name",
        "ledger",
        files({**PAIR, "b.nef": b"raw", "c.nef": b"raw"}),
        "`c.nef`; beside `b.jpg` it is passed over",
    ),
    row(
        "`.zip`, `.tar.gz` and other archives beside",
        "ledger",
        files({**PAIR, "more.zip": b"PK" + bytes(9000)}),
        "`packed`, with its samples estimated; passed over with `--source.kind`",
    ),
    row("links to folders", "read", linked),
    row(
        "hidden files (`._a.png`, `.DS_Store`)",
        "read",
        files({**PAIR, "._a.png": b"x", ".DS_Store": b"x"}),
        "passed over",
    ),
]
TARS = [
    row("`a.jpg` with `a.txt`, `a.caption` or `a.json`", "read", tar({"a.png": A, "a.json": lines(ROWS[0]), **DOG})),
    row("`x.TAR`, `x.PARQUET`", "read", files({"x.TAR": tar_bytes({**CAT, **DOG})})),
    row(
        "`._a.jpg`, `.DS_Store`, `Thumbs.db`, `*.swp`, `README.md`, `LICENSE`",
        "read",
        tar(
            {
                "README.md": b"x",
                "._a.png": b"x",
                "a.png": A,
                ".a.txt.swp": b"x",
                "a.txt": b"a cat",
                **DOG,
                "Thumbs.db": b"x",
            }
        ),
        "passed over",
    ),
    row("members of a key that lie apart", "ledger", tar(PAIR), "`unsorted`"),
    row(
        "names with dots (`img.0001.jpg`)",
        "ledger",
        tar({f"i.0{n}.{kind}": A for n in (1, 2) for kind in ("png", "txt")}),
        "`dots_in_name`",
    ),
    row(
        "`a.jpg` and `a.png` under one key",
        "ledger",
        tar({"a.jpg": B, "a.png": A, "a.txt": b"a cat"}),
        "`several_images`; `--source.image-extension jpg` chooses",
    ),
    row(
        "a list of captions in `a.json`",
        "ledger",
        tar({"a.png": A, "a.json": lines({"text": ["a", "b"]})}),
        "`several_captions`; `--source.captions` chooses",
    ),
    row(
        "a tar that is cut off",
        "ledger",
        files({"x.tar": tar_bytes(PAIR)[:900]}),
        "`damaged_archive`, with its samples estimated",
    ),
    row("`x.tar.gz` alone", "refused", files({"x.tar.gz": b"x"}), "`Unpack`"),
]
PARQUETS = [
    row(
        "bytes in `image` or `images`, text in `caption` or `text`", "read", parquet(image=[None, None], images=[A, B])
    ),
    row("text as a category or `string_view`, images as `binary_view`", "read", VIEWS),
    row("a numeric `source_uri`", "read", parquet(source_uri=[7, 8])),
    row("a list of captions in each row", "refused", parquet(text=LISTS), "`several captions`"),
    row("the same, `--source.captions first`", "read", parquet(text=LISTS), captions="first"),
    row("a path in place of bytes", "refused", parquet(image=["a.png", "b.jpg"]), "`no column`"),
]
SPLIT = {"train-0.parquet": parquet_bytes(), "test-0.parquet": parquet_bytes()}
PLACES = [
    row("`train-*`, `validation-*`, `test-*`, or folders of such names", "refused", files(SPLIT), "`holds the splits`"),
    row("the same, `--source.split train`", "read", files(SPLIT), "`all` reads them together", split="train"),
    row(
        "images beside tars or parquet",
        "refused",
        files({**PAIR, "x.tar": tar_bytes(PAIR)}),
        "`mixture`; say `--source.kind`",
    ),
]
KINDS = {"folder": FOLDERS, "tar": TARS, "parquet": PARQUETS, "any": PLACES}


def table() -> str:
    """The table of the page, in Markdown."""
    rows = [
        f"| {kind} | {layout.name} | {layout.becomes} | {layout.detail} |" for kind in KINDS for layout in KINDS[kind]
    ]
    return "\n".join(["| in | what is there | becomes | reason, or more |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
