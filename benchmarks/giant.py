"""Headers of a terabyte: a mixture of experts with real names and shapes, whose weights are holes in sparse files.

Planning reads headers only: such a checkpoint plans like a real one, and takes tens of megabytes on disk. Read as
numbers its weights are zero.

    python benchmarks/giant.py OUT --kind fp8                  # 1 TB, 100,000 tensors, 160 shards, FP8 blocks of 128
    python benchmarks/giant.py OUT --kind bf16 --plan nvfp4    # the same size in bf16, and what planning it costs
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NBYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
BLOCK = 128

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype, shape."""


@dataclass(frozen=True)
class Shape:
    """A mixture of experts in the manner of DeepSeek-V3."""

    layers: int
    experts: int
    hidden: int
    width: int
    """Of one expert."""
    vocabulary: int = 129280
    dense: int = 3
    """Layers at the beginning that have no experts."""


@dataclass(frozen=True)
class Giant:
    """What was made."""

    path: str
    kind: str
    nbytes: int
    tensors: int
    shards: int
    header_bytes: int


def linear(name: str, rows: int, columns: int, kind: str) -> Iterator[Tensor]:
    """A weight, in FP8 with the inverse scales of its blocks."""
    if kind == "bf16":
        yield f"{name}.weight", "BF16", (rows, columns)
        return
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))


def gated(name: str, width: int, hidden: int, kind: str) -> Iterator[Tensor]:
    yield from linear(f"{name}.gate_proj", width, hidden, kind)
    yield from linear(f"{name}.up_proj", width, hidden, kind)
    yield from linear(f"{name}.down_proj", hidden, width, kind)


def block(number: int, shape: Shape, kind: str) -> Iterator[Tensor]:
    """One decoder layer: latent attention, then one MLP or many."""
    name, hidden = f"model.layers.{number}", shape.hidden
    yield f"{name}.input_layernorm.weight", "BF16", (hidden,)
    yield from linear(f"{name}.self_attn.q_a_proj", 1536, hidden, kind)
    yield f"{name}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
    yield from linear(f"{name}.self_attn.q_b_proj", 24576, 1536, kind)
    yield from linear(f"{name}.self_attn.kv_a_proj_with_mqa", 576, hidden, kind)
    yield f"{name}.self_attn.kv_a_layernorm.weight", "BF16", (512,)
    yield from linear(f"{name}.self_attn.kv_b_proj", 32768, 512, kind)
    yield from linear(f"{name}.self_attn.o_proj", hidden, 16384, kind)
    yield f"{name}.post_attention_layernorm.weight", "BF16", (hidden,)
    if number < shape.dense:
        yield from gated(f"{name}.mlp", 18432, hidden, kind)
        return
    yield f"{name}.mlp.gate.weight", "BF16", (shape.experts, hidden)
    yield f"{name}.mlp.gate.e_score_correction_bias", "F32", (shape.experts,)
    yield from gated(f"{name}.mlp.shared_experts", shape.width, hidden, kind)
    for expert in range(shape.experts):
        yield from gated(f"{name}.mlp.experts.{expert}", shape.width, hidden, kind)


def tensors(shape: Shape, kind: str) -> Iterator[Tensor]:
    yield "model.embed_tokens.weight", "BF16", (shape.vocabulary, shape.hidden)
    for number in range(shape.layers):
        yield from block(number, shape, kind)
    yield "model.norm.weight", "BF16", (shape.hidden,)
    yield "lm_head.weight", "BF16", (shape.vocabulary, shape.hidden)


def nbytes(tensor: Tensor) -> int:
    return math.prod(tensor[2]) * NBYTES[tensor[1]]


