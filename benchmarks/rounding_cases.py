"""One weight matrix in one format by one rounding method: what is stored for it, and how far off that is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from errors import minilm
from sentences import english

from quantloom.formats.comfy import LayerOptions, storage
from quantloom.formats.encoding import Encoding
from quantloom.formats.format import SAMPLE_SIZE, Format, Scales, Stats
from quantloom.formats.registry import make_format
from quantloom.formats.tensors import TensorRef
from quantloom.stages.matrix import solve
from quantloom.stages.methods import BY_ROWS, Problem, make_method
from quantloom.stages.quality import nearest_scales
from quantloom.stages.statistics import Moments
from quantloom.stages.subspace import rank_of

FORMATS = (
    "fp8 tensor", "fp8 row", "fp8 block", "int8 tensor", "int8 row", "int8 block", "mxfp8", "nvfp4",
)  # fmt: skip
METHODS = ("nearest", "mse", "learned", "calibrated", "gradient")
BLOCK = 128
TOP_P, MIN_K, MAX_K = 0.2, 256, 1280


def format_of(name: str) -> Format:
    """``fp8 block`` -> FP8 in blocks of 128."""
    kind, _, scaling = name.partition(" ")
    return make_format(kind, scaling or None, BLOCK if scaling == "block" else None)


def chosen(text: str, known: Sequence[str]) -> list[str]:
    """Comma-separated names; ends the program when one is unknown."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return names


# -- layers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A weight, and inputs of which one half calibrates and the other judges."""

    name: str
    weight: torch.Tensor
    """Float32 (m, n)."""
    seen: torch.Tensor
    """(t, n): inputs that statistics are made of."""
    held_out: torch.Tensor
    """(t, n): inputs that output errors are measured on."""

    def moments(self) -> Moments:
        x = self.seen
        return Moments(x.T @ x / x.shape[0], x.mean(0), x.shape[0])


REAL = {
    "query": "encoder.layer.0.attention.self.query",
    "attention output": "encoder.layer.2.attention.output.dense",
    "FFN up": "encoder.layer.1.intermediate.dense",
    "FFN down": "encoder.layer.4.output.dense",
}
"""Of MiniLM."""
GENERATED = {"1024x1024": (1024, 1024, 4096), "1024x4096": (1024, 4096, 4096)}
"""Rows, columns, tokens: half of the tokens give H, which is then of rank 2048."""
LAYERS = (*REAL, *GENERATED)


def make_layers(names: Sequence[str]) -> list[Layer]:
    """The named layers, always the same."""
    real = minilm_layers([REAL[name] for name in names if name in REAL])
    found = {name: Layer(name, *real[REAL[name]]) for name in names if name in REAL}
    found |= {name: Layer(name, *generated(*GENERATED[name])) for name in names if name in GENERATED}
    return [found[name] for name in names]


def minilm_layers(names: Sequence[str], sentences: int = 1200) -> dict[str, tuple[torch.Tensor, ...]]:
    """Weight, inputs of the even and of the odd sentences: real activations of generated English."""
    if not names:
        return {}
    import transformers

    folder = Path(minilm()).parent
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    captured: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    mask = torch.empty(0)

    def hook(name: str) -> Any:
        def before(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            captured[name].append(inputs[0][mask.bool()])

        return before

    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    text = english(sentences)
    for half in (text[::2], text[1::2]):
        batch = tokenizer(half, padding=True, return_tensors="pt")
        mask = batch["attention_mask"]
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: (modules[name].weight.detach().clone(), *captured[name]) for name in names}


