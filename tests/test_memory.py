"""The memory budget, and the promise that a checkpoint of any size converts within it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoints import FORMATS, benchmark, child, make_tensors, write_file

from quantloom import Pipeline
from quantloom.flow import budget
from quantloom.flow.budget import CPU_CHUNK_BYTES, Budget, cores, free_memory, make_budget
from quantloom.flow.plan import Plan
from quantloom.flow.recipe import Run
from quantloom.formats import comfy
from quantloom.formats.errors import PlanError
from quantloom.formats.heads import layout
from quantloom.formats.registry import make_format
from quantloom.formats.tensors import TensorSpec

MB = 10**6


def plan_of(source: Path, **options: Any) -> Plan:
    return Pipeline().read(source).stage("quantize", **options).write("out.safetensors", compute=False).plan


@pytest.fixture
def wide(tmp_path: Path) -> Plan:
    """A layer with long rows, so that chunks are not small whatever their size in rows."""
    tensors = {**make_tensors(), "wide.weight": torch.zeros(64, 65536, dtype=torch.bfloat16)}
    return plan_of(write_file(tmp_path / "in.safetensors", tensors), format="nvfp4")


# -- the budget --------------------------------------------------------------------------------------------------------


def test_half_of_what_is_free(wide: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda: 4000 * MB)
    made = make_budget(wide.layers, Run(), "")
    assert made.limit == made.base + 2000 * MB
    assert made.base == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert make_budget(wide.layers, Run(memory=3000 * MB), "").limit == 3000 * MB


VERSIONS = [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")]


@pytest.mark.parametrize("names", VERSIONS)
def test_the_limit_of_a_container_counts(names: tuple[str, str], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(budget, "_CGROUPS", ((tmp_path, *names),))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 50_000 * MB}))

    def write(limit: object, used: object, stat: str | None = "anon 5\n") -> None:
        (tmp_path / names[0]).write_text(f"{limit}\n")
        (tmp_path / names[1]).write_text(f"{used}\n")
        (tmp_path / "memory.stat").unlink(missing_ok=True)
        if stat is not None:
            (tmp_path / "memory.stat").write_text(stat)

    write(2000 * MB, 500 * MB)
    assert free_memory() == 1500 * MB
    write(2000 * MB, 500 * MB, None)
    assert free_memory() == 1500 * MB
    write(2000 * MB, 1900 * MB, f"anon 5\ninactive_file {1000 * MB}\nactive_file {500 * MB}\n")
    assert free_memory() == 1600 * MB  # what the page cache holds is given back on demand
    write(2000 * MB, 2100 * MB)
    assert free_memory() == 0
    write("max", 500 * MB)
    assert free_memory() == 50_000 * MB
    write(10**18, 500 * MB)
    assert free_memory() == 50_000 * MB
    (tmp_path / names[0]).unlink()
    assert free_memory() == 50_000 * MB


def base_bytes() -> int:
    """What a budget takes for the process before any work."""
    return psutil.Process().memory_info().rss + budget._STARTUP_BYTES


def test_a_layer_that_cannot_fit_is_refused_before_work(wide: Plan) -> None:
    base = base_bytes()
    with pytest.raises(PlanError) as caught:
        make_budget(wide.layers, Run(memory=base + 100_000), "")
    found = re.fullmatch(
        r"wide needs ([\d.]+ .B) at a time, beside ([\d.]+ .B) that the process itself holds: ([\d.]+ .B) do not fit "
        r"in the memory budget of ([\d.]+ .B); raise --memory",
        str(caught.value),
    )
    assert found, str(caught.value)
    assert float(found[3].split()[0]) >= float(found[4].split()[0])


def test_chunks_shrink_before_a_layer_is_refused(wide: Plan) -> None:
    base = base_bytes()
    roomy = make_budget(wide.layers, Run(memory=base + 2000 * MB, workers=1), "")
    assert roomy.environment.chunk_bytes == CPU_CHUNK_BYTES
    tight = make_budget(wide.layers, Run(memory=base + roomy.task_bytes // 2), "")
    assert tight.environment.chunk_bytes < roomy.environment.chunk_bytes
    assert tight.task_bytes < roomy.task_bytes
    assert tight.workers == 1


def test_workers_follow_from_the_budget(wide: Plan) -> None:
    roomy = make_budget(wide.layers, Run(memory=10**12), "")
    assert roomy.workers == cores()
    crowd = make_budget(wide.layers, Run(memory=10**12, workers=100), "")
    assert crowd.environment.chunk_bytes > CPU_CHUNK_BYTES  # many threads on small chunks wait for Python's lock
    base = base_bytes()
    for workers in (1, 2, 5):
        room = base + int(crowd.task_bytes * (workers + 0.5))
        assert make_budget(wide.layers, Run(memory=room, workers=100), "").workers == workers
    assert make_budget(wide.layers, Run(memory=10**12, workers=3), "").workers == 3
    assert roomy.workers * roomy.environment.threads <= max(cores(), roomy.workers)


def test_processes_of_a_local_cluster_count_each(wide: Plan) -> None:
    base = base_bytes()
    run = Run(memory=base * 4, scheduler="distributed", workers=50)
    made = make_budget(wide.layers, run, "")
    assert made.workers in (2, 3)
    assert made.peak_bytes <= made.limit
    with pytest.raises(PlanError, match="do not fit in the memory budget"):
        make_budget(wide.layers, Run(memory=base + base // 2, scheduler="distributed"), "")


def test_the_peak_stays_within_the_limit(wide: Plan) -> None:
    base = base_bytes()
    for extra in (20, 50, 200, 2000):
        made = make_budget(wide.layers, Run(memory=base + extra * MB), "")
        assert isinstance(made, Budget)
        assert made.peak_bytes == made.base + made.workers * made.task_bytes <= made.limit


@pytest.mark.parametrize("name", FORMATS)
def test_every_step_says_what_it_needs(name: str, tmp_path: Path) -> None:
    """Smaller chunks need less, and no step needs the whole tensor."""
    plan = plan_of(write_file(tmp_path / "in.safetensors", {"a.weight": torch.zeros(2048, 256)}), **FORMATS[name])
    environment = make_budget(plan.layers, Run(), "").environment
    (layer,) = plan.layers
    needs = [layer.peak_bytes(type(environment)(chunk_bytes=size)) for size in (64 << 10, 256 << 10, 1 << 20)]
    assert needs == sorted(needs)
    assert needs[0] < needs[-1]
    assert all(step.memory(layer, environment) >= 0 for step in layer.steps)


# -- the promise -------------------------------------------------------------------------------------------------------

_LIMITED = """
import json, resource, sys

