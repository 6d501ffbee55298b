"""Moments without running a model: layers whose input comes straight out of a norm with weight gamma and bias beta.

A norm makes its channels zero in mean and one in variance, roughly and on average over tokens; taken as independent,
its output has E[x x^T] = diag(gamma^2) + beta beta^T and E[x] = beta. Which norm stands before a layer is known for the
families of `_FAMILIES`, by the names that transformers gives their layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..formats.errors import CheckpointError, UsageError
from ..formats.layers import WEIGHT, Layer, group_layers
from ..formats.source import Source
from ..formats.tensors import FLOAT_DTYPES, TensorRef
from .estimates import Estimate
from .histogram import BINS
from .reading import read_whole


@dataclass(frozen=True)
class Rule:
    """Layers that a norm stands before."""

    layer: str
    """Pattern of their names."""
    norm: str | Callable[[re.Match[str]], str]
    """The norm's name: a template for the pattern's groups, or a function of the match."""
    offset: float = 0.0
    """What the norm adds to its stored weight."""


_BLOCK = r"((?:.*\.)?layers\.\d+)"
_ATTENTION = Rule(_BLOCK + r"\.self_attn\.(?:q_proj|k_proj|v_proj|qkv_proj)", r"\1.input_layernorm")
_MLP = _BLOCK + r"\.mlp\.(?:gate_proj|up_proj|gate_up_proj)"
_LLAMA = (_ATTENTION, Rule(_MLP, r"\1.post_attention_layernorm"))
_GEMMA = Rule(_ATTENTION.layer, r"\1.input_layernorm", 1.0)
_BERT = (
    Rule(r"(.*)encoder\.layer\.0\.attention\.self\.(?:query|key|value)", r"\1embeddings.LayerNorm"),
    Rule(r"(.*encoder\.layer\.)(\d+)\.attention\.self\.(?:query|key|value)",
         lambda found: f"{found[1]}{int(found[2]) - 1}.output.LayerNorm"),
    Rule(r"(.*encoder\.layer\.\d+)\.intermediate\.dense", r"\1.attention.output.LayerNorm"),
)  # fmt: skip
_GPT2 = (Rule(r"(.*h\.\d+)\.attn\.c_attn", r"\1.ln_1"), Rule(r"(.*h\.\d+)\.mlp\.c_fc", r"\1.ln_2"))
_CONV1D = ("gpt2",)
"""Families whose weights are stored (inputs, outputs)."""

_FAMILIES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "smollm3", "granite"), _LLAMA),
    "gemma": (_GEMMA, Rule(_MLP, r"\1.post_attention_layernorm", 1.0)),
    **dict.fromkeys(("gemma2", "gemma3_text"), (_GEMMA, Rule(_MLP, r"\1.pre_feedforward_layernorm", 1.0))),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "gpt2": _GPT2,
}


def norm_priors(source: Source) -> tuple[list[tuple[list[str], Estimate]], bool]:
    """(layers that share a norm, what it says of their input) for every norm; and whether weights are transposed.

    Reads norms only. Raises UsageError for a model whose graph is not known, CheckpointError when no layer matches.
    """
    family = str((source.config or {}).get("model_type"))
    rules = _FAMILIES.get(family)
    if rules is None:
        raise UsageError(
            f"{source.root}: which norm stands before which layer is not known for model type {family!r} "
            f"({', '.join(_FAMILIES)} are); use --random-tokens, which runs the model"
        )
    layers = {layer.name: layer for layer in group_layers(source)}
    before: dict[tuple[str, float], list[str]] = {}
    for name, layer in layers.items():
        if layer.weight.name == name + WEIGHT and len(layer.weight.shape) == 2 and (key := _norm_of(name, rules)):
            before.setdefault(key, []).append(name)
    transposed = family in _CONV1D
    priors = [
        (fitting, _prior(source.refs, norm, offset))
        for (norm, offset), names in before.items()
        if (fitting := _fitting(names, layers, _width(source.refs, norm), transposed))
    ]
    if not priors:
        raise CheckpointError(
            f"{source.root}: a checkpoint of type {family!r}, but no layer with its norm was found under the names "
            "that transformers gives them; use --random-tokens"
        )
    return priors, transposed


def _norm_of(name: str, rules: tuple[Rule, ...]) -> tuple[str, float] | None:
    for rule in rules:
        if match := re.fullmatch(rule.layer, name):
            return match.expand(rule.norm) if isinstance(rule.norm, str) else rule.norm(match), rule.offset
    return None


def _width(refs: Mapping[str, TensorRef], norm: str) -> int:
    """Channels of a norm; 0 when the checkpoint lacks it."""
    ref = _gamma(refs, norm)
    return ref.shape[0] if ref is not None and len(ref.shape) == 1 else 0


def _gamma(refs: Mapping[str, TensorRef], norm: str) -> TensorRef | None:
    """Old BERT checkpoints call weight and bias gamma and beta."""
    return refs.get(f"{norm}.weight") or refs.get(f"{norm}.gamma")


def _fitting(names: list[str], layers: Mapping[str, Layer], width: int, transposed: bool) -> list[str]:
    return [name for name in names if layers[name].weight.shape[0 if transposed else 1] == width]


def _prior(refs: Mapping[str, TensorRef], norm: str, offset: float) -> Estimate:
    """What a norm says of its output, worth one token."""
    weight = _gamma(refs, norm)
    assert weight is not None
    gamma = _read(weight) + offset
    bias = refs.get(f"{norm}.bias") or refs.get(f"{norm}.beta")
    beta = torch.zeros_like(gamma) if bias is None else _read(bias)

    def rows(start: int, stop: int) -> torch.Tensor:
        block = torch.outer(beta[start:stop], beta)
        block[:, start:stop] += torch.diag(gamma[start:stop].square())
        return block.float()

    diagonal = gamma.square() + beta.square()
    return Estimate(1, beta, diagonal, rows, torch.zeros(BINS, dtype=torch.int64), None)


def _read(ref: TensorRef) -> torch.Tensor:
    """Float64 (n,). Raises CheckpointError for a norm that is no plain vector of numbers."""
    if ref.dtype not in FLOAT_DTYPES or len(ref.shape) != 1:
        raise CheckpointError(f"{ref.path}: {ref.name} is {ref.dtype} {ref.shape}, no norm's weight")
    values = read_whole(ref).double()
    if not values.isfinite().all():
        raise CheckpointError(f"{ref.path}: {ref.name} holds NaN or Inf; its prior would be worthless")
    return values
