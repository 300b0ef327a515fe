"""Several processes that train together, without Ray."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def join(rank: int, count: int, port: int) -> None:
    """Make this process one of `count` that compute with one thread each, on CPUs, through gloo."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count)


def start(worker: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `worker(rank, port, *arguments)` in `count` new processes, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(worker, args=(port, *arguments), nprocs=count, start_method="spawn")
