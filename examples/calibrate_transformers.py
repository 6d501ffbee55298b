"""A transformers model is run on a few batches, and what its layers were given decides how their weights are rounded.

``quantloom.calibrate`` takes any torch module and anything that can be gone through more than once. The statistics go
into a store, of which the rounding ``calibrated`` makes use. Errors of outputs are measured on other batches than
those that made the statistics.

    python examples/calibrate_transformers.py [FOLDER]
"""

from __future__ import annotations

import math
import shutil

import torch
from small_models import save_llama, working_folder

import quantloom
from quantloom import Pipeline
from quantloom.flow.report import Report
from quantloom.flow.verify import verify


def batches(seed: int, count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Random token ids, as the model's forward takes them. Put text of your domain here."""
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(256, (8, 64), generator=random)} for _ in range(count)]


def mean_output_error(report: Report, statistics: str) -> float:
    """Geometric mean of the layers' output errors, by statistics that took no part in rounding."""
    check = verify(report.output, report.source[0], statistics=statistics)
    errors = [layer.quality.stored.output for layer in check.layers if layer.quality is not None]
    return math.exp(sum(math.log(error) for error in errors if error) / len(errors))


def main() -> None:
    folder = working_folder("calibrate_transformers")
    model = save_llama(folder / "llama")
    for name, seed in (("stats", 1), ("other", 2)):
        shutil.rmtree(folder / f"{name}.zarr", ignore_errors=True)
        made = quantloom.calibrate(
            model, batches(seed), out=folder / f"{name}.zarr", checkpoint=folder / "llama" / "model.safetensors"
        )
        described = made.statistics.describe()
        print(f"{name}.zarr: {described['layers']} layers, {described['inputs']} inputs, {described['tokens']} tokens")

    plain = Pipeline().read(folder / "llama").quantize("nvfp4")
    reports = {
        "mse": plain.write(folder / "llama-mse", overwrite=True),
        "calibrated": plain.quantize("nvfp4", rounding="calibrated", statistics=str(folder / "stats.zarr")).write(
            folder / "llama-calibrated", overwrite=True
        ),
    }
    for rounding, report in reports.items():
        error = mean_output_error(report, str(folder / "other.zarr"))
        print(f"{rounding}: output error {error:.4f} over {len(report.layers)} layers")


if __name__ == "__main__":
    main()
