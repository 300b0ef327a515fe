"""Network file systems: which paths lie on one, and how weights there are read.

A memory-mapped file is fetched by page faults, a few kilobytes at a time in no order: on NFS, Lustre or FUSE, that is
slower than reading by an order of magnitude and more (safetensors' issue 562). On local disks mapping is best: it
copies nothing. Reading takes memory for the file's bytes, twice for a moment, until the network has taken them over.
"""

import logging
import os
import re
from pathlib import Path
from typing import Literal, TypedDict

logger = logging.getLogger(__name__)

NETWORK = re.compile(
    r"nfs4?|lustre|cifs|smb[23]?|smbfs|9p|virtiofs|ceph|gpfs|beegfs(_nodev)?|wekafs|afs|gfs2?|ocfs2|orangefs|pvfs2"
    r"|panfs|fuse(\..+)?"
)
"""Types of file systems whose files lie on other machines, as Linux names them; FUSE's are seldom local."""
LOCAL = ("fuse.fuse-overlayfs", "fuse.overlayfs")
"""Layers of a container's own files."""


class HowToRead(TypedDict):
    """Arguments of `from_pretrained`, of diffusers and of transformers."""

    disable_mmap: bool


def network_type(path: Path) -> str:
    """The type of the network file system that holds `path`, e.g. "nfs4"; empty if it is a local one."""
    import psutil  # whoever looks at no local path has no need for it

    place = Path(os.path.realpath(path))
    mounts = [each for each in psutil.disk_partitions(all=True) if place.is_relative_to(each.mountpoint)]
    if not mounts:
        return ""
    # Of several at one place, the last one covers those before it.
    kind = max(enumerate(mounts), key=lambda one: (len(Path(one[1].mountpoint).parts), one[0]))[1].fstype
    return kind if NETWORK.fullmatch(kind) and kind not in LOCAL else ""


def read_or_map(directory: Path) -> HowToRead:
    """How `from_pretrained` gets at the weights in a directory."""
    return {"disable_mmap": bool(_told(directory))}


def backend(file: Path) -> Literal["pread", "mmap"]:
    """How safetensors gets at the tensors of a file."""
    return "pread" if _told(file) else "mmap"


def _told(path: Path) -> str:
    """`network_type`, with a line in the log when there is one."""
    if kind := network_type(path):
        logger.info("%s lies on a network file system (%s): its weights are read instead of memory-mapped", path, kind)
    return kind
