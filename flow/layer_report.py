"""What a report says of one quantized layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .adapter_report import gain_dict
from .quality import finite, quality_dict

if TYPE_CHECKING:
    from ..stages.quality import AdapterGain, Quality


@dataclass(frozen=True)
class LayerReport:
    """One layer that was quantized."""

    name: str
    format: str
    nbytes_in: int
    nbytes_out: int
    error: float
    """Relative Frobenius error ||W' - W|| / ||W||: of every weight where ``quality`` or ``gain`` is known, else from
    one row in 64 (more in small layers)."""
    seconds: float
    rounding: str = ""
    quality: Quality | None = None
    """What a method that looks at a whole matrix brought, beside plain rounding."""
    gain: AdapterGain | None = None
    """What its adapter brought."""

    @property
    def sampled(self) -> bool:
        """Whether ``error`` is known from some rows only."""
        return self.quality is None and self.gain is None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name, "format": self.format, "rounding": self.rounding,
            "bytes_in": self.nbytes_in, "bytes_out": self.nbytes_out,
            "error": finite(self.error),
            "error_sampled": self.sampled, "seconds": self.seconds,
            **({} if self.quality is None else quality_dict(self.quality)),
            **({} if self.gain is None else {"adapter": gain_dict(self.gain)}),
        }  # fmt: skip
