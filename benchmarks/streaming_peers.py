"""The other readers of benchmarks.streaming: webdataset, mosaicml-streaming (MDS) and litdata.

Runs in an environment of its own (streaming_peers.txt), so it imports nothing of this project. What every reader is
given and how it is measured is here as well, for benchmarks.streaming to use the same.

    python benchmarks/streaming_peers.py webdataset --what write --uri s3://bucket/key --rows 16000 --local DIRECTORY
    python benchmarks/streaming_peers.py webdataset --what read --uri s3://bucket/key --rows 16000 --local DIRECTORY

S3 is found by AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import sys
import tarfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPE, BATCH, WORKERS = (4, 64, 64), 64, 2
FILE_ROWS = 2000
"""Rows per file of each format: 64 MB."""
SCOPE = 8192
"""Samples among which one is shuffled."""
HALF_ONE = 15360
"""Bits of 1.0 in half precision: all below are finite."""
Batches = Iterable[tuple[list[str], torch.Tensor]]
"""Sample ids and fp16 latents [batch, 4, 64, 64]."""


def num_files(rows: int) -> int:
    return -(-rows // FILE_ROWS)


def sample_id(index: int) -> str:
    return f"{index:032x}"


def file_samples(number: int, rows: int) -> tuple[list[str], list[str], np.ndarray]:
    """Sample ids, captions and latents of one of the files that a set of `rows` samples is cut into."""
    first, end = number * FILE_ROWS, min((number + 1) * FILE_ROWS, rows)
    bits = np.random.default_rng((7, number)).integers(0, HALF_ONE, (end - first, *SHAPE), dtype=np.uint16)
    ids = [sample_id(index) for index in range(first, end)]
    captions = [f"picture {index:08d}: a caption as long as such captions are" for index in range(first, end)]
    return ids, captions, bits.view(np.float16)


def digest(ids: Iterable[str]) -> str:
    """Equal for equal multisets of ids."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def checksum(latents: torch.Tensor) -> int:
    """Sum of the latents' bits: reads every byte, as the copy to a GPU would."""
    return int(latents.view(torch.int16).sum(dtype=torch.int64))


def consume(
    open_batches: Callable[[], Batches], *, step_seconds: float = 0.0, first_seconds: float = 0.0
) -> dict[str, Any]:
    """Read all batches in one process.

    Args:
        open_batches: makes the reader; its time counts towards the first batch.
        step_seconds: how long each step keeps its batch; 0 takes them as they come.
        first_seconds: how much longer the first one does; all counts begin after it.

    Returns:
        `samples`; `first_batch_seconds`; `seconds` from the first batch to the last; `rate` in samples/s over these;
        `waits`, the seconds that each later step waited; `digest` and `checksum` of all that was read.

    Raises:
        ValueError: a batch is not fp16 of the right shape.
    """
    torch.set_num_threads(1)
    ids: list[str] = []
    waits, total, first, first_batch_seconds = [], 0, 0, 0.0
    begun = asked = arrived = time.perf_counter()
    started = begun
    for names, latents in open_batches():
        arrived = time.perf_counter()
        if ids:
            waits.append(arrived - asked)
        else:
            first_batch_seconds, first = arrived - begun, len(names)
            time.sleep(first_seconds)
            started = arrived = time.perf_counter()
        if latents.dtype != torch.float16 or latents.shape != (len(names), *SHAPE):
            raise ValueError(f"A batch is {latents.dtype} {tuple(latents.shape)}, not fp16 {(len(names), *SHAPE)}.")
        ids += names
        total += checksum(latents)
        if step_seconds:  # stands for a training step, which takes this long from its batch on
            time.sleep(max(0.0, arrived + step_seconds - time.perf_counter()))
        asked = time.perf_counter()
    return {
        "samples": len(ids),
        "first_batch_seconds": first_batch_seconds,
        "seconds": arrived - started,
        "rate": (len(ids) - first) / max(arrived - started, 1e-9),
        "waits": [round(wait, 6) for wait in waits],
        "digest": digest(ids),
        "checksum": total,
    }


