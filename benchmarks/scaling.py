"""One conversion on 1, 2, 4 ... GPUs (or worker processes): time, equal bytes, busy share, memory, storage rates.

    python benchmarks/scaling.py --gb 24 --gpus 1,2,4 --folder /dev/shm --json scaling.json
    python benchmarks/scaling.py --gb 0.05 --device cpu --workers 1,2        # on any machine
    python benchmarks/scaling.py --gb 24 --gpus 1,2,4 --apart                # GPUs that share nothing but the host

The checkpoint (layers like Flux's: 3072 x 3072 to 12288 x 3072, BF16) is made once in ``--folder`` and stays there
with --keep. Each conversion is a process of its own that sees so many GPUs by CUDA_VISIBLE_DEVICES. Work begins when
the worker processes are there (one GPU needs none) and ends with the commit; steady is what lies between the first
receipt and the last. The storage rate is that of the same folder: as many bytes as the output has are written and
synced, and the source is read, by as many threads as ``--threads``. A run that would begin after ``--seconds`` is left
out.

With ``--apart`` so many conversions of one GPU each run at once, each of its share of the bytes: what they lose against
one alone is the host's doing, not that of a run on several. ``--scheduler distributed`` gives one GPU a worker process,
too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash

BLOCK = 16 << 20
LAYER = (
    ("attn.to_q", 1, 1), ("attn.to_k", 1, 1), ("attn.to_v", 1, 1), ("attn.to_out", 1, 1), ("mlp.up", 4, 1),
    ("mlp.down", 1, 4),
)  # fmt: skip
"""A block's linear layers: rows and columns in widths of the model."""
CHILD = """
import json, logging, sys, time
from quantloom import Pipeline

class Clock(logging.Handler):
    ready = 0.0

    def emit(self, record):
        if "tasks at a time" in record.msg or record.msg == "workers are ready":
            self.ready = time.perf_counter()

class Times:
    def __init__(self):
        self.receipts = []

    def advance(self, receipts):
        self.receipts.append(time.perf_counter())

    def start(self, plan, budget): ...
    def resume(self, receipts): ...
    def stop(self): ...

def main():
    source, output, rounding, run, shard_size = json.loads(sys.argv[1])
    clock, times = Clock(), Times()
    logging.getLogger("quantloom.flow").addHandler(clock)
    logging.getLogger("quantloom.flow").setLevel(logging.INFO)
    began = time.perf_counter()
    quantized = Pipeline(**run).read(source).quantize("nvfp4", rounding=rounding)
    flow = quantized.write(output, overwrite=True, compute=False, shard_size=shard_size)
    report = flow.compute(progress=times)
    ended = time.perf_counter()
    print(json.dumps({"seconds": report.seconds, "work": ended - clock.ready, "first": times.receipts[0] - clock.ready,
                      "last": times.receipts[-1] - clock.ready}))

if __name__ == "__main__":
    main()
"""


def make_source(path: Path, gigabytes: float, width: int, device: str) -> None:
    """A checkpoint of about this size; random numbers come from ``device`` in blocks of a layer."""
    per_block = sum(rows * columns for _, rows, columns in LAYER) * width * width * 2
    count = max(1, round(gigabytes * 1e9 / per_block))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place, shapes = 0, []
    for block in range(count):
        for name, rows, columns in LAYER:
            shape = (rows * width, columns * width)
            size = math.prod(shape) * 2
            key = f"transformer_blocks.{block}.{name}.weight"
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
            shapes.append(shape)
            place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator(device).manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes:
            weight = torch.randn(shape, generator=generator, device=device).mul_(0.02).bfloat16()
            file.write(weight.view(torch.uint8).cpu().numpy().data)
    if device == "cuda":
        torch.cuda.empty_cache()


def digest(path: Path) -> str:
    """xxh3 of a file, or of all files of a folder."""
    made, buffer = xxhash.xxh3_128(), bytearray(BLOCK)
    for each in sorted(path.iterdir()) if path.is_dir() else [path]:
        with each.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                made.update(memoryview(buffer)[:count])
    return made.hexdigest()


def storage_rates(source: Path, folder: Path, nbytes: int, threads: int) -> tuple[float, float]:
    """GB/s of reading the source, and of writing ``nbytes`` and syncing them, each by ``threads`` threads."""
    size = source.stat().st_size

    def read(start: int) -> None:
        buffer = bytearray(BLOCK)
        with source.open("rb", buffering=0) as file:
            for place in range(start * BLOCK, size, threads * BLOCK):
                file.seek(place)
                file.readinto(buffer)

    target = folder / "rate.bin"
    content = os.urandom(BLOCK)

    def write(start: int) -> None:
        with target.open("r+b", buffering=0) as file:
            for place in range(start * BLOCK, nbytes, threads * BLOCK):
                file.seek(place)
                file.write(content[: min(BLOCK, nbytes - place)])
            os.fsync(file.fileno())

    rates = []
    target.touch()
    for work, total in ((read, size), (write, nbytes)):
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
        rates.append(total / (time.perf_counter() - began) / 1e9)
    target.unlink()
    return rates[0], rates[1]


