"""The adapter's file beside an output: where it lies, and a header whose errors are filled in when they are known.

The header is laid out before any weight is read. Errors stand in it as numbers of fixed width, so that the finished one
is exactly as long.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..formats.adapters import adapter_config, adapter_file, adapter_path
from ..formats.errors import PlanError
from ..formats.heads import Metadata, layout, metadata_text
from ..formats.places import same_file
from ..formats.shards import SUFFIX, Shard, is_single_file, lay_out
from ..formats.source import Source
from ..formats.tensors import Slot
from ..stages.lora import Lora
from ..stages.quality import AdapterGain
from ..stages.stage import Context
from ..stages.work import LayerPlan
from .checksums import Entries
from .recipe import Output
from .settled import Settled
from .sizes import count, show_size

ENTRY = "quantloom_adapter"
"""Header entry of an adapter: JSON with the digest of the model it belongs to, and what it brings to each layer."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that is written with the output."""

    path: str
    """A file, or the folder of a PEFT adapter."""
    dialect: str
    shard: Shard
    """The safetensors file."""
    config: bytes | None
    """Content of ``adapter_config.json`` beside it, where the dialect has one."""
    about: Mapping[str, Any]
    """What the header says beside errors."""
    ranks: Mapping[str, int]
    """By layer."""
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Header entry with room for those of its tensors."""

    @property
    def files(self) -> list[Path]:
        """Everything that is written."""
        file = Path(self.shard.path)
        return [file] if self.config is None else [file, file.with_name("adapter_config.json")]

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return Path(self.shard.path).parent

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self.shard.size + len(self.config or b"")

    @property
    def words(self) -> str:
        """``2 layers at rank 32, 1 at rank 64``."""
        found = sorted(Counter(self.ranks.values()).items())
        first = f"{count(found[0][1], 'layer')} at rank {found[0][0]}"
        return ", ".join([first, *(f"{number} at rank {rank}" for rank, number in found[1:])])

    def head(self, gains: Mapping[str, AdapterGain]) -> bytes:
        """The header with what it brought, checksums still to be filled in. Raises nothing; layers without a gain keep
        their placeholders."""
        head, _, _ = layout(self.shard.slots, {**metadata_of(self.about, self.ranks, gains), **self.checksums})
        assert len(head) == len(self.shard.head)
        return head

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "path": self.path, "dialect": self.dialect, "bytes": self.nbytes, "base": self.about["base"],
            "method": self.about["method"], "layers": dict(self.ranks),
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.path}  ({show_size(self.nbytes)}, dialect {self.dialect}, {self.about['method']}: {self.words})"


def equipped(lora: Lora, layers: list[LayerPlan], settled: Settled, context: Context) -> list[LayerPlan]:
    """The layers with the steps that make their adapters; candidates as they are while ranks are not surveyed."""
    if lora.surveyed:
        if settled.ranks is None:
            return layers
        layers = [_ranked(plan, settled.ranks) for plan in layers]
        context.notes.extend(settled.notes)
    layers = lora.equip(layers)
    if not any(layer.adapter for layer in layers):
        if context.base is not None:
            raise PlanError("lora: nothing to write: an adapter would bring too little on every layer; name a rank")
        context.warnings.append("lora: no adapter is written: it would bring too little on every layer")
    return layers


def _ranked(plan: LayerPlan, ranks: Mapping[str, int]) -> LayerPlan:
    if plan.adapter is None:
        return plan
    return replace(plan, adapter=replace(plan.adapter, rank=ranks.get(plan.layer.name, 0)))


def adapter_of(layer: LayerPlan) -> dict[str, Any]:
    """JSON values about a layer's adapter, where it has one."""
    if layer.adapter is None:
        return {}
    return {"adapter": {"rank": layer.adapter.rank, "method": layer.adapter.method, "bytes": layer.adapter.nbytes}}


def beside(lora: Lora, output: Output) -> str:
    """The path of the adapter of a model that is written."""
    return lora.output or adapter_path(lora.dialect, output.path)


