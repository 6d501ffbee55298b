"""The checksums of a plan's files: what their headers hold room for, and the finished headers of what was written.

Everything comes from plan and receipts, so that a run that goes on where another one stopped writes the same headers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..formats.checksums import Piece, checksum
from ..formats.manifest import KEY, finished_head, reserve
from ..formats.tensors import TensorSpec
from ..stages.work import ADAPTER, LayerPlan, Receipt

if TYPE_CHECKING:
    from .plan import Plan

Entries = Callable[[Sequence[TensorSpec]], dict[str, str]]
"""What ``__metadata__`` of a file says of the tensors in it."""


def checksum_entries(layers: Sequence[LayerPlan], source: str, digest: str) -> Entries:
    """Room for the checksums of the tensors of these layers, which have their row ranges already.

    ``source`` is the ``layout`` of the checkpoint, ``digest`` that of the plan; for an adapter, which may be made with
    its model or later, the digest of the model.
    """
    pieces = {spec.name: len(layer.parts) for layer in layers if layer.parts for spec in layer.outputs}
    return lambda specs: {KEY: reserve(specs, pieces, source, digest)}


def checksums_of(layers: Sequence[LayerPlan], receipts: Sequence[Receipt]) -> dict[str, list[Piece]]:
    """Pieces of everything that was written, by slot name (``ADAPTER`` stands before those of adapters)."""
    sums: dict[str, list[Piece]] = {}
    for layer in layers:
        for name, content in layer.known.items():
            sums[name] = [Piece(name, 0, len(content), checksum(content))]
    for receipt in receipts:
        for piece in receipt.pieces:
            sums.setdefault(piece.name, []).append(piece)
    return sums


def finished_heads(plan: Plan, receipts: Sequence[Receipt]) -> Iterator[tuple[str, bytes]]:
    """Path and finished head of every file: checksums, and in an adapter's also what it brought.

    SinkError for a tensor that was not written wholly.
    """
    sums = checksums_of(plan.layers, receipts)
    for shard in plan.shards:
        yield shard.path, finished_head(shard.head, sums, shard.path)
    if plan.adapter is not None:
        gains = {receipt.name: receipt.gain for receipt in receipts if receipt.gain is not None}
        own = {name.removeprefix(ADAPTER): found for name, found in sums.items() if name.startswith(ADAPTER)}
        path = plan.adapter.shard.path
        yield path, finished_head(plan.adapter.head(gains), own, path)
