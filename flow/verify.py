"""Verification: decodes what was written and compares it with the source, range by range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..formats.encoding import Encoding
from ..formats.errors import PlanError
from ..formats.fileio import Reader
from ..formats.layers import Layer, describe, group_layers
from ..formats.source import open_source
from ..formats.tensors import TensorRef
from ..stages.evidence import Evidence
from ..stages.origin import Origin
from ..stages.quality import AdapterGain, Quality
from ..stages.work import Environment
from .adapter_report import gain_dict
from .budget import CPU_CHUNK_BYTES
from .compare import compare, whole
from .quality import finite, quality_dict
from .sizes import count
from .threads import map_layers
from .verify_adapter import LayerAdapter, measure_adapter, read_adapter
from .verify_checksums import ChecksumCheck, look
from .verify_quality import measure, open_evidence
from .verify_scalar import scalar_error, scalar_problem

CORRECTED, DECODED, CAST = "corrected", "decoded", "cast"


@dataclass(frozen=True)
class LayerCheck:
    """One layer of the output beside its source."""

    name: str
    format: str
    """Format it is stored in; empty: kept."""
    error: float
    """Relative Frobenius error over all weights; 0 for one that is equal."""
    problem: str = ""
    """What is broken; empty when it is sound."""
    change: str = ""
    """What a layer that is not quantized went through: ``corrected`` (a bias), ``decoded`` or ``cast``."""
    quality: Quality | None = None
    """Its errors beside plain rounding, when statistics were given."""
    gain: AdapterGain | None = None
    """Its errors without and with its adapter, when one was given."""
    scalar_error: float | None = None
    """Of a hybrid layer: relative error of its weights under ``.weight_scalar`` instead of the scales of its groups."""


@dataclass(frozen=True)
class Verification:
    """What a verification found."""

    output: str
    source: str
    layers: tuple[LayerCheck, ...]
    missing: tuple[str, ...]
    """Tensors of the source that the output lacks."""
    unknown: tuple[str, ...]
    """Tensors of the output that the source lacks."""
    checksums: tuple[ChecksumCheck, ...] = ()
    """Of the output and of its adapter, where they carry any."""
    note: str = ""
    """Where the output carries the digest of another source than this one."""

    @property
    def problems(self) -> list[str]:
        """Everything that makes the output broken."""
        if not self.layers and (self.missing or self.unknown):
            return ["no tensor name in common: is SOURCE the checkpoint that OUTPUT was made from?"]
        broken = [str(finding) for check in self.checksums for finding in check.findings]
        broken += [f"{layer.name}: {layer.problem}" for layer in self.layers if layer.problem]
        return broken + [f"{name}: missing from the output" for name in self.missing]

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> list[LayerCheck]:
        """Quantized layers by falling error."""
        return sorted((layer for layer in self.layers if layer.format), key=lambda layer: -layer.error)

    def changed(self, change: str) -> list[LayerCheck]:
        """Layers that are not quantized and went through this."""
        return [layer for layer in self.layers if layer.change == change]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an error that is no number is written as null."""
        layers = [
            {
                **asdict(layer), **{name: finite(getattr(layer, name)) for name in ("error", "scalar_error")},
                "quality": None if layer.quality is None else quality_dict(layer.quality),
                "gain": None if layer.gain is None else gain_dict(layer.gain),
            }
            for layer in self.layers
        ]  # fmt: skip
        return {
            "output": self.output, "source": self.source, "ok": self.ok, "problems": self.problems, "layers": layers,
            "missing": list(self.missing), "unknown": list(self.unknown), "note": self.note,
            "checksums": [check.to_dict() for check in self.checksums],
        }  # fmt: skip


def verify(
    output: str, against: str | list[str], workers: int | None = None, statistics: str | None = None,
    adapter: str | None = None,
) -> Verification:
    """Compares every layer of ``output`` with ``against``; both may be quantized, in any dialect that is read.

    With a store of ``statistics`` the output error of every quantized layer is measured too, and its projected error,
    each beside plain rounding: then whole matrices are held, one at a time. With an ``adapter`` the errors beside it
    are measured too. Checksums are looked at where there are any. Raises CheckpointError when a file itself is broken
    (truncated, bad header), PlanError for statistics or an adapter that do not fit.
    """
    made, source = open_source(output), open_source(against)
    ours = {layer.name: layer for layer in group_layers(made)}
    theirs = {layer.name: layer for layer in group_layers(source)}
    common = [name for name in theirs if name in ours]
    origin = Origin.of(made)
    adapters = {} if adapter is None else read_adapter(adapter, made, ours)
    if origin.needs_adapter and adapter is None:
        raise PlanError(
            f"{output}: {count(origin.needs_adapter, 'layer')} of it mean nothing without their adapter (svdquant); "
            "name it with --adapter"
        )
    needed = adapters if origin.needs_adapter else {}
    evidence = None if statistics is None else open_evidence(statistics, list(theirs.values()))
    biases = {f"{name}.bias" for name in ours if ours[name].encoding} if origin.bias_correction else set()
    corrected = biases & ours.keys() & theirs.keys()
    checks = map_layers(
        lambda name, environment: _bias(ours[name], theirs[name]) if name in corrected
        else _check(ours[name], theirs[name], origin, needed.get(name), environment), common, workers,
    )  # fmt: skip
    if evidence is not None:
        sound = [check.name for check in checks if check.format and not check.problem]
        pairs = {name: (ours[bias], theirs[bias]) for name in sound if (bias := f"{name}.bias") in corrected}
        found = map_layers(
            lambda name, environment: measure(
                ours[name], theirs[name], evidence, pairs.get(name), origin.statistics, environment
            ), sound, workers=1,
        )  # fmt: skip
        measured = dict(zip(sound, found, strict=True))
        checks = [replace(check, **measured.get(check.name, {})) for check in checks]
    if adapters:
        checks = _with_adapters(checks, adapters, (ours, theirs), evidence)
    looks = [check for path in [output, *([adapter] if adapter else [])] if (check := look(path)) is not None]
    removed = origin.removed([layer for name, layer in theirs.items() if name not in ours])
    return Verification(
        output, ", ".join(against) if isinstance(against, list) else against, tuple(checks),
        tuple(name for name in theirs if name not in ours and name not in removed),
        tuple(name for name in ours if name not in theirs), tuple(looks), _other_source(looks, source.layout),
    )  # fmt: skip