def lay_out_adapter(
    lora: Lora, layers: Sequence[LayerPlan], path: str, base: str, entries: Entries
) -> tuple[list[LayerPlan], AdapterFile | None]:
    """Gives the tensors of all adapters a place; ``base`` is the digest of the model that they belong to, ``entries``
    makes the header's room for their checksums.

    PlanError for a path that cannot be one of the dialect.
    """
    ranks = {plan.layer.name: plan.adapter.rank for plan in layers if plan.adapter is not None}
    if not any(ranks.values()):
        return list(layers), None
    file = adapter_file(lora.dialect, path)
    config = adapter_config(lora.dialect, ranks)
    if config is None and not is_single_file(path):
        raise PlanError(f"{path}: an adapter of dialect {lora.dialect} is a file that ends in {SUFFIX}; rename it")
    if config is not None and (is_single_file(path) or Path(path).is_file()):
        raise PlanError(f"{path}: an adapter of dialect {lora.dialect} is a folder; name one")
    methods = sorted({plan.adapter.method for plan in layers if plan.adapter is not None})
    about = {"version": __version__, "base": base, "dialect": lora.dialect, "method": ", ".join(methods)}
    specs = [plan.adapter.specs for plan in layers if plan.adapter is not None]
    own = entries([spec for group in specs for spec in group])
    shard = lay_out(specs, file, None, Metadata(metadata_text({**metadata_of(about, ranks, {}), **own})))[0]
    slots = {slot.name: slot for slot in shard.slots}
    made = AdapterFile(path, lora.dialect, shard, config, about, ranks, own)
    return [_placed(plan, slots) for plan in layers], made


def _placed(plan: LayerPlan, slots: Mapping[str, Slot]) -> LayerPlan:
    if plan.adapter is None:
        return plan
    own = tuple(slots[spec.name] for spec in plan.adapter.specs)
    return replace(plan, adapter=replace(plan.adapter, slots=own))


def refuse_place(adapter: AdapterFile, sources: Sequence[Source], output: Output, shards: Sequence[Shard]) -> None:
    """PlanError for an adapter that would replace a file of a source or the output, or be taken for a part of one."""
    for file in adapter.files:
        others = [*(file for source in sources for file in source.files), *(Path(shard.path) for shard in shards)]
        if taken := [other for other in others if same_file(other, file)]:
            raise PlanError(f"{file}: the adapter would replace {taken[0]}; write it somewhere else")
    if shards and not is_single_file(output.path) and same_file(adapter.folder, output.path):
        raise PlanError(
            f"{adapter.path}: whoever reads the folder {output.path} would take the adapter for a part of the model; "
            "write it somewhere else"
        )
    if taking := [source.root for source in sources if source.takes_all and same_file(source.root, adapter.folder)]:
        raise PlanError(
            f"{adapter.path}: lies in the source folder {taking[0]}, which has no index: next time it would be taken "
            "for a part of the source; write it somewhere else"
        )


def metadata_of(
    about: Mapping[str, Any], ranks: Mapping[str, int], gains: Mapping[str, AdapterGain]
) -> dict[str, str]:
    """``__metadata__`` of an adapter; of the same length whatever the gains are."""
    lines = []
    for name, rank in ranks.items():
        gain = gains.get(name)
        pairs = [None] * 4 if gain is None else [
            gain.before.weight, gain.after.weight, gain.before.output, gain.after.output,
        ]  # fmt: skip
        weight_before, weight_after, output_before, output_after = map(_fixed, pairs)
        lines.append(
            f'{json.dumps(name, ensure_ascii=False)}: {{"rank": {rank}, "error": [{weight_before}, {weight_after}], '
            f'"output_error": [{output_before}, {output_after}]}}'
        )
    common: int | str = next(iter(ranks.values())) if len(set(ranks.values())) == 1 else "per layer"
    text = json.dumps({**about, "rank": common}, ensure_ascii=False)
    return {"format": "pt", ENTRY: f'{text[:-1]}, "layers": {{{", ".join(lines)}}}}}'}


def _fixed(value: float | None) -> str:
    """A JSON number, or null, of eleven characters."""
    if value is None or not math.isfinite(value) or value >= 1e99:
        return "null".ljust(11)
    return f"{value if value >= 1e-99 else 0.0:.5e}"
