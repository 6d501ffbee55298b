"""Receipts as JSON values and back: what a run's journal keeps of a finished layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ..formats.checksums import Piece
from ..stages.quality import AdapterGain, Errors, Quality
from ..stages.work import Receipt


def receipt_dict(receipt: Receipt) -> dict[str, Any]:
    """JSON values; what a receipt does not have is left out."""
    values = {item.name: getattr(receipt, item.name) for item in fields(receipt)}
    values["pieces"] = [[piece.name, piece.start, piece.nbytes, piece.checksum] for piece in receipt.pieces]
    for name in ("quality", "gain"):
        if values[name] is None:
            del values[name]
        else:
            values[name] = asdict(values[name])
    return values


def read_receipt(values: Mapping[str, Any]) -> Receipt:
    """Raises ValueError, TypeError or KeyError for what is no receipt."""
    made = dict(values)
    made["rows"] = _rows(made["rows"])
    pieces = [(str(name), int(start), int(size), str(sum_)) for name, start, size, sum_ in made["pieces"]]
    made["pieces"] = tuple(Piece(*piece) for piece in pieces)
    if (quality := made.get("quality")) is not None:
        stored, nearest = Errors(**quality["stored"]), Errors(**quality["nearest"])
        made["quality"] = Quality(stored, nearest, bool(quality["kept_start"]))
    if (gain := made.get("gain")) is not None:
        spectrum = tuple(map(float, gain["spectrum"]))
        made["gain"] = AdapterGain(int(gain["rank"]), Errors(**gain["before"]), Errors(**gain["after"]), spectrum)
    for name in ("nbytes_in", "nbytes_out"):
        made[name] = int(made[name])
    for name in ("seconds", "squared_error", "squared_weight"):
        made[name] = float(made[name])
    return Receipt(**made)


def _rows(value: Any) -> tuple[int, int]:
    start, stop = map(int, value)
    return start, stop