def _other_source(looks: list[ChecksumCheck], layout: str) -> str:
    told = looks[0].source if looks else ""
    if not told or told == layout:
        return ""
    return (
        f"the files were made from a checkpoint with the digest {told[:16]}, SOURCE has {layout[:16]}: it is another "
        "version or sharding of it, or another file lies between the two"
    )


def _with_adapters(
    checks: list[LayerCheck], adapters: Mapping[str, LayerAdapter], layers: tuple[dict[str, Layer], dict[str, Layer]],
    evidence: Evidence | None,
) -> list[LayerCheck]:  # fmt: skip
    """The checks of sound layers with what their adapters bring, and whether that is what these tell."""
    chosen = [check.name for check in checks if check.name in adapters and not check.problem]
    found = map_layers(
        lambda name, environment: measure_adapter(
            layers[0][name], layers[1][name], adapters[name], evidence, environment
        ), chosen, workers=1 if evidence else None,
    )  # fmt: skip
    measured = dict(zip(chosen, found, strict=True))
    return [
        replace(check, gain=measured[check.name][0], problem=measured[check.name][1])
        if check.name in measured else check for check in checks
    ]  # fmt: skip


def _check(
    made: Layer, source: Layer, origin: Origin, adapter: LayerAdapter | None, environment: Environment
) -> LayerCheck:
    """One layer beside its source, with the ``adapter`` that it means nothing without; of a hybrid one also what the
    scalar makes of it."""
    check = _compared(made, source, origin, adapter, environment)
    if check.problem or (error := scalar_error(made, environment)) is None:
        return check
    passed = made.encoding and source.encoding and _same_storage(made.encoding, source.encoding)
    problem = "" if passed or origin.legacy_scalars else scalar_problem(error)
    return replace(check, scalar_error=error, problem=problem)


def _compared(
    made: Layer, source: Layer, origin: Origin, adapter: LayerAdapter | None, environment: Environment
) -> LayerCheck:
    form = describe(made) if made.encoding else ""
    if made.problem:
        same = made.problem == source.problem and [t.nbytes for t in made.tensors] == [t.nbytes for t in source.tensors]
        return LayerCheck(made.name, "", 0.0, "" if same else made.problem)
    if made.weight.shape != source.weight.shape:
        shapes = f"shape {list(made.weight.shape)}, the source has {list(source.weight.shape)}"
        return LayerCheck(made.name, form, math.inf, shapes)
    if made.encoding is None and source.encoding is None and not origin.casts(made.weight, source.weight):
        equal = made.weight.dtype == source.weight.dtype and _equal_bytes(made.tensors[0], source.tensors[0])
        return LayerCheck(made.name, "", 0.0 if equal else math.inf, "" if equal else "kept, but its bytes differ")
    if made.encoding is not None and source.encoding is not None and _same_storage(made.encoding, source.encoding):
        return LayerCheck(made.name, form, 0.0)
    name = made.encoding.format[0] if made.encoding else ""
    rotation = made.encoding.rotation if made.encoding else None
    found = compare(made, source, environment, None if adapter is None else adapter.factors())
    feedback = adapter is not None or origin.feedback(source.name)
    problem = found.problem(name, rotation, feedback)
    change = "" if made.encoding else DECODED if source.encoding else CAST
    return LayerCheck(made.name, form, found.error, problem, change)


def _bias(made: Layer, source: Layer) -> LayerCheck:
    """A bias that was corrected: of its source's shape and dtype, and finite."""
    if made.weight.shape != source.weight.shape or made.weight.dtype != source.weight.dtype:
        return LayerCheck(made.name, "", math.inf, "a corrected bias of another shape or dtype than its source")
    finite = bool(whole(made).isfinite().all()) or not whole(source).isfinite().all()
    return LayerCheck(made.name, "", 0.0, "" if finite else "a corrected bias that is not finite", CORRECTED)


def _same_storage(made: Encoding, source: Encoding) -> bool:
    """Whether a quantized layer was passed through: then it is sound whatever its scales are."""
    if (made.format, made.layout, made.rotation) != (source.format, source.layout, source.rotation):
        return False
    pairs = [(made.codes, source.codes), (made.scales, source.scales), (made.whole, source.whole)]
    return all(ours is theirs is None or (ours and theirs and _equal_bytes(ours, theirs)) for ours, theirs in pairs)


def _equal_bytes(ours: TensorRef, theirs: TensorRef) -> bool:
    if ours.nbytes != theirs.nbytes:
        return False
    with Reader(ours.path) as first, Reader(theirs.path) as second:
        for start in range(0, ours.nbytes, CPU_CHUNK_BYTES):
            size = min(CPU_CHUNK_BYTES, ours.nbytes - start)
            pair = bytearray(size), bytearray(size)
            first.read_into(memoryview(pair[0]), ours.start + start)
            second.read_into(memoryview(pair[1]), theirs.start + start)
            if pair[0] != pair[1]:
                return False
    return True
