"""Statistics of a model in a folder: from text, from random inputs, from its norms; and stores put together."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.errors import CheckpointError, PlanError, UsageError, memory_problem
from .batches import call_model
from .calibrate import Calibration, Options, calibrate
from .token_batches import Amount

if TYPE_CHECKING:
    from typing import Unpack

    from ..stages.statistics import Statistics


@dataclass(frozen=True)
class Data:
    """What a model is run on."""

    amount: Amount
    text: str | None = None
    """A file of text; None: random tokens, or random latents for a diffusion model."""
    seed: int = 0


def calibrate_folder(folder: str, data: Data, device: str, out: str, **options: Unpack[Options]) -> Calibration:
    """Loads the model in ``folder`` and calibrates it; the store gets the key names of the folder's safetensors files.

    Raises UsageError, CheckpointError, and what `calibrate` raises.
    """
    from .language_model import read_config

    root = Path(folder)
    if (root / "model_index.json").is_file():
        parts = [path.parent.name for path in sorted(root.glob("*/config.json")) if path.parent.name != "vae"]
        raise UsageError(f"{root}: a pipeline of several models; give the folder of one of them: {', '.join(parts)}")
    config = read_config(root)
    _check_device(device)
    load = _diffusion if "_class_name" in config else _language
    model, batches, notes, label = load(root, config, data, device)

    def run(model: Any, batch: Any) -> None:
        try:
            call_model(model, batch)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if memory_problem(error):
                raise
            first = (str(error) or "no reason given").splitlines()[0]
            raise CheckpointError(
                f"{root}: {type(model).__name__} does not run on {label}: {type(error).__name__}: {first}. Look at its "
                "config.json, or call it yourself: quantloom.calibrate(model, batches)"
            ) from error

    settings: Options = {**options, "checkpoint": root, "label": f"{root.absolute().name}, {label}", "run": run}
    made = calibrate(model, batches, out, **settings)
    return replace(made, notes=(*notes, *made.notes))


def calibrate_norms(folder: str, out: str) -> Calibration:
    """A new store with the priors that norms' weights are; no weight of a matrix is read."""
    from ..formats.source import open_source
    from ..stages.norm_prior import norm_priors
    from ..stages.statistics import Statistics
    from ..stages.statistics_store import write_store

    began, root = time.perf_counter(), Path(out).absolute()
    if root.exists():
        raise PlanError(f"{root}: exists; a norm prior is a store of its own, choose another name")
    source = open_source(folder)
    priors, transposed = norm_priors(source)
    run = hashlib.sha256(f"norms {source.fingerprint}".encode()).hexdigest()
    names = frozenset(name for group, _ in priors for name in group) if transposed else frozenset()
    write_store(root, priors, {run: f"{Path(folder).absolute().name}, weights of its norms"}, names)
    return Calibration(Statistics.open(root), 0, time.perf_counter() - began, ())


def merge(stores: Sequence[str | Path], out: str | Path) -> Statistics:
    """A new store ``out`` of everything that ``stores`` have seen, weighted by tokens."""
    from ..stages.statistics import Statistics
    from ..stages.statistics_store import merge_stores

    if len(stores) < 2:
        raise UsageError("one store is nothing to merge; give two or more")
    merge_stores([Statistics.open(path) for path in stores], Path(out).absolute())
    return Statistics.open(out)


Loaded = tuple[Any, list[dict[str, Any]], list[str], str]
"""Model, batches, notes, and what the data is in words."""


def _language(root: Path, _config: dict[str, Any], data: Data, device: str) -> Loaded:
    from .language_model import LanguageModel

    loaded = LanguageModel(root, device)
    if data.text is not None:
        batches, notes = loaded.text(data.text, data.amount)
        label = f"{data.amount.tokens} tokens of {Path(data.text).name}"
    else:
        batches, notes = loaded.random(data.amount, data.seed)
        label = f"{data.amount.tokens} random tokens, seed {data.seed}"
    return loaded.model, batches, [*loaded.notes, *notes], label


def _diffusion(root: Path, config: dict[str, Any], data: Data, device: str) -> Loaded:
    from .diffusion_model import load_diffusion_model, random_batches

    if data.text is not None:
        raise UsageError(f"{root}: a diffusion model takes no text; use --random-tokens, which draws its inputs")
    model = load_diffusion_model(root, str(config["_class_name"]), device)
    label = f"random latents of {data.amount.tokens} tokens, seed {data.seed}"
    return model, random_batches(model, data.amount, data.seed), [], label


def _check_device(device: str) -> None:
    """UsageError for a device that torch does not know or this machine does not have."""
    import torch

    try:
        if torch.empty(0, device=device).device.type not in ("cpu", "cuda"):
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used: {first}; known are cpu, cuda and cuda:0") from error
