#!/usr/bin/env python3
"""The cascade kernel on one NVIDIA GPU: microseconds for a block of columns, by the shape of its programs.

    python benchmarks/cascade_cuda.py [--columns 512] [--rows 3072,12288,21504]

Each line is a shape: rows and warps of a program, and the moves that a product takes at a time. The product's own is
marked. FP8 with row scales; every shape is compiled before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from measure import table

from quantloom.formats.registry import make_format
from quantloom.stages.scale_search import Scaling

SHAPES = ((16, 1, 16), (16, 1, 128), (16, 2, 128), (32, 1, 64), (32, 1, 128), (32, 2, 128), (32, 4, 128), (64, 4, 128))
ROWS = (3072, 5461, 12288, 21504)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The cascade kernel by the shape of its programs.")
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    args = parser.parse_args(argv)
    import triton

    from quantloom.stages import kernels_cascade

    format, own = make_format("fp8", "row"), dict(kernels_cascade._PROGRAM)
    rows = [int(count) for count in args.rows.split(",")]
    coupling = torch.randn(args.columns, args.columns, device="cuda") * 0.02
    lines = []
    for count, warps, depth in SHAPES:
        kernels_cascade._PROGRAM.update(R=count, D=depth, num_warps=warps)
        line = [f"{count} rows, {warps} warps, {depth} moves" + (" (own)" if own == kernels_cascade._PROGRAM else "")]
        for many in rows:
            target = torch.randn(args.columns, many, device="cuda")
            origin, moves = target + 0.01, torch.empty_like(target)
            steps = Scaling(format, None).steps(target.abs().amax(0, keepdim=True))
            call = lambda t=target, m=moves, o=origin, s=steps: kernels_cascade.cascade_(  # noqa: E731
                t, m, o, coupling, format.element, s
            )
            line.append(f"{1e3 * triton.testing.do_bench(call, warmup=3, rep=20):.0f}")
        lines.append(line)
    print(f"{torch.cuda.get_device_name()}, {args.columns} columns, microseconds by rows of the weight\n")
    print(table(["program", *map(str, rows)], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