class Sampler(threading.Thread):
    """Watches a process and its children, and the GPUs, every 200 ms."""

    def __init__(self, process: int, gpus: int) -> None:
        super().__init__(daemon=True)
        self.root, self.gpus, self.over = psutil.Process(process), gpus, threading.Event()
        self.busy: list[list[float]] = []
        self.resident: dict[int, int] = {}
        self.device: dict[int, int] = {}

    def run(self) -> None:
        while not self.over.wait(0.2):
            try:
                for process in (self.root, *self.root.children(recursive=True)):
                    self.resident[process.pid] = max(self.resident.get(process.pid, 0), process.memory_info().rss)
            except psutil.Error:
                continue
            if self.gpus:
                self.busy.append([float(words[0]) for words in smi("--query-gpu=utilization.gpu")][: self.gpus])
                for process, used in smi("--query-compute-apps=pid,used_memory"):
                    self.device[int(process)] = max(self.device.get(int(process), 0), int(float(used)) << 20)

    def result(self) -> dict[str, Any]:
        self.over.set()
        self.join()
        shares = [round(sum(column) / len(self.busy) / 100, 3) for column in zip(*self.busy, strict=False)]
        return {"busy": shares, "resident": sorted(self.resident.values(), reverse=True),
                "device": sorted(self.device.values(), reverse=True)}  # fmt: skip


def smi(query: str) -> list[list[str]]:
    """Rows of what nvidia-smi answers; none where it cannot (in a container it may not see processes)."""
    done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True)
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if all(word.replace(".", "").isdigit() for word in row)]