def generated(
    rows: int, columns: int, tokens: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular values that fall as i^-0.6, and one column in 128 eight times as large. Inputs fall alike, along
    directions of which each is half (in energy) the right singular vector of its place and half random."""
    generator = torch.Generator(device).manual_seed(rows * 31 + columns)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rank = min(rows, columns)
    left, right = (torch.linalg.qr(normal(size, rank))[0] for size in (rows, columns))
    values = torch.arange(1, rank + 1, dtype=torch.float32, device=device) ** -0.6
    weight = (left * values) @ right.T
    weight[:, torch.randperm(columns, generator=generator, device=device)[: columns // 128]] *= 8
    directions = normal(columns, columns) * columns**-0.5
    directions[:rank] = (directions[:rank] + right.T) * 0.5**0.5
    fall = torch.arange(1, columns + 1, dtype=torch.float32, device=device) ** -0.6
    x = (normal(tokens, columns) * fall) @ directions
    return weight, x[::2].contiguous(), x[1::2].contiguous()


# -- errors ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Relative errors of stored weights."""

    weight: float
    """F: ||E|| / ||W||."""
    projected: float
    """P: ||U_k^T E V_k|| / ||W||, exact singular vectors."""
    output: float
    """O: ||X E^T|| / ||X W^T|| on inputs that took no part."""

    def __str__(self) -> str:
        return " / ".join(f"{value:.5f}" for value in (self.weight, self.projected, self.output))

    @property
    def finite(self) -> bool:
        return all(value == value and value < float("inf") for value in vars(self).values())


def leading_vectors(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 (m, k) and (n, k) singular vectors, exact to float32: by the smaller Gram matrix in float64."""
    if weight.shape[0] > weight.shape[1]:
        right, left = leading_vectors(weight.T)
        return left, right
    double = weight.double()
    _, vectors = torch.linalg.eigh(double @ double.T)
    left = vectors[:, -rank_of((weight.shape[0], weight.shape[1]), TOP_P, MIN_K, MAX_K) :]
    right = torch.nn.functional.normalize(double.T @ left, dim=0)
    return left.float(), right.float()


class Judge:
    """Measures errors of one layer; its singular vectors are found once."""

    def __init__(self, layer: Layer, inputs: torch.Tensor | None = None) -> None:
        self.weight, self.inputs = layer.weight, layer.held_out if inputs is None else inputs
        self.left, self.right = leading_vectors(layer.weight)
        self.norm, self.output = float(self.weight.norm()), float((self.inputs @ self.weight.T).norm())

    def errors(self, values: torch.Tensor) -> Errors:
        error = values - self.weight
        projected = (self.left.T @ error) @ self.right
        output = (self.inputs @ error.T).norm()
        return Errors(float(error.norm()) / self.norm, float(projected.norm()) / self.norm, float(output) / self.output)


# -- rounding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a method stored."""

    values: torch.Tensor
    """Decoded from codes and scales."""
    seconds: float
    """CPU seconds: scale search, subspaces, factorisation, rounding, and the measuring that the product always does."""
    loss: tuple[float, float] | None = None
    """The method's own objective, as stored and with plain rounding; None where its objective is F."""
    kept_start: bool = False


def start_of(fmt: Format, weight: torch.Tensor, search: bool) -> tuple[Scales, torch.Tensor | None]:
    """Scales of a whole matrix as the product finds them, and what all rows share."""
    if not search:
        return nearest_scales(fmt, weight), None
    whole = None
    if fmt.needs_stats:
        flat = weight.reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE_SIZE)]
        whole = fmt.whole(Stats(weight.abs().amax(), sample), True)
    return fmt.search(weight, fmt.amax(weight), whole), whole


def as_stored(fmt: Format, values: torch.Tensor, scales: Scales) -> torch.Tensor:
    """Values after encoding and decoding."""
    multiplier = fmt.row_multipliers(scales.multiplier, slice(None), len(values))
    return fmt.decode(fmt.encode_(values.clone(), scales), multiplier)


def round_matrix(
    layer: Layer, format: str, method: str, moments: Moments | None = None, options: Mapping[str, Any] | None = None
) -> Result:
    """Rounds a layer by one of the product's roundings."""
    fmt, weight = format_of(format), layer.weight
    began = time.process_time()
    scales, whole = start_of(fmt, weight, method != "nearest")
    if method in BY_ROWS:
        values = as_stored(fmt, weight, scales)
        return Result(values, time.process_time() - began)
    rounding = make_method(method, options or {})
    assert rounding is not None
    problem = Problem(layer.name, weight, fmt, scales, whole, moments)
    found, quality = solve(rounding, problem)
    seconds = time.process_time() - began
    values = as_stored(fmt, found.values, found.scales)
    solver = rounding.solver(problem)
    plain = as_stored(fmt, weight, nearest_scales(fmt, weight))
    return Result(values, seconds, (solver.loss(values), solver.loss(plain)), quality.kept_start)


def decoded_peer(stored: Mapping[str, torch.Tensor], format: str, shape: tuple[int, int]) -> torch.Tensor:
    """Float32 weights from what convert-to-quant stores, by quantloom's own decoding."""
    fmt = format_of(format)
    layout = storage("layer", shape, fmt, LayerOptions()).layout
    refs = {
        key: TensorRef(key, "", tuple(tensor.shape), "", 0) for key, tensor in stored.items()
    }  # only their shapes are asked for  # fmt: skip
    encoding = Encoding("comfy", (fmt.name, fmt.scaling, fmt.block_size), shape, refs["codes"], refs["scales"],
                        refs.get("whole"), layout)  # fmt: skip
    return encoding.decode((0, shape[0]), stored["codes"], stored["scales"], stored.get("whole"))
