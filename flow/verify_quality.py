"""Quality of a finished output: weight, projected and output error of every quantized layer, beside plain rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..formats.encoding import Encoding
from ..formats.layers import Layer
from ..formats.rotation import rotate_
from ..stages.counter import seed_of
from ..stages.evidence import Evidence
from ..stages.learned import Learned
from ..stages.quality import Measure, Quality
from ..stages.subspace import dominant_subspaces, project, rank_of
from ..stages.work import Environment, LayerPlan
from .compare import rows_of, whole

_ROWS = 128


def open_evidence(path: str, layers: Sequence[Layer]) -> Evidence:
    """The statistics; PlanError when they do not fit the layers."""
    evidence = Evidence.open(path)
    evidence.check([LayerPlan(layer, (), ()) for layer in layers])
    return evidence


def measure(
    made: Layer, source: Layer, evidence: Evidence, bias: tuple[Layer, Layer] | None, corrected_by: str | None,
    environment: Environment,
) -> dict[str, Any]:
    """What is to be noted of a quantized layer: its ``quality``, over all its weights, held whole; and a ``problem``,
    when its ``bias`` (made, source) was corrected by something else than what its weights lost.

    Only the statistics that corrected it, whose digest is ``corrected_by``, tell what a bias should be; by others the
    output error counts what the mean output is still off by.
    """  # fmt: skip
    encoding = made.encoding
    assert encoding is not None
    fmt = encoding.build()
    weight = _matrix(source, encoding, environment)
    inputs = evidence.inputs(made.name, encoding.rotation, centred=bias is not None)
    moments = None if inputs is None else inputs.moments(weight.shape[1], weight.device)
    shape = (weight.shape[0], weight.shape[1])
    usual = Learned()  # projected errors are measured where that method lowers them by default
    rank = rank_of(shape, usual.top_p, usual.min_k, usual.max_k)
    subspaces = dominant_subspaces(weight, rank, seed_of(made.name))
    measured = Measure(weight, moments, lambda error: project(subspaces, error))
    stored = _matrix(made, encoding, environment)
    if bias is None:
        return {"quality": Quality(measured.errors(stored), measured.nearest(fmt))}
    before, after = whole(bias[1])[0], whole(bias[0])[0]
    lost = torch.zeros(shape[0]) if moments is None else (weight - stored) @ moments.mean
    noted: dict[str, Any] = {
        "quality": Quality(measured.errors(stored, after - before - lost), measured.nearest(fmt))
    }
    if evidence.digest == corrected_by and (problem := _bias_problem(after, before + lost, lost)):
        noted["problem"] = problem
    return noted


def _bias_problem(made: torch.Tensor, wanted: torch.Tensor, lost: torch.Tensor) -> str:
    """What is wrong with a corrected bias; half-precision biases are as exact as their dtype."""
    slack = 2.0**-7 * wanted.abs() + 1e-2 * lost.abs() + 1e-3 * lost.abs().max() + 1e-12
    off = (made - wanted).abs() - slack
    if not bool((off > 0).any()):
        return ""
    worst = int(off.argmax())
    return f"its bias [{worst}] is {float(made[worst]):.6g}, corrected it should be {float(wanted[worst]):.6g}"


def _matrix(layer: Layer, encoding: Encoding, environment: Environment) -> torch.Tensor:
    """Float32 weights, padded and rotated as the stored layer is."""
    rows, columns = layer.weight.shape
    width = encoding.build().columns(columns)
    matrix = torch.zeros(rows, width)
    first = 0
    for part in rows_of(layer, _ROWS, environment):
        matrix[first : first + part.shape[0], :columns] = part
        first += part.shape[0]
    return rotate_(matrix, encoding.rotation) if encoding.rotation else matrix
