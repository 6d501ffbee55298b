#!/usr/bin/env python3
"""convert-to-quant's own learned rounding of one matrix, with its command line's defaults.

Runs under the interpreter of its environment (peers.py), or in a process that has its packages on ``sys.path``:

    python rounding_peer.py IN.safetensors OUT_FOLDER --formats "fp8 tensor,nvfp4" [--optimizer prodigy]
        [--lora-rank 32]

IN holds ``weight``. For each format OUT_FOLDER gets ``<format>.safetensors`` with ``codes``, ``scales`` and, for NVFP4,
``whole``, as the program would store them, and with a rank the ``lora_up`` and ``lora_down`` that it extracts, if any;
a line of JSON says how long it took. Imports nothing of quantloom.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

DEFAULTS = {"num_iter": 4000, "top_p": 0.2, "min_k": 256, "max_k": 1280, "lr_schedule": "plateau"}
"""Of its command line, where they differ from those of its classes, or decide what is measured."""
BLOCK = 128


def converter(name: str, optimizer: str, device: str, **options: Any) -> Any:
    """Its class for a format such as ``fp8 row``, ready to convert."""
    shared = {**DEFAULTS, "optimizer": optimizer, "device": device, **options}
    kind, _, scaling = name.partition(" ")
    if kind == "nvfp4":
        from convert_to_quant.converters.learned_nvfp4 import LearnedNVFP4Converter

        return LearnedNVFP4Converter(**shared)
    if kind == "mxfp8":
        from convert_to_quant.converters.learned_mxfp8 import LearnedMXFP8Converter

        return LearnedMXFP8Converter(**shared)
    from convert_to_quant.converters.learned_rounding import LearnedRoundingConverter

    return LearnedRoundingConverter(scaling_mode=scaling, block_size=BLOCK, target_format=kind, **shared)


def convert(weight: torch.Tensor, name: str, optimizer: str = "prodigy", **options: Any) -> dict[str, torch.Tensor]:
    """What it would store for a float32 weight, on the weight's device. Seeded: its subspaces are drawn at random."""
    torch.manual_seed(0)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        made = converter(name, optimizer, str(weight.device), **options).convert(weight, key="layer")
    stored = {"codes": made[0], "scales": made[1]}
    if name == "nvfp4":
        stored["whole"] = made[2]
    stored |= made[-1] if isinstance(made[-1], dict) else {}
    return {key: torch.as_tensor(tensor).detach().contiguous() for key, tensor in stored.items()}


def main(argv: Sequence[str] | None = None) -> int:
    from safetensors.torch import load_file, save_file

    parser = argparse.ArgumentParser(description="Learned rounding of convert-to-quant, format by format.")
    parser.add_argument("weight", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--formats", required=True)
    parser.add_argument("--optimizer", default="prodigy")
    parser.add_argument("--lora-rank", type=int, help="extract an adapter too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    weight = load_file(args.weight)["weight"]
    adapter = {"extract_lora": True, "lora_rank": args.lora_rank, "lora_target": "."} if args.lora_rank else {}
    for name in args.formats.split(","):
        line: dict[str, Any] = {"format": name}
        try:
            convert(weight[:BLOCK, :BLOCK].contiguous(), name, args.optimizer, num_iter=2)  # imports, first calls
            began = time.process_time()
            stored = convert(weight.clone(), name, args.optimizer, **adapter)
            line["seconds"] = time.process_time() - began
            save_file({key: tensor.cpu() for key, tensor in stored.items()}, args.out / f"{name}.safetensors")
        except Exception as error:  # whatever it fails with is the result
            line["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
