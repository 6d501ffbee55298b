"""CPU and CUDA conversions of one generated checkpoint: equal bytes, GB/s, and the storage's own rate beside them.

    python benchmarks/cuda.py --gb 8 --device cuda --folder /path/on/the/storage/to/measure
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from make_checkpoint import make_checkpoint

from quantloom import Pipeline

CASES = [
    ("fp8", "tensor", "nearest"), ("fp8", "tensor", "mse"), ("fp8", "row", "nearest"), ("fp8", "row", "mse"),
    ("fp8", "block", "mse"), ("fp8_e5m2", "tensor", "mse"), ("int8", "tensor", "mse"), ("int8", "row", "mse"),
    ("int8", "block", "mse"), ("int8", "rotated", "mse"), ("mxfp8", "group", "mse"),
    ("hybrid_mxfp8", "group", "mse"), ("nvfp4", "group", "nearest"),
    ("nvfp4", "group", "mse"),
]  # fmt: skip


def convert(source: Path, output: Path, case: tuple[str, str, str], device: str) -> float:
    """Seconds of one conversion."""
    name, scaling, rounding = case
    rotate = "hadamard:256" if scaling == "rotated" else None
    pipeline = Pipeline(device=device).read(source).quantize(
        name, scaling="row" if rotate else scaling, rotate=rotate, rounding=rounding
    )
    began = time.perf_counter()
    pipeline.write(output, overwrite=True)
    return time.perf_counter() - began


def storage_rates(source: Path, folder: Path) -> tuple[float, float]:
    """GB/s of reading the source (as warm as the conversions find it) and of writing and syncing as many bytes / 2."""
    buffer = bytearray(16 << 20)
    began = time.perf_counter()
    with source.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    size = source.stat().st_size
    read = size / (time.perf_counter() - began) / 1e9
    target = folder / "rate.bin"
    began = time.perf_counter()
    with target.open("wb", buffering=0) as file:
        for _ in range(size // 2 // len(buffer)):
            file.write(buffer)
        os.fsync(file.fileno())
    write = (size // 2 // len(buffer)) * len(buffer) / (time.perf_counter() - began) / 1e9
    target.unlink()
    return read, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", help="where to generate and write; default: the system's temporary folder")
    parser.add_argument("--only", default="", help="only cases whose name holds this, such as 'nvfp4 group'")
    parser.add_argument("--skip-cpu", action="store_true", help="only time the device")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        make_checkpoint(str(folder / "source"), "flux", arguments.gb, 1, "bf16", 0)
        source = folder / "source" / "model.safetensors"
        size = source.stat().st_size / 1e9
        read, write = storage_rates(source, folder)
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA"
        print(f"{name}, torch {torch.__version__}, {os.cpu_count()} cores, source {size:.2f} GB")
        print(f"storage: read {read:.2f} GB/s (one thread), write and sync {write:.2f} GB/s (one thread)\n")
        print("| format | scaling | rounding | device s | device GB/s | CPU s | CPU GB/s | equal bytes | peak GPU MB |")
        print("|---|---|---|---|---|---|---|---|---|")
        for case in (case for case in CASES if arguments.only in " ".join(case)):
            torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
            on_device, on_cpu = folder / "device.safetensors", folder / "cpu.safetensors"
            seconds = convert(source, on_device, case, arguments.device)
            peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0
            cpu, equal = "- | -", "-"
            if not arguments.skip_cpu:
                cpu_seconds = convert(source, on_cpu, case, "cpu")
                cpu = f"{cpu_seconds:.2f} | {size / cpu_seconds:.2f}"
                equal = str(filecmp.cmp(on_device, on_cpu, shallow=False))
            cells = [*case, f"{seconds:.2f}", f"{size / seconds:.2f}", cpu, equal, f"{peak:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"gb": size}))


if __name__ == "__main__":
    main()
