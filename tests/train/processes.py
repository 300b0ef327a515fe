"""Several processes that train together, without Ray.

They start once, which takes longer than most of what they are asked for, and run one function after the other.
"""

import functools
import gc
import multiprocessing.connection
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import cpuinfo
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Workers:
    """`count` processes of one group that compute with one thread each, on CPUs, through gloo.

    They start when they are first asked, and anew after `close` or an error.
    """

    def __init__(self, count: int, **environment: str) -> None:
        self.count, self.environment = count, environment
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)` returns, by rank.

        Raises:
            RuntimeError: with the traceback of the first process that failed.
        """
        if not self._processes:
            self._start()
        results: dict[Connection, Any] = {}
        try:
            for connection in self._connections:
                # Not `send`: torch would hand tensors over in shared memory, which ends with the process.
                connection.send_bytes(pickle.dumps((function, arguments)))
            while len(results) < self.count:
                # After an error the others may wait for that process for ever.
                for ready in multiprocessing.connection.wait(set(self._connections) - results.keys()):
                    assert isinstance(ready, Connection)
                    failure, results[ready] = pickle.loads(ready.recv_bytes())
                    if failure:
                        raise RuntimeError(failure)
        except BaseException:
            self.close()
            raise
        return [results[connection] for connection in self._connections]

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            environment = self.environment | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.count), "DS_ACCELERATOR": "cpu",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            process = context.Process(target=_serve, args=(rank, self.count, environment, theirs), daemon=True)
            process.start()
            theirs.close()  # or the end of the process would not be seen
            self._connections.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._connections = [], []


def _serve(rank: int, count: int, environment: dict[str, str], connection: Connection) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count)
    # Each of DeepSpeed's CPU optimizers asks for the processor's vendor, which starts a process that takes a second.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # DeepSpeed collects garbage when it builds an engine; the libraries' million objects take half a second.
        gc.freeze()
        try:
            answer = "", function(rank, *arguments)
        except BaseException:
            answer = f"worker {rank} of {count}:\n{traceback.format_exc()}", None
        connection.send_bytes(pickle.dumps(answer))
