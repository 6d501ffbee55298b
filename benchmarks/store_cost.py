"""What a Zarr store between workers and files costs: converting into files, and into a store that is then assembled.

    python benchmarks/store_cost.py --gb 1 --formats fp8,nvfp4 [--folder /storage/to/measure] [--rounds 3]

CPU seconds are those of this process with everything synced, imports excluded; the figure is the median of the rounds.
The last line compresses chunks as they are stored with zstd, as Zarr would by default.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from make_checkpoint import make_checkpoint

from quantloom import Pipeline
from quantloom.flow.assemble import assemble
from quantloom.flow.budget import peak_memory


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def compressed(store: Path) -> tuple[float, float]:
    """Bytes per byte, and seconds per GB, of zstd (level 0, Zarr's default) on the largest chunks of a store."""
    from numcodecs import Zstd

    chunks = sorted(store.rglob("c/*"), key=lambda path: -path.stat().st_size)[:16]
    contents = [path.read_bytes() for path in chunks]
    before = sum(map(len, contents))
    began = time.process_time()
    after = sum(len(Zstd(level=0).encode(content)) for content in contents)
    return after / before, (time.process_time() - began) / before * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--formats", default="fp8,nvfp4")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source = folder / "source"
        make_checkpoint(source, gb=options.gb)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e9
        for form in options.formats.split(","):
            quantized = Pipeline(workers=2).read(source).quantize(form, rounding="nearest")
            rows: dict[str, list[tuple[float, float]]] = {"files": [], "store": [], "assemble": []}
            for _ in range(options.rounds):
                store = folder / "out.zarr"
                rows["files"].append(timed(lambda: quantized.write(folder / "direct")))  # noqa: B023
                rows["store"].append(timed(lambda: quantized.write(store)))  # noqa: B023
                peaks = [peak_memory()]
                rows["assemble"].append(timed(lambda: assemble(str(store), str(folder / "made"))))  # noqa: B023
                peaks.append(peak_memory())
                ratio, seconds = compressed(store)
                for made in ("direct", "made", "out.zarr"):
                    shutil.rmtree(folder / made)
            median = {}
            for what, found in rows.items():
                cpu, wall = median[what] = [statistics.median(each) for each in zip(*found, strict=True)]
                print(f"{form:8s} {what:8s} {cpu / size:6.2f} CPU s/GB {wall / size:6.2f} s/GB")
            both = median["store"][0] + median["assemble"][0]
            print(f"{form:8s} store and assembly / files: {both / median['files'][0]:.2f} of the CPU time")
            print(f"{form:8s} zstd of chunks: {ratio:.1%} of the bytes, {seconds:.2f} CPU s/GB of output")
            before, after = (round(peak / 1e6) for peak in peaks)
            print(f"{form:8s} peak memory so far, MB: {before} before the last assembly, {after} after it")


if __name__ == "__main__":
    main()
