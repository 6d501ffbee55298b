"""What a worker's thread needs before it touches torch."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

from ..stages.work import Environment

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare_thread(environment: Environment) -> None:
    """Torch's threads for this task, so that workers times threads stay within the cores; no gradients; a stream."""
    import torch

    from ..formats.scratch import set_tile

    keep_freed_memory()
    set_tile(environment.chunk_bytes // 16)
    torch.set_grad_enabled(False)
    if torch.get_num_threads() != environment.threads:  # on a GPU too: small factorizations are made on the CPU
        torch.set_num_threads(environment.threads)
    if environment.device == "cpu":
        return
    torch.cuda.set_device(environment.device if ":" in environment.device else 0)
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.set_stream(torch.cuda.Stream())


@cache
def keep_freed_memory() -> None:
    """Lets glibc reuse buffers of a few megabytes instead of returning them to the system after every operation.

    Otherwise each temporary of a chunk is mapped and faulted in anew (measured: 640,000 page faults instead of 13,000
    in a 2 GB NVFP4 conversion), and threads queue for the address space. Elsewhere than on Linux nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 64 << 20)