def fitting_shape(kind: str, gb: float, count: int, experts: int) -> Shape:
    """As many layers as ``count`` tensors need, with experts so wide that they make ``gb`` GB, to 64 columns."""
    hidden = 7168 if kind == "fp8" else 3584
    each = sum(1 for _ in block(3, Shape(4, experts, hidden, 64), kind))
    layers = max(4, math.ceil((count - 3) / each) + 2)  # the dense ones have few
    narrow, wide = (sum(map(nbytes, tensors(Shape(layers, experts, hidden, w), kind))) for w in (64, 128))
    width = 64 * max(1, 1 + round((gb * 1e9 - narrow) / (wide - narrow)))
    return Shape(layers, experts, hidden, width)


def make_giant(
    out: str | Path, kind: str = "fp8", gb: float = 1000, count: int = 100_000, shards: int = 160, experts: int = 256
) -> Giant:
    """Writes headers, an index and config.json into the folder ``out``; the weights are holes of the right size."""
    folder, shape = Path(out), fitting_shape(kind, gb, count, experts)
    folder.mkdir(parents=True, exist_ok=True)
    listed = list(tensors(shape, kind))
    total = sum(map(nbytes, listed))
    names: dict[str, str] = {}
    headers = done = 0
    groups: list[list[Tensor]] = [[]]
    for tensor in listed:
        if groups[-1] and done >= total * len(groups) / shards and len(groups) < shards:
            groups.append([])
        groups[-1].append(tensor)
        done += nbytes(tensor)
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        names.update(dict.fromkeys((name for name, _, _ in group), file))
        headers += write_shard(folder / file, group)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(shape, kind)))
    return Giant(str(folder), kind, total, len(names), len(groups), headers)


def write_shard(path: Path, group: Sequence[Tensor]) -> int:
    """A header, and a hole in place of the weights; returns the header's bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape in group:
        end = start + nbytes((name, dtype, shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    blob = json.dumps(entries, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(blob)) + blob)
        file.truncate(8 + len(blob) + start)
    return 8 + len(blob)


def config(shape: Shape, kind: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers, "n_routed_experts": shape.experts, "moe_intermediate_size": shape.width,
        "first_k_dense_replace": shape.dense, "vocab_size": shape.vocabulary, "torch_dtype": "bfloat16",
    }  # fmt: skip
    if kind == "fp8":
        made["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    return made


PLAN = """
import json, sys, time, torch
from quantloom import Pipeline

pipeline = Pipeline().read(sys.argv[1]).quantize(sys.argv[2])
began = time.process_time()
plan = pipeline.write(sys.argv[3], compute=False).plan
print(json.dumps({"plan": sys.argv[2], "plan_s": round(time.process_time() - began, 2), "layers": len(plan.layers)}))
"""
"""CPU seconds of planning alone; the file or folder is not written."""


def measure(command: Sequence[str], threads: int = 1) -> dict[str, float]:
    """CPU and wall seconds and peak resident MB of a whole process, imports included."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return {
        "cpu_s": round(used.ru_utime + used.ru_stime, 2), "wall_s": round(time.perf_counter() - began, 2),
        "peak_mb": round(used.ru_maxrss * 1024 / 1e6),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--kind", choices=("fp8", "bf16"), default="fp8", help="FP8 in blocks of 128, or bf16")
    parser.add_argument("--gb", type=float, default=1000, help="bytes that the headers promise (default: 1000)")
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=160)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--plan", default="", metavar="FORMATS",
                        help="measure `quantloom plan` for these, with commas, as one file and as shards")  # fmt: skip
    args = parser.parse_args()
    made = make_giant(args.out, args.kind, args.gb, args.tensors, args.shards, args.experts)
    print(json.dumps(asdict(made)))
    for name in filter(None, args.plan.split(",")):
        subprocess.run([sys.executable, "-c", PLAN, args.out, name, f"{args.out.rstrip('/')}-planned/"], check=True)
        command = [sys.executable, "-m", "quantloom.flow.cli", "plan", args.out, "--format", name]
        for output, more in (("one file", []), ("shards", [f"{args.out.rstrip('/')}-planned/"])):
            print(json.dumps({"plan": name, "output": output, **measure([*command, *more])}), flush=True)


if __name__ == "__main__":
    main()
