"""An adapter beside the model that it was made for: whether they belong together, and what it brings there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..formats.adapters import ADAPTER_DIALECTS, AdapterTensors, adapter_file, adapter_layer, adapter_tensors
from ..formats.comfy import model_prefix
from ..formats.errors import CheckpointError, PlanError, listed, shown
from ..formats.layers import Layer
from ..formats.source import Source, open_source
from ..formats.tensors import FLOAT_DTYPES, TensorRef
from ..stages.energies import Energies
from ..stages.evidence import Evidence
from ..stages.extract import relative_errors
from ..stages.origin import Origin
from ..stages.quality import AdapterGain
from ..stages.reading import read_whole
from ..stages.work import Environment
from .adapter import ENTRY
from .compare import Factors, rows_of

_ROWS = 256
_SAME = 1e-3
"""Errors that are measured again differ by less than this share from those that the header tells."""


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer in a file."""

    up: TensorRef
    down: TensorRef
    told: tuple[float | None, float | None]
    """Relative errors of the weight without and with it, as the header tells them."""

    def factors(self) -> Factors:
        """Its two matrices."""
        up, down = (read_whole(ref).float().view(ref.shape) for ref in (self.up, self.down))
        return Factors(up, down)


def read_adapter(path: str, made: Source, layers: Mapping[str, Layer]) -> dict[str, LayerAdapter]:
    """The adapters of ``layers`` (those of ``made``, by name) in a file or PEFT folder of this program.

    Raises CheckpointError for a file that is none or is broken, PlanError for one of another model.
    """
    source = open_source(adapter_file("peft", path) if Path(path).is_dir() else path)
    try:
        entry = json.loads(source.metadata[ENTRY])
        base, dialect, told = str(entry["base"]), entry["dialect"], dict(entry["layers"])
        ranks = {name: int(value["rank"]) for name, value in told.items()}
        errors = {name: (_error(value["error"][0]), _error(value["error"][1])) for name, value in told.items()}
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: no adapter of quantloom: its header lacks a sound entry {ENTRY}") from error
    if dialect not in ADAPTER_DIALECTS:
        raise CheckpointError(f"{path}: its header names the unknown dialect {shown(dialect)}")
    digest = Origin.of(made).digest
    if base != digest:
        raise PlanError(
            f"{path}: belongs to the model {base[:16]}..., but {made.files[0]} is {digest[:16]}...; name the model "
            "that it was made for, or make one for this model with `quantloom extract-lora`"
        )
    if lacking := [name for name in ranks if name not in layers]:
        raise PlanError(f"{path}: {made.files[0]} lacks layers of the adapter: {listed(lacking, 8)}")
    if wrong := [f"{name} (rank {rank}, weight {list(layers[name].weight.shape)})" for name, rank in ranks.items()
                 if rank < 1 or len(layers[name].weight.shape) != 2]:  # fmt: skip
        raise CheckpointError(f"{path}: its header tells of adapters that cannot be: {listed(wrong, 8)}")
    prefix, found = model_prefix(made.refs), {}
    for name, rank in ranks.items():
        rows, columns = layers[name].weight.shape
        wanted = adapter_tensors(dialect, adapter_layer(dialect, name, prefix), (rows, columns), rank, "F32")
        found[name] = LayerAdapter(*_factors(path, source, wanted), errors[name])
    return found


def _error(value: Any) -> float | None:
    return None if value is None else float(value)


def _factors(path: str, source: Source, wanted: AdapterTensors) -> tuple[TensorRef, TensorRef]:
    """The stored pair, whose rank may be filled up with zeros; CheckpointError for one of other shapes or scale."""
    specs = (wanted.up, wanted.down, *(spec for spec, _ in wanted.constants))
    if missing := [spec.name for spec in specs if spec.name not in source.refs]:
        raise CheckpointError(f"{path}: tensor {missing[0]} is missing")
    up, down = source.refs[wanted.up.name], source.refs[wanted.down.name]
    (rows, rank), columns = wanted.up.shape, wanted.down.shape[1]
    fits = len(up.shape) == 2 and up.shape[0] == rows and up.shape[1] >= rank and down.shape == (up.shape[1], columns)
    if not fits or not {up.dtype, down.dtype} <= FLOAT_DTYPES:
        raise CheckpointError(
            f"{path}: {up.name} {up.dtype} {list(up.shape)} and {down.name} {down.dtype} {list(down.shape)} are no "
            f"adapter of rank {rank} for a weight of {rows}x{columns}"
        )
    for spec, content in wanted.constants:
        ref = source.refs[spec.name]
        given = float(read_whole(ref).float()[0]) if ref.numel == 1 and ref.dtype in FLOAT_DTYPES else None
        if given != float(torch.frombuffer(bytearray(content), dtype=torch.float32)[0]):
            raise CheckpointError(f"{path}: {spec.name} is {given}, not the rank {rank}: clients would scale by it")
    return up, down


def measure_adapter(
    made: Layer, source: Layer, adapter: LayerAdapter, evidence: Evidence | None, environment: Environment
) -> tuple[AdapterGain, str]:
    """What an adapter brings to a stored layer, over all weights and, with statistics, outputs; and what is wrong."""
    columns, device = source.weight.shape[1], torch.device("cpu")
    inputs = None if evidence is None else evidence.inputs(source.name, None, centred=False)
    hessian = None if inputs is None else inputs.moments(columns, device).hessian
    factors, first = adapter.factors(), 0
    weight, without, beside = (Energies(columns, hessian, device) for _ in range(3))
    pairs = zip(rows_of(made, _ROWS, environment), rows_of(source, _ROWS, environment), strict=True)
    for ours, theirs in pairs:
        error = theirs - ours
        weight.add(theirs)
        without.add(error)
        beside.add(error - factors.rows(first, len(error)))
        first += len(error)
    whole = weight.total()
    before, after = (relative_errors(energies.total(), whole) for energies in (without, beside))
    gain, measured = AdapterGain(len(factors.down), before, after), (before.weight, after.weight)
    for told, found, words in zip(adapter.told, measured, ("without", "with"), strict=True):
        if told is not None and not abs(told - found) <= _SAME * max(told, found):
            return gain, (
                f"its adapter tells of an error of {told:.5g} {words} it, measured are {found:.5g}: it was made for "
                "other weights"
            )
    return gain, ""
