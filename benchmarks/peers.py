#!/usr/bin/env python3
"""The programs quantloom is compared with, each in a virtual environment of its own.

    python benchmarks/peers.py [--envs DIR] [--pip-arg ARG ...]      create what is missing, then print what is there

Both ask for torch but work with its CPU build, which is what a machine without a GPU should get: CUDA's libraries are
gigabytes. Where pip would fetch the CUDA build, pass the index of the CPU build with --pip-arg.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Case:
    """One conversion, and how each program is asked for it."""

    name: str
    quantloom: tuple[str, ...]
    """Options of `quantloom convert`."""
    convert_to_quant: tuple[str, ...] | None = None
    """Options, or None where the program has no such format."""
    llmcompressor: str | None = None
    """Scheme of model_free_ptq, or None."""


CASES = (
    Case("fp8 tensor", ("--format", "fp8", "--scaling", "tensor"), ()),
    Case("fp8 row", ("--format", "fp8", "--scaling", "row"), ("--scaling_mode", "row"), "FP8_DYNAMIC"),
    Case(
        "fp8 block 128",
        ("--format", "fp8", "--scaling", "block", "--block-size", "128"),
        ("--scaling_mode", "block", "--block_size", "128"),
        "FP8_BLOCK",
    ),
    Case("int8 row", ("--format", "int8", "--scaling", "row"), ("--int8", "--scaling_mode", "row"), "INT8"),
    Case("mxfp8", ("--format", "mxfp8"), ("--mxfp8",), "MXFP8"),
    Case("nvfp4", ("--format", "nvfp4"), ("--nvfp4",), "NVFP4A16"),
)

EXCLUDE = {
    "flux": "img_in|txt_in|time_in|vector_in|guidance_in|final_layer",
    "llama": "embed_tokens|lm_head",
    "moe": r"embed_tokens|lm_head|mlp\.gate\.",
    "t5": "shared|relative_attention_bias",
    "wan": "patch_embedding|text_embedding|time_embedding|time_projection|head",
}
"""What every program is told to keep, so that all of them quantize the same layers."""


@dataclass(frozen=True)
class Program:
    """Something that converts checkpoints."""

    name: str
    requirements: tuple[str, ...]
    """What pip installs into its environment; empty: it runs under the interpreter that runs the benchmark."""
    imports: str
    """Python that imports what a conversion imports, and does nothing."""
    arguments: Callable[[Case, Path, Path, str], list[str] | None]
    """(case, source folder, output folder, pattern to keep) to what follows the interpreter; None if it cannot."""
    env: tuple[tuple[str, str], ...] = ()
    """Environment variables it needs."""


def quantloom_arguments(case: Case, src: Path, dst: Path, exclude: str) -> list[str]:
    same_work = ["--rounding", "nearest", "--preset", "none", "--exclude", exclude]
    return ["-m", "quantloom.flow.cli", "convert", str(src), str(dst), *case.quantloom, *same_work, *QUIETLY]


def convert_to_quant_arguments(case: Case, src: Path, dst: Path, exclude: str) -> list[str] | None:
    """It reads and writes one file, and does not make the output's folder."""
    file = src / "model.safetensors"
    if case.convert_to_quant is None or not file.exists():
        return None
    dst.mkdir(parents=True, exist_ok=True)
    paths = ["-i", str(file), "-o", str(dst / file.name)]
    shared = ["--comfy_quant", "--simple", "--low-memory", "--exclude-layers", exclude]
    return ["-c", CONVERT_TO_QUANT, *paths, *shared, *case.convert_to_quant]


def llmcompressor_arguments(case: Case, src: Path, dst: Path, exclude: str) -> list[str] | None:
    if case.llmcompressor is None:
        return None
    return ["-c", MODEL_FREE_PTQ, str(src), str(dst), case.llmcompressor, exclude]


QUIETLY = ("--overwrite", "--quiet")

# What the console script of that name does; the script itself holds the path its environment was made at.
CONVERT_TO_QUANT = "import sys; from convert_to_quant.cli.main import main; sys.argv[0] = 'convert_to_quant'; main()"

MODEL_FREE_PTQ = """
import sys
from llmcompressor import model_free_ptq
src, dst, scheme, exclude = sys.argv[1:]
model_free_ptq(src, dst, scheme=scheme, ignore=[f"re:.*({exclude})"], max_workers=1, device="cpu")
"""

