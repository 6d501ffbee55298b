#!/usr/bin/env python3
"""Generates checkpoints with real key names and realistic weights, of any size, in bounded memory.

    python benchmarks/make_checkpoint.py OUT --arch flux|llama|wan|t5|moe --gb 2 [--shards 1] [--dtype bf16] [--seed 0]

Trained weights are not white noise: their spectrum starts with a power law, and a few input channels are far larger
than the rest. Both decide what a scale costs, so both are here. The noise under them is one pool, drawn once and cut at
random offsets; drawing fresh numbers for every weight would cost ten times as much and change no figure.

Writes OUT/model.safetensors, or numbered shards and an index; the transformers families get a config.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import struct
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Shape = tuple[int, ...]
Named = tuple[str, Shape]

RANK = 32
"""Columns of the power-law part."""
POOL = 1 << 22
"""Floats in the pool of noise: far more than a chunk, so that two chunks practically never line up."""
CHUNK = 1 << 18
"""Weights made at a time: their float32 form, 1 MiB, stays in a core's cache."""
SLACK = 1.03
"""How far a checkpoint may exceed the size asked for, rather than leave out a block."""


@dataclass(frozen=True)
class Kind:
    """A dtype of the output."""

    torch: torch.dtype
    safetensors: str
    nbytes: int


KINDS = {
    "bf16": Kind(torch.bfloat16, "BF16", 2),
    "fp16": Kind(torch.float16, "F16", 2),
    "fp32": Kind(torch.float32, "F32", 4),
}


@dataclass(frozen=True)
class Layout:
    """What a model is made of."""

    head: list[Named]
    """Tensors before the blocks."""
    makers: tuple[Callable[[int], list[Named]], ...]
    """Each makes block number i of its kind; the last kind is the smallest."""
    tail: list[Named]
    """Tensors after the blocks."""
    turns: tuple[int, ...] = (0,)
    """The kinds in the order they take turns."""
    config: Callable[[int], dict[str, Any]] | None = None
    """config.json for a number of blocks."""

    @property
    def least(self) -> int:
        """Weights of the smallest checkpoint this layout can make."""
        return count(self.head) + count(self.makers[-1](0)) + count(self.tail)


@dataclass(frozen=True)
class Checkpoint:
    """What was written."""

    path: str
    arch: str
    nbytes: int
    """Bytes of all tensors, headers left out."""
    tensors: int
    files: int
    seconds: float


def linear(name: str, out: int, into: int, bias: bool = False) -> list[Named]:
    weight: list[Named] = [(f"{name}.weight", (out, into))]
    return [*weight, (f"{name}.bias", (out,))] if bias else weight


def linears(prefix: str, shapes: dict[str, tuple[int, int]], bias: bool = False) -> list[Named]:
    return [tensor for name, (out, into) in shapes.items() for tensor in linear(prefix + name, out, into, bias)]


def count(tensors: Sequence[Named]) -> int:
    return sum(math.prod(shape) for _, shape in tensors)


