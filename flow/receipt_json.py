"""Receipts as JSON values and back: what a run's journal keeps of a finished layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ..formats.checksums import DIGITS, Piece
from ..stages.quality import AdapterGain, Errors, Quality
from ..stages.work import Receipt

_MOST = 2**63


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
    """Raises ValueError, TypeError, KeyError or OverflowError for what is no receipt: sums are made of its numbers, and
    the checksums of its pieces go into headers."""
    made = dict(values)
    for name in ("name", "format"):
        made[name] = _text(made[name])
    start, stop = made["rows"]
    made["rows"] = _number(start), _number(stop)
    made["pieces"] = tuple(_piece(*piece) for piece in made["pieces"])
    if (quality := made.get("quality")) is not None:
        made["quality"] = Quality(_errors(quality["stored"]), _errors(quality["nearest"]), bool(quality["kept_start"]))
    if (gain := made.get("gain")) is not None:
        spectrum = tuple(map(_real, gain["spectrum"]))
        made["gain"] = AdapterGain(_number(gain["rank"]), _errors(gain["before"]), _errors(gain["after"]), spectrum)
    for name in ("nbytes_in", "nbytes_out"):
        made[name] = _number(made[name])
    for name in ("seconds", "squared_error", "squared_weight"):
        made[name] = _real(made[name])
    return Receipt(**made)


def _piece(name: Any, start: Any, nbytes: Any, digits: Any) -> Piece:
    if DIGITS.fullmatch(_text(digits)) is None:
        raise ValueError("a checksum has 16 hexadecimal digits")
    return Piece(_text(name), _number(start), _number(nbytes), digits)


def _errors(values: Mapping[str, Any]) -> Errors:
    return Errors(_real(values["weight"]), *(_maybe(values[name]) for name in ("projected", "output")))


def _maybe(value: Any) -> float | None:
    return None if value is None else _real(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text belongs")
    return value


def _number(value: Any) -> int:
    """A count: never so large that sums of many no longer fit into a float64."""
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError("no count of bytes, rows or ranks")
    return value


def _real(value: Any) -> float:
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} where a number belongs")
    if value < 0:
        raise ValueError("no time, norm or sum of squares is negative")
    return float(value)