QUANTLOOM = Program(
    name="quantloom",
    requirements=(),
    # Only other people's modules and the entry point: the time its own modules take counts as work.
    imports="import dask.threaded, numpy, psutil, rich.table, torch, yaml, quantloom.flow.cli",
    arguments=quantloom_arguments,
)

# Its package declares one dependency, prodigy-plus-schedule-free. What it fails without, found by running it:
# safetensors, numpy and tqdm always; comfy-kitchen for mxfp8 ("requires comfy_kitchen with MXFP8 support") and for
# nvfp4's faster path, and comfy-kitchen in turn needs packaging, else its import fails silently; scipy and triton for
# int8 by row. On a CPU no triton kernel ever runs, but the module that holds them is imported there without a fallback
# ("No module named 'triton'"), so the whole package, 1 GB installed, has to be present. It imports without a GPU.
CONVERT_TO_QUANT_PROGRAM = Program(
    name="convert_to_quant",
    requirements=(
        "convert-to-quant==1.3.4", TORCH, "safetensors==0.8.0", "numpy", "tqdm", "packaging", "scipy",
        "comfy-kitchen==0.2.40", "triton==3.9.0",
    ),
    imports="import convert_to_quant.cli.main, prodigyplus",
    arguments=convert_to_quant_arguments,
    env=(("CUDA_VISIBLE_DEVICES", ""),),
)  # fmt: skip

# model_free_ptq needs no model definition. One worker, its default: a worker holds a whole shard and its output.
# FP8 with one scale per tensor is not on offer: its scheme wants calibrated activations, which model_free_ptq refuses.
LLMCOMPRESSOR_PROGRAM = Program(
    name="llmcompressor",
    requirements=("llmcompressor==0.14.0.1", TORCH),
    imports="from llmcompressor import model_free_ptq",
    arguments=llmcompressor_arguments,
    env=(("CUDA_VISIBLE_DEVICES", ""), ("HF_HUB_OFFLINE", "1")),
)

PEERS = (CONVERT_TO_QUANT_PROGRAM, LLMCOMPRESSOR_PROGRAM)


def default_envs() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "quantloom-bench"


def add_peer_options(parser: argparse.ArgumentParser) -> None:
    """Options of benchmarks of single layers that run a peer beside."""
    parser.add_argument("--cache", type=Path, help="JSON file about what the peer did; what it stored lies beside it")
    parser.add_argument("--envs", type=Path, default=default_envs(), help="folder of the peer's environment (peers.py)")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", help="where to write the figures")


def interpreter(env: Path) -> Path:
    return env / "bin" / "python"


def is_ready(peer: Program, envs: Path) -> bool:
    """Whether the environment was completed, for the same requirements."""
    stamp = envs / peer.name / "requirements.txt"
    return stamp.exists() and stamp.read_text().split() == list(peer.requirements)


def create(peer: Program, envs: Path, pip_args: Sequence[str] = ()) -> Path:
    """The environment's interpreter; the environment is made if it is not there, complete and of this version."""
    env = envs / peer.name
    if not is_ready(peer, envs):
        print(f"creating {env} with {', '.join(peer.requirements)}", file=sys.stderr)
        venv.create(env, with_pip=True, clear=True)
        install = [str(interpreter(env)), "-m", "pip", "install", "--quiet", *pip_args, *peer.requirements]
        subprocess.run(install, check=True)
        (env / "requirements.txt").write_text("\n".join(peer.requirements) + "\n")  # last: an interrupted one is redone
    return interpreter(env)


def versions(python: Path) -> dict[str, str]:
    """Installed packages of an environment."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ).stdout  # fmt: skip
    pairs = (line.split("==", 1) for line in listed.split() if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Create the environments of the programs compared with.")
    parser.add_argument("--envs", type=Path, default=default_envs(), help="folder of the environments")
    parser.add_argument("--pip-arg", action="append", default=[], help="handed to pip install; may be repeated")
    args = parser.parse_args(argv)
    for peer in PEERS:
        installed = versions(create(peer, args.envs, args.pip_arg))
        named = [r.split("==")[0] for r in peer.requirements]
        print(f"{peer.name}: " + ", ".join(f"{name} {installed.get(name, '?')}" for name in named))
    return 0


if __name__ == "__main__":
    sys.exit(main())
