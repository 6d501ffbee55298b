"""A format of one's own: FP8 whose scale is a power of two, so that scaling takes no bit from the numbers.

A format is a frozen dataclass that says from shapes what it stores and encodes ranges of rows; here most of it is
inherited from FP8. Registered, it has everything that other formats have: rules, row ranges, plans, reports. The
client needs to know nothing new, since what is stored is what ComfyUI calls ``float8_e4m3fn``: codes, and a float32
scale that multiplies.

A power of two moves weights between binades and leaves their mantissas alone. Weights that were stored in FP8 before
come back bit for bit, which a scale from the largest weight does not give.

    python examples/custom_format.py [FOLDER]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file, save_file
from small_models import flux_tensors, working_folder

from quantloom import Pipeline
from quantloom.flow.verify import verify
from quantloom.formats.format import Stats
from quantloom.formats.registry import FORMATS, register_format
from quantloom.formats.scaled import Fp8


@dataclass(frozen=True)
class Fp8PowerOfTwo(Fp8):
    """FP8 E4M3 with the smallest power of two as scale at which no weight saturates."""

    @property
    def searches(self) -> bool:
        """Other powers of two lose small weights or clip large ones."""
        return False

    def whole(self, stats: Stats, search: bool) -> torch.Tensor:
        """Float32 (): the inverse scale, 448 / amax rounded down to a power of two."""
        inverse = super().whole(stats, search=False)
        return torch.ldexp(torch.ones_like(inverse), torch.frexp(inverse).exponent - 1)


def main() -> None:
    register_format(replace(FORMATS["fp8"], name="fp8_pow2", factory=f"{__name__}:Fp8PowerOfTwo", scalings=("tensor",)))
    folder = working_folder("custom_format")
    source = folder / "flux.safetensors"
    # Weights that are FP8 numbers already, as of a model that was trained in FP8.
    save_file({name: x.to(torch.float8_e4m3fn).bfloat16() for name, x in flux_tensors().items()}, source)
    for name in ("fp8_pow2", "fp8"):
        output = folder / f"flux-{name}.safetensors"
        report = Pipeline().read(source).quantize(name, rounding="nearest").write(output, overwrite=True)
        errors = [layer.error for layer in verify(report.output, str(source)).layers if layer.format]
        print(f"{name}: {len(errors)} layers, largest error {max(errors):.5f}")
    scale = load_file(folder / "flux-fp8_pow2.safetensors")["single_blocks.0.linear1.weight_scale"]
    print(f"a scale: 2**{int(torch.log2(scale))}")


if __name__ == "__main__":
    main()
