"""Tiny checkpoints for tests, and what tests ask of folders and command lines."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

import quantloom

PACKAGE_PARENT = str(Path(quantloom.__file__).absolute().parents[1])

FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"format": "fp8"},
    "fp8 row": {"format": "fp8", "scaling": "row"},
    "fp8 block": {"format": "fp8", "scaling": "block", "block_size": 64},
    "fp8_e5m2": {"format": "fp8_e5m2"},
    "int8": {"format": "int8"},
    "int8 tensor": {"format": "int8", "scaling": "tensor"},
    "int8 block": {"format": "int8", "scaling": "block", "block_size": 64},
    "int8 rotated": {"format": "int8", "rotate": "hadamard:16"},
    "mxfp8": {"format": "mxfp8"},
    "hybrid_mxfp8": {"format": "hybrid_mxfp8"},
    "nvfp4": {"format": "nvfp4"},
}
"""Every format and scaling, as options of the quantize stage."""


def make_tensors(seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    """Linear layers of several dtypes, one that no usual block divides, and one tensor of each kind that is kept."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * torch.rand(shape[-1], generator=generator).exp() * 0.02

    tensors: dict[str, torch.Tensor] = {}
    for block in range(2):
        name = f"{prefix}blocks.{block}."
        tensors |= {
            f"{name}attn.qkv.weight": draw(384, 128).bfloat16(), f"{name}attn.qkv.bias": draw(384).bfloat16(),
            f"{name}mlp.up.weight": draw(256, 128).half(), f"{name}mlp.down.weight": draw(128, 256),
            f"{name}norm.weight": torch.ones(128),
        }  # fmt: skip
    return tensors | {
        f"{prefix}odd.weight": draw(100, 72),
        f"{prefix}embed_tokens.weight": draw(64, 128).bfloat16(),
        f"{prefix}conv.weight": draw(8, 4, 3, 3),
        f"{prefix}position_ids": torch.arange(10)[None],
        f"{prefix}causal": torch.ones(3, dtype=torch.bool),
    }


LINEAR = 7
"""Layers of ``make_tensors`` that are quantized by default."""
TENSORS = 15
"""All of its layers: each bias and norm counts as one."""


def write_file(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors or make_tensors(), path, metadata=metadata or {"format": "pt", "author": "someone"})
    return path


def write_folder(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, stem: str = "model", shards: int = 3
) -> Path:
    """Shards with an index and the files that lie beside a model."""
    tensors = tensors or make_tensors()
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number::shards]
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "name": "Ünïcode"}, ensure_ascii=False))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("A model.\n")
    return folder


def without_checksums(raw: bytes) -> bytes:
    """A file without the header entry of its checksums, whose pieces are the row ranges that tasks wrote."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    assert header["__metadata__"].pop("quantloom.checksums")
    return json.dumps(header).encode() + raw[end:]


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder with the sha256 of its bytes; folders have an empty one."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def benchmark(name: str) -> ModuleType:
    """A program of benchmarks/, as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Ran(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    """The environment in which a child process finds the package under test."""
    paths = [PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "100", **extra}


def child(*arguments: str, cwd: Path | None = None, **extra: str) -> Ran:
    """Runs Python with these arguments."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd, env=environment(**extra)
    )
    return Ran(done.returncode, done.stdout, done.stderr)