import torch
import quantloom.flow.cli, quantloom.flow.execute, quantloom.flow.report
import dask.threaded, rich.table

def held():
    with open("/proc/self/status") as file:
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith("Vm")}

room, arguments = json.loads(sys.argv[1]), sys.argv[2:]
before = held()
for name, kind in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
    if room.get(name):
        limit = before[kind] + room[name]
        resource.setrlimit(getattr(resource, name), (limit, limit))
try:
    bytearray(max(room.values()))
except MemoryError:
    pass
else:
    sys.exit("the limit is not in force")
try:
    quantloom.flow.cli.main(arguments)
finally:
    after = held()
    print(json.dumps({"before": before, "after": after}), file=sys.stderr)
"""


def convert_within(room: dict[str, int], source: Path, output: Path, *options: str) -> dict[str, Any]:
    """Converts in a process that may grow by ``room`` bytes only, once its libraries are loaded."""
    return run_within(room, "convert", str(source), str(output), *options)


def run_within(room: dict[str, int], *command: str) -> dict[str, Any]:
    """Runs a command in a process that may grow by ``room`` bytes only, once its libraries are loaded."""
    done = child("-c", _LIMITED, json.dumps(room), *command, "--workers", "1", "--quiet", MALLOC_ARENA_MAX="1",
                 OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # fmt: skip
    assert done.status == 0, done.err
    return json.loads(done.err.splitlines()[-1])  # type: ignore[no-any-return]


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="address-space limits and /proc are Linux's")


@needs_linux
def test_a_tensor_larger_than_the_budget(tmp_path: Path) -> None:
    """One weight of 512 MB; the process may grow by 64 MB."""
    head, _, size = layout([TensorSpec("wide.weight", "BF16", (16384, 16384))], {})
    source = tmp_path / "in.safetensors"
    with source.open("wb") as file:
        file.write(head)
        file.truncate(size)  # zeros that take no disk
    room = {"RLIMIT_AS": 128 * MB, "RLIMIT_DATA": 64 * MB}
    found = convert_within(room, source, tmp_path / "out.safetensors", "--format", "fp8", "--rounding", "nearest")
    assert found["after"]["VmHWM"] - found["before"]["VmRSS"] < 96 * MB
    assert (tmp_path / "out.safetensors").stat().st_size > size / 2
    source.unlink()
    (tmp_path / "out.safetensors").unlink()


STORED = {
    "dequantize": ("fp8", "--dtype", "f16"), "migrate": ("fp8", "--to", "legacy"),
    "edit": ("fp8", "--add", "full_precision_matrix_mult=true"),
    "calibrate-activations": ("fp8", "--input-scales", "scales.json"),
    "hybrid": ("mxfp8",), "hybrid of mode legacy": ("mxfp8", "--mode", "legacy"),
}  # fmt: skip


@needs_linux
@pytest.mark.parametrize("name", STORED)
def test_a_quantized_tensor_larger_than_the_budget(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of 134 MB; the process may grow by 64 MB."""
    monkeypatch.chdir(tmp_path)
    kind, *options = STORED[name]
    write_zeros(tmp_path / "in.safetensors", kind)
    (tmp_path / "scales.json").write_text('{"wide": 0.5}')
    room = {"RLIMIT_AS": 128 * MB, "RLIMIT_DATA": 64 * MB}
    found = run_within(room, name.split()[0], "in.safetensors", "out.safetensors", *options)
    assert found["after"]["VmHWM"] - found["before"]["VmRSS"] < 96 * MB
    assert (tmp_path / "out.safetensors").stat().st_size > 134 * MB
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()


