"""The files of a quantized model: their headers, the place of every tensor, and what must not be written over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from .. import __version__
from ..formats.comfy import HEADER_KEY, header_entry
from ..formats.errors import PlanError
from ..formats.heads import Metadata, metadata_text, nothing
from ..formats.manifest import KEY
from ..formats.places import same_file
from ..formats.shards import Shard, lay_out, stem_of
from ..formats.source import Source
from ..formats.tensors import Slot
from ..stages.origin import ENTRY, Origin
from ..stages.stage import Context
from ..stages.work import LayerPlan
from .checksums import checksum_entries
from .parts import split_large
from .recipe import Output, Recipe


def lay_out_model(
    recipe: Recipe, context: Context, layers: Sequence[LayerPlan], digest: str
) -> tuple[list[LayerPlan], list[Shard]]:
    """The layers with the places of their outputs, and the files; PlanError for a file that the source has."""
    output, source = recipe.output, context.source
    assert output is not None
    layers = [split_large(layer) for layer in layers]
    metadata = _metadata(recipe, context, layers, digest)
    groups, stem = [layer.outputs for layer in layers], stem_of(source.files)
    shards = lay_out(groups, output.path, output.shard_bytes, metadata, stem)
    _refuse_same_file(source, output, shards)
    slots = chain.from_iterable(shard.slots for shard in shards)  # in the order of the outputs
    return [_placed(layer, slots) for layer in layers], shards


def _placed(layer: LayerPlan, slots: Iterator[Slot]) -> LayerPlan:
    own = tuple(islice(slots, len(layer.outputs)))
    return layer.having(outputs=own, slots=own)


def _refuse_same_file(source: Source, output: Output, shards: Sequence[Shard]) -> None:
    """The input is not written over, by whatever path or link the output leads to it."""
    folders = {source.root, *(path.parent for path in source.files)}
    if os.path.isdir(output.path) and any(same_file(folder, output.path) for folder in folders):
        raise PlanError(f"{output.path}: input and output are the same folder; write to another one")
    if source.takes_all and same_file(source.root, os.path.dirname(shards[0].path) or "."):
        raise PlanError(
            f"{output.path}: lies in the source folder, which has no index: next time it would be taken for a part of "
            "the source; write to another folder"
        )
    targets = [path for path in {output.path, *(shard.path for shard in shards)} if os.path.exists(path)]
    for path in source.files:
        for target in targets:
            if same_file(path, target):
                raise PlanError(f"{target}: input and output are the same file; write somewhere else")


def _metadata(recipe: Recipe, context: Context, layers: Sequence[LayerPlan], digest: str) -> Metadata:
    """``__metadata__`` of the files, with room for checksums unless a stage decided otherwise."""
    source, entries = context.source, context.metadata
    if entries is None:
        entries = _made_entries(recipe, source, layers, digest)
    common = metadata_text({key: value for key, value in entries.items() if key != KEY})
    return Metadata(common, checksum_entries(layers, source.layout, digest) if KEY in entries else nothing)


def _made_entries(recipe: Recipe, source: Source, layers: Sequence[LayerPlan], digest: str) -> dict[str, str]:
    """``__metadata__`` of the output: the original entries, the dialect's where layers are quantized, and what made
    the file. What only changes the stored form of a quantized source is noted behind what made that."""
    metadata = {key: value for key, value in source.metadata.items() if key not in (HEADER_KEY, ENTRY)}
    entries = {layer.layer.name: layer.entry for layer in layers if layer.entry is not None}
    if entries:
        names = (spec.name for layer in layers for spec in layer.outputs)
        metadata[HEADER_KEY] = header_entry(entries, names)
    stages = recipe.identity()
    if all(stage.verb != "quantize" for stage in recipe.stages):
        stages = [*map(dict, Origin.of(source).stages.values()), *stages]
    made: dict[str, Any] = {"version": __version__, "recipe": {"stages": stages}, "plan": digest}
    if needing := sum(layer.adapter is not None and layer.adapter.method == "svdquant" for layer in layers):
        made["needs_adapter"] = needing  # so many layers are wrong without it
    metadata[ENTRY] = json.dumps(made)
    metadata[KEY] = ""  # of each file its own
    return metadata
