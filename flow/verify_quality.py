"""Quality of a finished output: weight, projected and output error of every quantized layer, beside plain rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..formats.encoding import Encoding
from ..formats.layers import Layer
from ..formats.rotation import rotate_
from ..stages.counter import seed_of
from ..stages.evidence import Evidence
from ..stages.quality import Measure, Quality
from ..stages.subspace import dominant_subspaces, project, rank_of
from ..stages.work import Environment, LayerPlan
from .compare import rows_of

TOP_P, MIN_K, MAX_K = 0.2, 256, 1280
"""Subspaces that projected errors are measured in: the same as the data-free method's by default."""

_ROWS = 128


def open_evidence(path: str, layers: Sequence[Layer]) -> Evidence:
    """The statistics; PlanError when they do not fit the layers."""
    evidence = Evidence.open(path)
    evidence.check([LayerPlan(layer, (), ()) for layer in layers])
    return evidence


def measure(made: Layer, source: Layer, evidence: Evidence, environment: Environment) -> Quality | None:
    """Errors of a stored layer, over all its weights, held whole; None for one that is not quantized."""
    encoding = made.encoding
    if encoding is None:
        return None
    fmt = encoding.build()
    weight = _matrix(source, encoding, environment)
    inputs = evidence.inputs(made.name, encoding.rotation, centred=False)
    moments = None if inputs is None else inputs.moments(weight.shape[1], weight.device)
    shape = (weight.shape[0], weight.shape[1])
    subspaces = dominant_subspaces(weight, rank_of(shape, TOP_P, MIN_K, MAX_K), seed_of(made.name))
    measured = Measure(weight, moments, lambda error: project(subspaces, error))
    return Quality(measured.errors(_matrix(made, encoding, environment)), measured.nearest(fmt))


def _matrix(layer: Layer, encoding: Encoding, environment: Environment) -> torch.Tensor:
    """Float32 weights, padded and rotated as the stored layer is."""
    rows, columns = layer.weight.shape
    width = encoding.build().columns(columns)
    whole = torch.zeros(rows, width)
    first = 0
    for part in rows_of(layer, _ROWS, environment):
        whole[first : first + part.shape[0], :columns] = part
        first += part.shape[0]
    return rotate_(whole, encoding.rotation) if encoding.rotation else whole