def write_zeros(path: Path, kind: str) -> None:
    """One quantized layer of zeros, whose codes take no disk."""
    storage = comfy.storage("wide", (8192, 16384), make_format(kind), comfy.LayerOptions())
    marker, content = storage.constants[0]
    specs = [storage.codes, storage.scales, marker]
    head, starts, size = layout(specs, {})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
        file.seek(starts[2])
        file.write(content)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of more than 2 GB, removed at the end."""
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < 5 * 10**9:
        pytest.skip("needs 5 GB of free disk")
    module = benchmark("make_checkpoint")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads that wait for each other take ten times as long
    module.make_checkpoint(folder / "model", arch="flux", gb=2.1)
    torch.set_num_threads(threads)
    yield folder
    shutil.rmtree(folder)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_two_gigabytes_in_a_fraction_of_it(name: str, large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The limits are on what the process adds to its libraries, whose own size differs from build to build."""
    source, output = large / "model" / "model.safetensors", large / f"{name}.safetensors"
    size = source.stat().st_size
    assert size > 2 * 10**9
    room = {"RLIMIT_AS": 192 * MB, "RLIMIT_DATA": 96 * MB}
    found = convert_within(room, source, output, "--format", name, "--rounding", "nearest")
    grown = found["after"]["VmHWM"] - found["before"]["VmRSS"]
    with capsys.disabled():
        peaks = {key: f"{found['after'][key] / MB:.0f} MB" for key in ("VmHWM", "VmPeak", "VmData")}
        print(f"\n{name}: {size / 1e9:.2f} GB converted; peak {peaks}, {grown / MB:.0f} MB of it beside the libraries")
    assert grown < size / 15
    assert 0.25 * size < output.stat().st_size < 0.6 * size
    output.unlink()
