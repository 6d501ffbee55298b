"""The plan: every layer's fate, every output byte's place and every refusal, before any weight is read."""

from __future__ import annotations

import hashlib
import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .. import __version__
from ..formats.errors import CheckpointError, PlanError, UsageError, printable
from ..formats.layers import Layer, group_layers
from ..formats.shards import Shard
from ..formats.source import Source, open_source
from ..stages.keeping import keep
from ..stages.lora import Lora
from ..stages.origin import Origin
from ..stages.quantized_as import QuantizedAs
from ..stages.stage import Context, Stage, make_stage
from ..stages.work import LayerPlan
from .adapter import AdapterFile, adapter_of, beside, equipped, lay_out_adapter, refuse_place
from .budget import Budget
from .checksums import checksum_entries
from .collector import collector_paused
from .estimate import estimate_seconds
from .model_files import lay_out_model
from .recipe import Output, Recipe
from .settled import NOTHING, Settled
from .sizes import count, show_seconds, show_size
from .together import put_together


@dataclass(frozen=True)
class Plan:
    """A complete conversion that has not run."""

    recipe: Recipe
    source: Source
    layers: tuple[LayerPlan, ...]
    shards: tuple[Shard, ...]
    digest: str
    """sha256 (hex) over source, recipe and version: equal digests write equal bytes."""
    notes: tuple[str, ...] = ()
    """What was found and decided, for people."""
    warnings: tuple[str, ...] = ()
    adapter: AdapterFile | None = None
    """The adapter that is written beside the output ..."""
    base: Source | None = None
    """... or alone, for this model, which is quantized already: then there are no shards."""
    verbatim: bool = False
    """Whether configuration files are copied as they are: a stage only edited."""
    settled: Settled = NOTHING
    """What had been found out about weights."""

    @property
    def output(self) -> Output:
        assert self.recipe.output is not None
        return self.recipe.output

    @property
    def base_path(self) -> str:
        """The quantized model that an adapter alone is written for; empty where a model is written."""
        return next((stage.model for stage in self.recipe.stages if isinstance(stage, QuantizedAs)), "")

    @property
    def nbytes_in(self) -> int:
        """Stored bytes of the layers that are read."""
        return sum(layer.layer.nbytes for layer in self.layers)

    @property
    def nbytes_out(self) -> int:
        """Bytes of all output files but the adapter's."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.format)

    @cached_property
    def formats(self) -> Counter[str]:
        """Number of layers per format."""
        return Counter(layer.format for layer in self.quantized)

    @cached_property
    def kept(self) -> Counter[str]:
        """Number of kept tensors per reason; tensors that could never be quantized (biases, norms) are not named."""
        return Counter(layer.reason for layer in self.layers if not layer.format and layer.reason)

    @cached_property
    def changed(self) -> Counter[str]:
        """Number of layers per change that is no quantization."""
        return Counter(layer.change for layer in self.layers if layer.change)

    def to_dict(self, budget: Budget) -> dict[str, Any]:
        """JSON values, every layer included."""
        layers = [
            {
                "name": layer.layer.name, "shape": list(layer.layer.weight.shape), "format": layer.format or None,
                "rounding": layer.rounding or None,
                "kept_because": layer.reason or None, "change": layer.change or None,
                "bytes_in": layer.layer.nbytes, "bytes_out": layer.nbytes_out,
                **adapter_of(layer),
            }
            for layer in self.layers
        ]  # fmt: skip
        return {
            "source": list(self.recipe.source), "digest": self.digest,
            **({} if self.base is None else {"quantized": self.base_path}),
            "bytes_in": self.nbytes_in, "bytes_out": self.nbytes_out,
            "files": [{"path": shard.path, "bytes": shard.size} for shard in self.shards],
            "peak_memory_bytes": budget.peak_bytes, "workers": budget.workers, "memory_budget_bytes": budget.limit,
            "estimated_seconds": estimate_seconds(self.layers, self.recipe.run, budget.workers),
            "formats": dict(self.formats), "changed": dict(self.changed), "kept": dict(self.kept),
            **({} if self.adapter is None else {"adapter": self.adapter.to_dict()}),
            "notes": list(self.notes), "warnings": list(self.warnings), "layers": layers,
        }  # fmt: skip

    def explain(self, workers: int | None = None) -> str:
        """What would happen, as text."""
        files, tensors = count(len(self.source.files), "file"), count(len(self.layers), "tensor")
        found = f"{files}, {tensors}, {show_size(self.nbytes_in)}"
        made = f"{count(len(self.shards), 'file')}, {show_size(self.nbytes_out)}"
        made += f", dialect {self.output.dialect}" if self.quantized else ""
        lines = [f"source   {', '.join(self.recipe.source)}  ({found})"]
        if self.base is None:
            lines.append(f"output   {self.output.path}  ({made})")
        else:
            words = ", ".join(f"{count(number, 'layer')} {name}" for name, number in sorted(self.formats.items()))
            lines.append(f"base     {self.base_path}  ({words})")
        for name, number in sorted(self.formats.items() if self.base is None else ()):
            chosen = [layer for layer in self.quantized if layer.format == name]
            by = ", ".join(sorted({layer.rounding for layer in chosen}))
            before, after = sum(layer.layer.nbytes for layer in chosen), sum(layer.nbytes_out for layer in chosen)
            sizes = f"{show_size(before)} -> {show_size(after)}"
            lines.append(f"quantize {count(number, 'layer', 5)} to {name}, rounding {by}: {sizes}")
        if self.adapter is not None:
            lines.append(f"adapter  {self.adapter}")
        lines += [f"change   {count(number, 'layer', 5)}: {what}" for what, number in self.changed.most_common()]
        lines += [f"keep     {count(number, 'tensor', 5)}: {reason}" for reason, number in self.kept.most_common()]
        seconds = estimate_seconds(self.layers, self.recipe.run, workers)
        lines.append(f"estimate {show_seconds(seconds) if seconds >= 1 else 'under a second'}")
        lines += [f"note     {note}" for note in self.notes] + [f"warning  {text}" for text in self.warnings]
        return "\n".join(map(printable, lines))

    def __repr__(self) -> str:
        sizes = f"{show_size(self.nbytes_in)} -> {show_size(self.nbytes_out)}"
        number, done = len(self.quantized), "quantized"
        if self.changed:
            number, done = self.changed.total(), "changed"
        numbers = f"{number} of {count(len(self.layers), 'tensor')} {done}"
        return f"Plan({', '.join(self.recipe.source)!r} -> {self.output.path!r}: {numbers}, {sizes})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


@collector_paused()
def make_plan(recipe: Recipe, settled: Settled = NOTHING) -> Plan:
    """Plans a conversion from headers alone, and from what is ``settled``.

    Raises UsageError for a recipe that cannot mean anything, CheckpointError for a broken source, PlanError for a
    conversion that cannot be done.
    """
    source, layers, context = plan_layers(recipe)
    assert recipe.output is not None
    forced = settled.kept
    layers = [keep(plan.layer, forced[plan.layer.name]) if plan.layer.name in forced else plan for plan in layers]
    if forced and not any(layer.format for layer in layers):
        raise PlanError(f"nothing is left to quantize: all {len(forced)} layers hold NaN or Inf")
    lora = next((stage for stage in recipe.stages if isinstance(stage, Lora)), None)
    if lora is not None:
        layers = equipped(lora, layers, settled, context)
    digest = _digest(recipe, source, forced)
    shards: list[Shard] = []
    if context.base is None:
        layers, shards = lay_out_model(recipe, context, layers, digest)
    else:
        layers = [layer for layer in layers if layer.adapter is not None]  # nothing is written of the others
    layers, adapter = put_together(layers, recipe.run.device), None
    if lora is not None:
        place = recipe.output.path if context.base is not None else beside(lora, recipe.output)
        base = digest if context.base is None else Origin.of(context.base).digest
        entries = checksum_entries(layers, source.layout, base)
        layers, adapter = lay_out_adapter(lora, layers, place, base, entries)
    if adapter is not None:
        refuse_place(adapter, [source, *([context.base] if context.base else [])], recipe.output, shards)
    said = tuple(context.notes), tuple(context.warnings)
    verbatim = context.metadata is not None
    return Plan(recipe, source, tuple(layers), tuple(shards), digest, *said, adapter, context.base, verbatim, settled)


def plan_layers(recipe: Recipe) -> tuple[Source, list[LayerPlan], Context]:
    """The layers with their chains and outputs, before they have a place."""
    if not recipe.source:
        raise UsageError("nothing to read: name a checkpoint with .read(path)")
    if recipe.output is None:
        raise UsageError("nowhere to write: name an output with .write(path)")
    stages = _complete(recipe)
    where = recipe.source[0] if len(recipe.source) == 1 else list(recipe.source)
    source = open_source(where)
    context = Context(source)
    found = group_layers(source)
    _refuse_shared_names(found)
    layers = [keep(layer, layer.problem or "") for layer in found]  # a stage that touches a layer gives its own reason
    for stage in stages:
        layers = stage.plan(layers, context)
    unreadable = [plan.layer for plan in layers if plan.layer.problem and plan.outputs]
    if unreadable and context.base is None:
        first = f"{unreadable[0].name}: {unreadable[0].problem}"
        context.warnings.insert(
            0, f"{len(unreadable)} quantized layers are passed through as they are; a client that does not know their "
            f"coding would take the codes for numbers. The first: {first}"
        )
    return source, layers, context


def _refuse_shared_names(layers: Sequence[Layer]) -> None:
    """Layers are told apart by name in graph and report; of ``a`` beside ``a.weight`` only one would be written."""
    seen: dict[str, Layer] = {}
    for layer in layers:
        other = seen.setdefault(layer.name, layer)
        if other is not layer:
            names = f"{other.weight.name!r} and {layer.weight.name!r}"
            raise CheckpointError(f"{layer.tensors[0].path}: tensors {names} share the name of a layer: rename one")


def _complete(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages, with targeting by its defaults where the recipe does not say how; UsageError for too few or many."""
    verbs = {stage.verb for stage in recipe.stages}
    if recipe.run.on_error == "keep" and recipe.stages and not verbs & {"quantize", "quantized_as"}:
        raise UsageError("on_error keep leaves layers unquantized, and nothing is quantized here: use stop")
    if alone := next((stage.verb for stage in recipe.stages if getattr(stage, "alone", False)), None):
        if others := ", ".join(sorted(verbs - {alone})):
            raise UsageError(f"{alone} stands alone: leave {others} out, or run it on the result of the other")
    elif "quantized_as" in verbs:
        if other := verbs & {"quantize", "target"}:
            drop = " and ".join(sorted(other))
            raise UsageError(f"quantized_as names a model that is quantized already: drop {drop}")
        if "lora" not in verbs:
            raise UsageError("nothing to do: make an adapter for the quantized model with .lora(rank=32)")
        if any(isinstance(stage, Lora) and stage.output for stage in recipe.stages):
            raise UsageError("quantized_as writes the adapter alone: name its path with .write(path), not in lora")
    elif "quantize" not in verbs:
        raise UsageError("nothing to do: name a format with .quantize('mxfp8')")
    elif "target" not in verbs:
        return make_stage("target", {}), *recipe.stages
    return recipe.stages


def _digest(recipe: Recipe, source: Source, forced: Mapping[str, str]) -> str:
    """How the work runs (memory, workers, device) does not count, nor when and where the source was put down: equal
    sources give equal files on every machine."""
    assert recipe.output is not None
    output = recipe.output
    parts = [__version__, source.layout, recipe.identity(), output.dialect, output.shard_bytes, sorted(forced)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