def write_webdataset(target: Path, rows: int) -> None:
    for number in range(num_files(rows)):
        ids, captions, latents = file_samples(number, rows)
        with tarfile.open(target / f"{number:05d}.tar", "w") as tar:
            for name, caption, latent in zip(ids, captions, latents, strict=True):
                array = io.BytesIO()
                np.save(array, latent)
                for ending, content in (("txt", caption.encode()), ("npy", array.getvalue())):
                    member = tarfile.TarInfo(f"{name}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def read_webdataset(uri: str, rows: int, local: Path) -> Batches:
    """Signed addresses, read by webdataset's own opener for http (curl); a buffer of SCOPE / WORKERS per worker."""
    del local  # nothing is kept on disk
    webdataset, client = load("webdataset"), s3_client()
    bucket, prefix = split(uri)
    names = [f"{prefix}/{number:05d}.tar" for number in range(num_files(rows))]
    urls = [client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": name}) for name in names]

    def collate(samples: list[Any]) -> tuple[list[str], torch.Tensor]:
        return [name for name, _, _ in samples], torch.from_numpy(np.stack([latent for *_, latent in samples]))

    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
    dataset = dataset.shuffle(SCOPE // WORKERS).decode().to_tuple("__key__", "txt", "npy")
    return webdataset.WebLoader(dataset.batched(BATCH, collation_fn=collate), batch_size=None, num_workers=WORKERS)


def load(system: str) -> Any:
    """The reader's package, imported."""
    if system == "mds":
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        # Its image datasets import torchvision, which is not installed and which nothing here uses.
        for name in (
            "torchvision.datasets",
            "torchvision.transforms.functional",
            "torchvision.transforms",
            "torchvision",
        ):
            sys.modules.setdefault(name, types.ModuleType(name)).__spec__ = ModuleSpec(name, None)
        vars(sys.modules["torchvision.datasets"])["VisionDataset"] = object
        vars(sys.modules["torchvision.transforms.functional"])["to_tensor"] = None
    if system == "litdata":
        # Its fast client refuses plain http, and litdata has no setting for that.
        downloader = importlib.import_module("litdata.streaming.downloader")
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    return importlib.import_module(MODULES[system])


def write_mds(target: Path, rows: int) -> None:
    columns = {"sample_id": "str", "caption": "str", "latent": "ndarray:float16:" + ",".join(map(str, SHAPE))}
    with load("mds").MDSWriter(out=str(target), columns=columns, size_limit=1 << 26) as writer:
        for number in range(num_files(rows)):
            for name, caption, latent in zip(*file_samples(number, rows), strict=True):
                writer.write({"sample_id": name, "caption": caption, "latent": latent})


def read_mds(uri: str, rows: int, local: Path) -> Batches:
    """Shuffled by its default `py1e` with blocks of SCOPE; each worker fetches up to its part of SCOPE ahead."""
    streaming = load("mds")
    del rows  # in its index
    dataset = streaming.StreamingDataset(
        remote=uri,
        local=str(local),
        batch_size=BATCH,
        shuffle=True,
        shuffle_block_size=SCOPE,
        predownload=SCOPE // WORKERS,
    )
    for stream in dataset.streams:
        # Or the forked workers would share the connection that fetched the index, and read each other's answers.
        stream._downloader.clean_up()
    for batch in streaming.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS):
        yield batch["sample_id"], batch["latent"]


def litdata_samples(number: int, rows: int) -> Iterator[dict[str, Any]]:
    for name, caption, latent in zip(*file_samples(number, rows), strict=True):
        yield {"sample_id": name, "caption": caption, "latent": latent}


def write_litdata(target: Path, rows: int) -> None:
    samples = partial(litdata_samples, rows=rows)
    options: dict[str, Any] = {"chunk_size": FILE_ROWS, "num_workers": 1, "verbose": False}
    load("litdata").optimize(samples, list(range(num_files(rows))), output_dir=str(target), **options)


def read_litdata(uri: str, rows: int, local: Path) -> Batches:
    """Shuffles files and the samples within a file: a scope of FILE_ROWS per worker, as far as it goes."""
    litdata = load("litdata")
    del rows  # in its index
    dataset = litdata.StreamingDataset(
        uri,
        cache_dir=str(local),
        shuffle=True,
        item_shuffle_window="full",
        batch_decode=0,  # the default decodes 256 neighbours for each sample, for a shuffle among these
        storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
    )
    for batch in litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS):
        yield batch["sample_id"], batch["latent"]


WRITERS = {"webdataset": write_webdataset, "mds": write_mds, "litdata": write_litdata}
READERS = {"webdataset": read_webdataset, "mds": read_mds, "litdata": read_litdata}
MODULES = {"webdataset": "webdataset", "mds": "streaming", "litdata": "litdata"}
PACKAGES = {"webdataset": "webdataset", "mds": "mosaicml-streaming", "litdata": "litdata"}


def split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def s3_client() -> Any:
    import boto3
    from botocore.config import Config

    # Path style: a bucket is no host name at a local server.
    return boto3.client("s3", config=Config(signature_version="s3v4", s3={"addressing_style": "path"}))


def upload(source: Path, uri: str) -> None:
    client, (bucket, prefix) = s3_client(), split(uri)
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(source)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=READERS)
    parser.add_argument("--what", choices=("read", "write"), required=True)
    parser.add_argument("--uri", required=True, help="s3://bucket/key")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--local", type=Path, required=True, help="an empty directory for copies on disk")
    arguments = parser.parse_args()
    # This directory has a streaming.py of its own, which is not mosaicml-streaming.
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
    uri, rows, local = arguments.uri, arguments.rows, arguments.local
    if arguments.what == "write":
        WRITERS[arguments.system](local, rows)
        upload(local, uri)
        result: dict[str, Any] = {"samples": rows}
    else:
        load(arguments.system)  # before the time is taken
        result = consume(lambda: READERS[arguments.system](uri, rows, local))
    result["version"] = importlib.metadata.version(PACKAGES[arguments.system])
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