def options(count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the pipeline, for so many GPUs or workers."""
    run: dict[str, Any] = {"workers": count, "scheduler": "distributed"}
    if arguments.device != "cpu":
        run = {"device": "cuda"} | ({"workers": arguments.tasks} if arguments.tasks else {})
        run |= {"scheduler": arguments.scheduler} if arguments.scheduler else {}
    return run | ({"memory": arguments.memory} if arguments.memory else {})


def begin(source: Path, output: Path, rounding: str, run: dict[str, Any], gpus: list[int],
          arguments: argparse.Namespace) -> subprocess.Popen[str]:  # fmt: skip
    """One conversion in a process of its own, which sees these GPUs."""
    environment = dict(os.environ)
    if arguments.device != "cpu":
        outer = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = outer.split(",") if outer else [str(index) for index in range(max(gpus) + 1)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[index] for index in gpus)
    script = output.with_name("child.py")
    script.write_text(CHILD)
    given = json.dumps([str(source), str(output), rounding, run, arguments.shard_size])
    words = [sys.executable, str(script), given]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told_by(process: subprocess.Popen[str]) -> dict[str, float]:
    printed, problems = process.communicate()
    if process.returncode:
        raise SystemExit(problems[-2000:])
    told: dict[str, float] = json.loads(printed.splitlines()[-1])
    return told


def convert(source: Path, output: Path, rounding: str, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One conversion on so many, or with ``--apart`` so many of one each, of which the slowest counts."""
    began = time.perf_counter()
    if arguments.apart:
        outputs = [output.with_name(f"{number}-{output.name}") for number in range(count)]
        run = options(1, arguments)
        running = [begin(source, each, rounding, run, [number], arguments) for number, each in enumerate(outputs)]
    else:
        outputs, run = [output], options(count, arguments)
        running = [begin(source, output, rounding, run, list(range(count)), arguments)]
    samplers = [Sampler(process.pid, 0 if arguments.device == "cpu" or number else count)
                for number, process in enumerate(running)]  # fmt: skip
    for sampler in samplers:
        sampler.start()
    told = [told_by(process) for process in running]
    seconds = round(time.perf_counter() - began, 3)
    sampled = [sampler.result() for sampler in samplers]
    slowest = {key: max(each[key] for each in told) for key in told[0]}
    digests = {digest(each) for each in outputs}
    for each in outputs:
        each.unlink() if each.is_file() else shutil.rmtree(each)
    return {"rounding": rounding, "count": count, "process_seconds": seconds,
            "seconds": slowest["seconds"], "work": round(slowest["work"], 3),
            "first_receipt": round(slowest["first"], 3), "last_receipt": round(slowest["last"], 3),
            "steady": round(max(each["last"] - each["first"] for each in told), 3), "busy": sampled[0]["busy"],
            "resident": [used for each in sampled for used in each["resident"]],
            "device": [used for each in sampled for used in each["device"]],
            "digest": "".join(digests) if len(digests) == 1 else "differ"}  # fmt: skip


def show(rows: list[dict[str, Any]], source_bytes: int) -> None:
    """A table; speed is against the smallest count of the same rounding."""
    print("\n| rounding | count | s | of it work | of it steady | source GB/s | speed | speed of work | steady speed | "
          "busy | largest RSS MB | GPU MB per process | equal bytes |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        base = first.setdefault(row["rounding"], row)
        speed = base["seconds"] / row["seconds"]
        cells = [
            row["rounding"], row["count"], f"{row['seconds']:.2f}", f"{row['work']:.2f}", f"{row['steady']:.2f}",
            f"{source_bytes / row['work'] / 1e9:.2f}", f"{speed:.2f}", f"{base['work'] / row['work']:.2f}",
            f"{base['steady'] / max(row['steady'], 1e-9):.2f}",
            " ".join(f"{share:.0%}" for share in row["busy"]) or "-",
            " ".join(f"{used / 1e6:.0f}" for used in row["resident"][: row["count"] + 1]),
            " ".join(f"{used / 1e6:.0f}" for used in row["device"]) or "-", row["equal"],
        ]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=24)
    parser.add_argument("--width", type=int, default=3072, help="of the model; 256 for tiny checkpoints")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--gpus", default="1,2,4", help="how many GPUs, in this order")
    parser.add_argument("--workers", default="1,2", help="how many worker processes, with --device cpu")
    parser.add_argument("--apart", action="store_true", help="separate conversions, one for each GPU")
    parser.add_argument("--scheduler", help="of conversions on GPUs; default: threads for one, else distributed")
    parser.add_argument("--tasks", type=int, help="tasks at a time of each GPU")
    parser.add_argument("--shard-size", help="write a folder of files of this size: a file takes one writer at a time")
    parser.add_argument("--memory", help="memory budget of each run")
    parser.add_argument("--roundings", default="learned,mse,nearest")
    parser.add_argument("--folder", help="where to generate and write; default: the system's temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the source for the next call, or take the one there")
    parser.add_argument("--threads", type=int, default=8, help="threads that measure the storage")
    parser.add_argument("--seconds", type=float, default=570, help="no run begins later than this")
    parser.add_argument("--json", help="where results go as JSON")
    arguments = parser.parse_args()
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="scaling-"))
    source = folder.parent / f"scaling-{arguments.gb:g}-{arguments.width}.safetensors"
    counts = [int(word) for word in (arguments.gpus if arguments.device == "cuda" else arguments.workers).split(",")]
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"argv": sys.argv[1:], "rows": rows}
    try:
        if not source.exists():
            make_source(source, arguments.gb, arguments.width, arguments.device)
        size = source.stat().st_size
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{os.cpu_count()} CPUs"
        result |= {"device": name, "torch": torch.__version__, "source_bytes": size,
                   "made_in": round(time.perf_counter() - began, 1)}  # fmt: skip
        read, write = storage_rates(source, folder, size * 9 // 32, arguments.threads)
        result |= {"read_gb_s": read, "write_gb_s": write}
        print(f"{name}, torch {torch.__version__}, {os.cpu_count()} cores; source {size / 1e9:.2f} GB")
        rates = f"read {read:.2f} GB/s, write and sync {write:.2f} GB/s"
        print(f"storage, {arguments.threads} threads: {rates}", flush=True)
        seen: dict[str, str] = {}
        for rounding in arguments.roundings.split(","):
            for count in counts:
                if time.perf_counter() - began > arguments.seconds:
                    print(f"left out for want of time: {rounding} on {count}")
                    continue
                output = folder / ("out.safetensors" if arguments.shard_size is None else "out")
                part = source
                if arguments.apart and count > 1:
                    part = folder / f"{count}.safetensors"
                    make_source(part, arguments.gb / count, arguments.width, arguments.device)
                row = convert(part, output, rounding, count, arguments)
                same = f"{rounding} of {part.name}"
                row["equal"] = row["digest"] != "differ" and seen.setdefault(same, row["digest"]) == row["digest"]
                rows.append(row)
                ends = f"receipts from {row['first_receipt']:.2f} to {row['last_receipt']:.2f} of {row['work']:.2f} s"
                print(f"{rounding} on {count}: {row['seconds']:.2f} s, {ends}, equal bytes: {row['equal']}", flush=True)
        show(rows, size)
        ideal = size / read / 1e9 + size * 9 / 32 / write / 1e9
        print(f"\nstorage alone, reading then writing: {ideal:.2f} s; overlapped: "
              f"{max(size / read, size * 9 / 32 / write) / 1e9:.2f} s")  # fmt: skip
    finally:
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(result, indent=1))
        shutil.rmtree(folder)
        if not arguments.keep:
            source.unlink(missing_ok=True)
    if not all(row["equal"] for row in rows):
        raise SystemExit("bytes differ")


if __name__ == "__main__":
    main()