def vocabulary(budget: int, width: int, share: float, most: int) -> int:
    """Rows of an embedding that takes no more of a small checkpoint than of the real one."""
    return max(256, min(most, int(share * budget / width) // 64 * 64))


# -- families: each takes the number of weights and a divisor of the real widths ---------------------------------------


def flux(_budget: int, div: int) -> Layout:
    """Flux: 19 double and 38 single blocks in the real one, so one double for two single blocks here."""
    h, m = 3072 // div, 12288 // div
    head = linears(
        "",
        {
            "img_in": (h, 64), "txt_in": (h, 4096), "time_in.in_layer": (h, 256), "time_in.out_layer": (h, h),
            "vector_in.in_layer": (h, 768), "vector_in.out_layer": (h, h), "guidance_in.in_layer": (h, 256),
            "guidance_in.out_layer": (h, h), "final_layer.linear": (64, h),
            "final_layer.adaLN_modulation.1": (2 * h, h),
        },
        bias=True,
    )  # fmt: skip

    def norms(prefix: str) -> list[Named]:
        return [(f"{prefix}norm.query_norm.scale", (min(128, h),)), (f"{prefix}norm.key_norm.scale", (min(128, h),))]

    def double(i: int) -> list[Named]:
        shapes = {"attn.qkv": (3 * h, h), "attn.proj": (h, h), "mlp.0": (m, h), "mlp.2": (h, m), "mod.lin": (6 * h, h)}
        streams = [f"double_blocks.{i}.{stream}_" for stream in ("img", "txt")]
        return [tensor for s in streams for tensor in linears(s, shapes, bias=True) + norms(s + "attn.")]

    def single(i: int) -> list[Named]:
        shapes = {"linear1": (3 * h + m, h), "linear2": (h, h + m), "modulation.lin": (3 * h, h)}
        return linears(f"single_blocks.{i}.", shapes, bias=True) + norms(f"single_blocks.{i}.")

    return Layout(head, (double, single), [], turns=(0, 1, 1))


def attention_shapes(h: int, kv: int) -> dict[str, tuple[int, int]]:
    return {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}


def decoder(h: int, vocab: int, block: Callable[[int], list[Named]], config: dict[str, Any]) -> Layout:
    """The frame that llama and moe share."""

    def described(blocks: int) -> dict[str, Any]:
        common = {"hidden_size": h, "num_hidden_layers": blocks, "vocab_size": vocab, "tie_word_embeddings": False}
        return {**config, **common}

    tail: list[Named] = [("model.norm.weight", (h,)), ("lm_head.weight", (vocab, h))]
    return Layout([("model.embed_tokens.weight", (vocab, h))], (block,), tail, config=described)


def decoder_norms(prefix: str, h: int) -> list[Named]:
    return [(f"{prefix}input_layernorm.weight", (h,)), (f"{prefix}post_attention_layernorm.weight", (h,))]


def llama(budget: int, div: int) -> Layout:
    h, m, kv = 4096 // div, 14336 // div, 1024 // div
    mlp = {"gate_proj": (m, h), "up_proj": (m, h), "down_proj": (h, m)}

    def block(i: int) -> list[Named]:
        p = f"model.layers.{i}."
        attention = linears(p + "self_attn.", attention_shapes(h, kv))
        return decoder_norms(p, h) + attention + linears(p + "mlp.", mlp)

    head_dim = min(128, kv)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": m, "head_dim": head_dim,
        "num_attention_heads": h // head_dim, "num_key_value_heads": kv // head_dim, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "max_position_embeddings": 8192, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return decoder(h, vocabulary(budget, h, 0.06, 128256), block, config)


def moe(budget: int, div: int) -> Layout:
    """Qwen3-MoE: many small matrices, which is where per-tensor overhead shows."""
    h, m, kv, experts = 2048 // div, 768 // div, 512 // div, 64
    mlp = {"gate_proj": (m, h), "up_proj": (m, h), "down_proj": (h, m)}

    def block(i: int) -> list[Named]:
        p = f"model.layers.{i}."
        attention = linears(p + "self_attn.", attention_shapes(h, kv)) + linear(p + "mlp.gate", experts, h)
        each = [tensor for e in range(experts) for tensor in linears(f"{p}mlp.experts.{e}.", mlp)]
        return decoder_norms(p, h) + attention + each

    head_dim = min(128, kv)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": m,
        "num_experts": experts, "num_experts_per_tok": 8, "head_dim": head_dim, "num_attention_heads": h // head_dim,
        "num_key_value_heads": kv // head_dim, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    return decoder(h, vocabulary(budget, h, 0.03, 151936), block, config)


def wan(_budget: int, div: int) -> Layout:
    h, m = 5120 // div, 13824 // div
    patch: list[Named] = [("patch_embedding.weight", (h, 16, 1, 2, 2)), ("patch_embedding.bias", (h,))]
    shapes = {
        "text_embedding.0": (h, 4096), "text_embedding.2": (h, h), "time_embedding.0": (h, 256),
        "time_embedding.2": (h, h), "time_projection.1": (6 * h, h),
    }  # fmt: skip

    def block(i: int) -> list[Named]:
        p = f"blocks.{i}."
        out: list[Named] = [(p + "modulation", (1, 6, h)), (p + "norm3.weight", (h,)), (p + "norm3.bias", (h,))]
        for name in ("self_attn", "cross_attn"):
            out += linears(f"{p}{name}.", dict.fromkeys("qkvo", (h, h)), bias=True)
            out += [(f"{p}{name}.norm_q.weight", (h,)), (f"{p}{name}.norm_k.weight", (h,))]
        return out + linears(p, {"ffn.0": (m, h), "ffn.2": (h, m)}, bias=True)

    tail = [*linear("head.head", 64, h, bias=True), ("head.modulation", (1, 2, h))]
    return Layout(patch + linears("", shapes, bias=True), (block,), tail)


def t5(budget: int, div: int) -> Layout:
    """The encoder of T5-XXL."""
    h, m = 4096 // div, 10240 // div
    vocab = vocabulary(budget, h, 0.03, 32128)
    mlp = {"wi_0": (m, h), "wi_1": (m, h), "wo": (h, m)}

    def block(i: int) -> list[Named]:
        p = f"encoder.block.{i}."
        out = linears(p + "layer.0.SelfAttention.", dict.fromkeys("qkvo", (h, h)))
        if i == 0:
            out.append((p + "layer.0.SelfAttention.relative_attention_bias.weight", (32, h // 64)))
        out.append((p + "layer.0.layer_norm.weight", (h,)))
        return [*out, *linears(p + "layer.1.DenseReluDense.", mlp), (p + "layer.1.layer_norm.weight", (h,))]

    def config(blocks: int) -> dict[str, Any]:
        return {
            "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": h, "d_ff": m, "d_kv": 64,
            "num_heads": h // 64, "num_layers": blocks, "vocab_size": vocab, "feed_forward_proj": "gated-gelu",
        }  # fmt: skip

    tail: list[Named] = [("encoder.final_layer_norm.weight", (h,))]
    return Layout([("shared.weight", (vocab, h))], (block,), tail, config=config)


ARCHS: dict[str, Callable[[int, int], Layout]] = {"flux": flux, "llama": llama, "wan": wan, "t5": t5, "moe": moe}


# -- from a size to a list of tensors ----------------------------------------------------------------------------------


def fitting_layout(arch: str, budget: int) -> Layout:
    """Real widths where at least one block fits, else a half, a quarter or an eighth of them."""
    layouts = (ARCHS[arch](budget, div) for div in (1, 2, 4))
    return next((layout for layout in layouts if layout.least <= budget * SLACK), ARCHS[arch](budget, 8))


def list_tensors(arch: str, budget: int) -> tuple[list[Named], dict[str, Any] | None]:
    """Tensors of about `budget` weights in all, at least one block, and the config.json if the family has one."""
    layout = fitting_layout(arch, budget)
    tensors, used = list(layout.head), count(layout.head) + count(layout.tail)
    made = [0] * len(layout.makers)
    for kind in itertools.cycle(layout.turns):
        block, last = layout.makers[kind](made[kind]), kind == len(layout.makers) - 1
        fits = used + count(block) <= budget * SLACK
        if fits or (last and not any(made)):
            tensors, used = tensors + block, used + count(block)
            made[kind] += 1
        elif last:
            break
    return tensors + layout.tail, layout.config(sum(made)) if layout.config else None


def split(tensors: Sequence[Named], files: int) -> list[list[Named]]:
    """Consecutive groups of about the same size, no more than `files` of them and none empty."""
    groups: list[list[Named]] = [[]]
    total, done = count(tensors), 0
    for tensor in tensors:
        size = math.prod(tensor[1])
        if groups[-1] and len(groups) < files and done + size / 2 > total * len(groups) / files:
            groups.append([])
        groups[-1].append(tensor)
        done += size
    return groups


# -- weights -----------------------------------------------------------------------------------------------------------


class Weights:
    """Makes the values of tensors, chunk by chunk, in buffers that are reused."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._noise = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
        self._scratch = torch.empty(CHUNK)

    def chunks(self, name: str, shape: Shape, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The tensor's values in order. They depend on seed, name and shape alone."""
        random = torch.Generator().manual_seed((self._seed * 1000003 + zlib.crc32(name.encode())) & 0x7FFFFFFF)
        if len(shape) == 1 or math.prod(shape) < 65536:
            mean = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
            yield (torch.randn(shape, generator=random) * 0.02 + mean).to(dtype)
        else:
            yield from self._matrix(shape[0], math.prod(shape[1:]), random, dtype)

    def _matrix(self, rows: int, cols: int, random: torch.Generator, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        columns, spectrum = column_gains(cols, random), low_rank(rows, cols, random)
        gains = torch.exp(0.2 * torch.randn(rows, 1, generator=random)) * (0.7 / cols**0.5)
        step = max(1, CHUNK // cols)
        for start in range(0, rows, step):
            n = min(step, rows - start)
            weight = self._buffer(n * cols).view(n, cols)
            mix = torch.randn(n, spectrum.shape[0], generator=random)
            torch.addmm(self._cut(n * cols, random).view(n, cols), mix, spectrum, out=weight)
            yield weight.mul_(columns).mul_(gains[start : start + n]).to(dtype)

    def _buffer(self, n: int) -> torch.Tensor:
        if n > len(self._scratch):  # a single row longer than a chunk
            self._scratch = torch.empty(n)
        return self._scratch[:n]

    def _cut(self, n: int, random: torch.Generator) -> torch.Tensor:
        """`n` numbers of the pool, from a random place."""
        if 2 * n > POOL:
            return torch.randn(n, generator=random)
        start = int(torch.randint(POOL - n, (), generator=random))  # any place: aligned ones would repeat whole rows
        return self._noise[start : start + n]


def column_gains(cols: int, random: torch.Generator) -> torch.Tensor:
    """Gains of input channels: log-normal, and one channel in 256 is 4 to 20 times larger."""
    gains = torch.exp(0.25 * torch.randn(cols, generator=random))
    n = max(1, cols // 256)
    gains[torch.randperm(cols, generator=random)[:n]] *= 4 + 16 * torch.rand(n, generator=random)
    return gains


def low_rank(rows: int, cols: int, random: torch.Generator) -> torch.Tensor:
    """Directions of the power-law part, [rank, cols], the k-th scaled by k^-alpha with alpha in 0.6 ... 1.2."""
    rank = min(RANK, rows, cols)
    alpha = 0.6 + 0.6 * torch.rand((), generator=random)
    scales = 0.5 * torch.arange(1, rank + 1, dtype=torch.float32) ** -alpha
    return torch.randn(rank, cols, generator=random) * scales[:, None]


# -- files -------------------------------------------------------------------------------------------------------------


def header(tensors: Sequence[Named], kind: Kind) -> bytes:
    """A safetensors header, its length in front, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in tensors:
        end = start + math.prod(shape) * kind.nbytes
        entries[name] = {"dtype": kind.safetensors, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    blob = json.dumps(entries, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    return struct.pack("<Q", len(blob)) + blob


def write_file(file: BinaryIO, tensors: Sequence[Named], kind: Kind, weights: Weights) -> None:
    file.write(header(tensors, kind))
    for name, shape in tensors:
        for chunk in weights.chunks(name, shape, kind.torch):
            file.write(chunk.view(-1).view(torch.uint8).numpy().data)


def file_names(n: int) -> list[str]:
    return ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]


def write_sidecars(out: Path, files: dict[str, list[Named]], nbytes: int, config: dict[str, Any] | None) -> None:
    if len(files) > 1:
        names = {name: file for file, tensors in files.items() for name, _ in tensors}
        index = {"metadata": {"total_size": nbytes}, "weight_map": names}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    if config:
        (out / "config.json").write_text(json.dumps(config, indent=1))


def make_checkpoint(
    out: str | Path, arch: str = "flux", gb: float = 0.5, shards: int = 1, dtype: str = "bf16", seed: int = 0
) -> Checkpoint:
    """Write a checkpoint of about `gb` * 1e9 bytes to the folder `out`; the same arguments give the same bytes.

    Blocks are whole, so the size is met to within one block. Below the size of one block of the real model the widths
    shrink by powers of two, by eight at most; embeddings shrink with the size, so that their share of it stays real.
    """
    began, kind, folder = time.perf_counter(), KINDS[dtype], Path(out)
    tensors, config = list_tensors(arch, int(gb * 1e9 / kind.nbytes))
    if config:
        config["torch_dtype"] = str(kind.torch).removeprefix("torch.")
    groups = split(tensors, shards)
    files = dict(zip(file_names(len(groups)), groups, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    weights = Weights(seed)
    with torch.inference_mode():
        for name, group in files.items():
            with (folder / name).open("wb") as file:
                write_file(file, group, kind, weights)
    nbytes = count(tensors) * kind.nbytes
    write_sidecars(folder, files, nbytes, config)
    return Checkpoint(str(folder), arch, nbytes, len(tensors), len(files), round(time.perf_counter() - began, 2))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate a checkpoint with realistic names, shapes and weights.")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--arch", choices=ARCHS, required=True)
    parser.add_argument("--gb", type=float, default=2.0, help="size in 1e9 bytes (default: 2)")
    parser.add_argument("--shards", type=int, default=1, help="number of files (default: 1)")
    parser.add_argument("--dtype", choices=KINDS, default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # chunks this small are not worth a second thread
    print(json.dumps(asdict(make_checkpoint(args.out, args.arch, args.gb, args.shards, args.dtype, args.seed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
