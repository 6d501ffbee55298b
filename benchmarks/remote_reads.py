"""What reading ahead brings over HTTP: one conversion by size of blocks, from a server that answers late and slowly.

    python benchmarks/remote_reads.py --mb 128 --seconds 0.04 --rate 80e6
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from quantloom import Pipeline
from quantloom.formats import remote

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CASES = ((0, 1), (1, 3), (4, 3), (8, 1), (8, 2), (8, 3), (8, 4), (16, 2))
"""MiB of a block (0: as it is read), blocks held at a time."""


def serve(folder: Path, seconds: float, rate: float, pipe: Connection) -> None:
    """A server in a process of its own; answers with requests and bytes since the last question."""
    from servers import serving

    with serving(folder) as web:
        web.seconds, web.rate = seconds, rate
        pipe.send(web.url)
        while pipe.recv():
            pipe.send((len(web.requests), web.sent))
            web.requests.clear()
            web.sent = 0


def convert(source: str, output: Path, workers: int) -> float:
    """Seconds of a conversion that reads once."""
    return Pipeline(workers=workers).read(source).quantize("fp8", scaling="row").write(output, overwrite=True).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0.04, help="how long a request waits")
    parser.add_argument("--rate", type=float, default=80e6, help="bytes per second of one connection")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        source = Path(temp) / "in" / "model.safetensors"
        source.parent.mkdir()
        layers = max(1, options.mb // 32)
        save_file({f"blocks.{i}.mlp.weight": torch.randn(4096, 4096).bfloat16() for i in range(layers)}, source)
        ours, theirs = get_context("spawn").Pipe()
        arguments = (source.parent, options.seconds, options.rate, theirs)
        server = get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        server.start()
        url = f"{ours.recv()}/model.safetensors"
        output = Path(temp) / "out.safetensors"
        convert(str(source), output, options.workers)  # warm
        print(f"local: {convert(str(source), output, options.workers):.2f} s\n")
        print("| block, MiB | blocks at a time | seconds | requests | bytes sent / bytes of the file |")
        print("|---|---|---|---|---|")
        for mib, count in CASES:
            blocks = patch.multiple(remote, BLOCK_BYTES=(mib or 8) << 20, BLOCKS_AHEAD=count)
            exact = patch.object(remote.RemoteReader, "announce", lambda *_: None)
            with blocks:
                if mib:
                    seconds = convert(url, output, options.workers)
                else:
                    with exact:
                        seconds = convert(url, output, options.workers)
            ours.send(True)
            requests, sent = ours.recv()
            print(f"| {mib or 'as read'} | {count} | {seconds:.2f} | {requests} | {sent / source.stat().st_size:.3f} |")
        ours.send(False)
        server.join()


if __name__ == "__main__":
    main()
