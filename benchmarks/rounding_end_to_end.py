#!/usr/bin/env python3
"""Sentence embeddings of MiniLM with quantized weights, beside those of the float32 model: rounding methods end to end.

    python benchmarks/rounding_end_to_end.py [--formats "nvfp4,fp8 row"] [--methods nearest,mse,learned,gradient]
        [--sources random,docstrings,english,both,norms] [--ideas rotation,asymmetric,damping,sweeps,bias] [--json FILE]

All linear layers are quantized, embeddings stay. Embeddings (mean over tokens, normalised) of 48 sentences written by
hand, none of which any statistics have seen, are compared: mean and lowest cosine with the float32 model's, Spearman's
rank correlation of all pairwise similarities. Files are written by the pipeline and decoded from what was written;
statistics come from ``quantloom.calibrate``. Ideas that the product does not offer are computed here, layer by layer:

- rotation: NVFP4 on weights whose rows were rotated (Hadamard), and INT8 by row as the product does it
- asymmetric: layers in order, inputs as they are behind quantized layers; with and without the correction towards the
  float32 model's outputs, and both this and rotation
- damping: fixed values, and chosen per layer by the output error on tokens that were held back
- sweeps: 0 to 6 passes of coordinate descent
- bias: b += (W - W') E[x], with centred second moments
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from errors import minilm
from measure import machine, save_json, table
from rounding_cases import as_stored, chosen, format_of, start_of
from safetensors.torch import load_file
from sentences import EVALUATION, docstrings, english

from quantloom import Pipeline, calibrate
from quantloom.flow.calibrate_folder import Data, calibrate_folder, calibrate_norms, merge
from quantloom.flow.token_batches import Amount
from quantloom.formats.layers import group_layers
from quantloom.formats.rotation import rotate_, rotation_group
from quantloom.formats.source import open_source
from quantloom.stages.inputs import Inputs, release
from quantloom.stages.matrix import solve
from quantloom.stages.methods import BY_ROWS, Problem, make_method
from quantloom.stages.reading import Decode
from quantloom.stages.statistics import Moments, Statistics
from quantloom.stages.work import Environment, LayerPlan, Work

FORMATS: dict[str, dict[str, Any]] = {
    "nvfp4": {"format": "nvfp4"},
    "fp8 row": {"format": "fp8", "scaling": "row"},
    "mxfp8": {"format": "mxfp8"},
    "int8 row": {"format": "int8", "scaling": "row"},
    "int8 row rotated": {"format": "int8", "scaling": "row", "rotate": "hadamard"},
}
METHODS = ("nearest", "mse", "learned", "gradient")
SOURCES = {
    "random": "random tokens", "docstrings": "docstrings of the standard library", "english": "generated English",
    "both": "docstrings and English", "norms": "weights of the norms",
}  # fmt: skip
IDEAS = ("rotation", "asymmetric", "damping", "sweeps", "bias")
DAMPINGS = (0.01, 0.03, 0.05, 0.1, 0.2, 0.3)
SWEEPS = (0, 1, 2, 3, 6)
CORRECTIONS = (0.05, 0.3, 1.0)
"""Damping of the correction towards the float32 model, as a share of the mean of diag H."""
BATCH, SHORT, TOKENS = 16, 32, 20480
ENGLISH, CHARACTERS = 1150, 76000
"""Sentences, and characters of docstrings: about 18,000 tokens each."""

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """A way to quantize the model, and what became of its embeddings."""

    format: str
    method: str
    statistics: str
    cosine: float
    lowest: float
    spearman: float
    seconds: float
    """CPU seconds of the conversion."""


class Model:
    """MiniLM, and what its embeddings are in float32."""

    def __init__(self) -> None:
        import transformers

        self.file = Path(minilm())
        self.folder = self.file.parent
        self.network = transformers.AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        self.original = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.layers = [name for name, module in self.network.named_modules() if isinstance(module, torch.nn.Linear)]
        self.wanted = self.embeddings()

    def embeddings(self) -> torch.Tensor:
        """(sentences, n), of length 1, of the sentences for evaluation."""
        batch = self.tokenizer(list(EVALUATION), padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = self.network(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def score(self, weights: Weights) -> tuple[float, float, float]:
        """Mean and lowest cosine, and Spearman's correlation, with some weights replaced."""
        self.load(weights)
        made = self.embeddings()
        self.load({})
        cosine = (made * self.wanted).sum(1)
        return float(cosine.mean()), float(cosine.min()), spearman(similarities(made), similarities(self.wanted))

    def load(self, weights: Weights) -> None:
        """The original weights, but for these."""
        self.network.load_state_dict({name: weights.get(name, tensor) for name, tensor in self.original.items()})

    def weight(self, layer: str) -> torch.Tensor:
        return self.original[f"{layer}.weight"]

    def batches(self, text: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Padded batches, with masks."""
        parts = (list(text[start : start + BATCH]) for start in range(0, len(text), BATCH))
        return [
            dict(self.tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt"))
            for part in parts
        ]


def similarities(embeddings: torch.Tensor) -> torch.Tensor:
    """Of all pairs."""
    first, second = torch.triu_indices(len(embeddings), len(embeddings), 1)
    return (embeddings @ embeddings.T)[first, second]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation; values are taken to be distinct."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# -- statistics --------------------------------------------------------------------------------------------------------


class Stores:
    """Statistics of every source, made when they are asked for."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder

    def path(self, source: str) -> str:
        out = self.folder / f"{source}.zarr"
        if not out.exists():
            getattr(self, f"_{source}")(out)
        return str(out)

    def moments(self, source: str, layer: str, rotation: int | None = None, columns: int | None = None) -> Moments:
        """Of a layer, in the basis of a weight that was rotated."""
        store = Statistics.open(self.path(source))
        inputs = Inputs(store, layer, store.input_of(layer), rotation)
        return inputs.moments(columns or self.model.weight(layer).shape[1], torch.device("cpu"))

    @cached_property
    def text(self) -> list[str]:
        return english(ENGLISH)

    def _text(self, text: Sequence[str], out: Path) -> None:
        calibrate(self.model.network, self.model.batches(text), out, checkpoint=self.model.file)

    def _random(self, out: Path) -> None:
        calibrate_folder(str(self.model.folder), Data(Amount(TOKENS, SHORT, BATCH)), "cpu", str(out))

    def _docstrings(self, out: Path) -> None:
        self._text(docstrings(CHARACTERS), out)

    def _first(self, out: Path) -> None:
        self._text(self.text[::2], out)

    def _second(self, out: Path) -> None:
        self._text(self.text[1::2], out)

    def _english(self, out: Path) -> None:
        merge([self.path("first"), self.path("second")], str(out))

    def _both(self, out: Path) -> None:
        merge([self.path("docstrings"), self.path("english")], str(out))

    def _norms(self, out: Path) -> None:
        calibrate_norms(str(self.model.folder), str(out))


# -- what the product does ---------------------------------------------------------------------------------------------


def converted(model: Model, folder: Path, options: Mapping[str, Any]) -> Weights:
    """Every tensor of the checkpoint that the pipeline writes, decoded."""
    output = folder / "out.safetensors"
    pipeline = Pipeline(scheduler="sync").read(model.file).target(preset="none").quantize(**options)
    report = pipeline.write(output, overwrite=True)
    assert len(report.layers) == len(model.layers), f"{len(report.layers)} of {len(model.layers)} layers quantized"
    return decoded(output)


def decoded(output: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, quantized weights in float32."""
    weights = load_file(output)
    for layer in group_layers(open_source(output)):
        if layer.encoding is not None:
            plan = LayerPlan(layer, (), ())
            work = Decode().run(Work(plan, (0, plan.rows), Environment()))
            assert work.stream is not None
            weights[layer.weight.name] = torch.cat([chunk.x.clone() for chunk in work.stream(0, plan.rows)])
    return weights


# -- what it does not --------------------------------------------------------------------------------------------------


def rounded(
    name: str, weight: torch.Tensor, format: str, method: str, moments: Moments | None = None,
    options: Mapping[str, Any] | None = None,
) -> torch.Tensor:  # fmt: skip
    """One weight as it would be stored."""
    fmt = format_of(format)
    x = torch.nn.functional.pad(weight, (0, fmt.columns(weight.shape[1]) - weight.shape[1]))
    scales, whole = start_of(fmt, x, method != "nearest")
    if method in BY_ROWS:
        return as_stored(fmt, x, scales)[:, : weight.shape[1]]
    made = make_method(method, options or {})
    assert made is not None
    found, _ = solve(made, Problem(name, x, fmt, scales, whole, moments))
    return as_stored(fmt, found.values, found.scales)[:, : weight.shape[1]]


def all_rounded(model: Model, one: Callable[[str], torch.Tensor]) -> Weights:
    return {f"{name}.weight": one(name) for name in model.layers}


def rotated(model: Model, format: str, method: str, stores: Stores, source: str) -> Weights:
    """Rounded in the rotated basis and turned back: what a client that rotates inputs would compute with."""

    def one(name: str) -> torch.Tensor:
        group = rotation_group(model.weight(name).shape[1])
        assert group is not None
        moments = stores.moments(source, name, group) if method == "calibrated" else None
        turned = rotate_(model.weight(name).clone(), group)
        return rotate_(rounded(name, turned, format, method, moments).contiguous(), group)

    return all_rounded(model, one)


def chosen_damping(model: Model, format: str, stores: Stores) -> Weights:
    """Per layer the damping whose weights, made from half of the sentences, do best on the other half."""
    taken: list[float] = []

    def one(name: str) -> torch.Tensor:
        weight, first, second = model.weight(name), stores.moments("first", name), stores.moments("second", name)
        losses = {}
        for damping in DAMPINGS:
            error = rounded(name, weight, format, "calibrated", first, {"damping": damping}) - weight
            losses[damping] = float(((error @ second.hessian) * error).sum())
        taken.append(min(losses, key=lambda damping: losses[damping]))
        whole = stores.moments("english", name)
        return rounded(name, weight, format, "calibrated", whole, {"damping": taken[-1]})

    made = all_rounded(model, one)
    counts = {damping: taken.count(damping) for damping in DAMPINGS}
    print(f"  damping chosen, {format}: {counts}", file=sys.stderr)
    return made


class Sequential:
    """Rounds a stack of blocks in order: statistics of a layer are of its inputs behind layers already rounded.

    With a correction, W' takes W's place, the least of E|W x - W' y|^2 + c |W' - W|^2 for inputs x of the float32 model
    and y of the quantized one: W' = (W E[x y^T] + c W)(E[y y^T] + c I)^-1.
    """

    STEPS = (
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",), ("intermediate.dense",), ("output.dense",),
    )  # fmt: skip
    """Layers of a block, those with the same input together."""

    def __init__(
        self, model: Model, text: Sequence[str], format: str, correction: float | None, rotate: bool = False
    ) -> None:
        self.model, self.text, self.format = model, text, format
        self.correction, self.rotate = correction, rotate

    def run(self) -> Weights:
        network, model = self.model.network, self.model
        blocks, masks, calls, exact = self._begin()
        behind = exact
        made: dict[str, torch.Tensor] = {}
        for index, block in enumerate(blocks):
            prefix = f"encoder.layer.{index}."
            model.load(made)
            inputs, after = self._pass(block, exact, calls, masks, [names[0] for names in self.STEPS])
            for names in self.STEPS:
                seen, _ = self._pass(block, behind, calls, masks, [names[0]])
                x, y = inputs[names[0]], seen[names[0]]
                moments = Moments(y.T @ y / len(y), y.mean(0), len(y))
                for name in names:
                    weight = model.weight(prefix + name)
                    target = weight if self.correction is None else self._corrected(weight, x, y, moments)
                    made[f"{prefix}{name}.weight"] = self._rounded(prefix + name, target, moments)
                network.load_state_dict({**model.original, **made})
            _, behind = self._pass(block, behind, calls, masks, [])
            exact = after
        model.load({})
        made["pooler.dense.weight"] = rounded("pooler.dense", model.weight("pooler.dense"), self.format, "mse")
        return made

    def _rounded(self, name: str, weight: torch.Tensor, moments: Moments) -> torch.Tensor:
        """In the rotated basis, if wanted."""
        group = rotation_group(weight.shape[1]) if self.rotate else None
        if group is None:
            return rounded(name, weight, self.format, "calibrated", moments)
        hessian = rotate_(rotate_(moments.hessian.clone(), group).T.contiguous(), group)
        mean = rotate_(moments.mean[None].clone(), group)[0]
        turned = rotate_(weight.clone(), group)
        made = rounded(name, turned, self.format, "calibrated", Moments(hessian, mean, moments.tokens))
        return rotate_(made.contiguous(), group)

    def _corrected(self, weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor, moments: Moments) -> torch.Tensor:
        ridge = (self.correction or 0) * moments.hessian.diagonal().mean()
        damped = moments.hessian + ridge * torch.eye(y.shape[1])
        wanted = weight @ (x.T @ y / len(y)) + ridge * weight
        solved: torch.Tensor = torch.linalg.solve(damped, wanted, left=False)
        return solved

    def _begin(self) -> tuple[Any, list[torch.Tensor], list[Any], list[torch.Tensor]]:
        """Blocks; for every batch its mask, how a block is called, and what the first block is given."""
        blocks = self.model.network.encoder.layer
        calls: list[Any] = []

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args[0] if args else kwargs["hidden_states"], args[1:],
                          {key: value for key, value in kwargs.items() if key != "hidden_states"}))  # fmt: skip

        handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        batches = self.model.batches(self.text)
        with torch.no_grad():
            for batch in batches:
                self.model.network(**batch)
        handle.remove()
        masks = [batch["attention_mask"].bool() for batch in batches]
        return blocks, masks, [call[1:] for call in calls], [call[0] for call in calls]

    def _pass(
        self, block: Any, hidden: Sequence[torch.Tensor], calls: Sequence[Any], masks: Sequence[torch.Tensor],
        names: Sequence[str],
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:  # fmt: skip
        """Inputs (t, n) of the named layers of a block, and its outputs."""
        modules = dict(block.named_modules())
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        current = masks[0]

        def hook(name: str) -> Any:
            return lambda _module, args: found[name].append(args[0][current])

        handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
        outputs = []
        with torch.no_grad():
            for x, (args, kwargs), current in zip(hidden, calls, masks, strict=True):  # noqa: B007
                made = block(x, *args, **kwargs)
                outputs.append(made[0] if isinstance(made, tuple) else made)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(parts) for name, parts in found.items()}, outputs


# -- the rows ----------------------------------------------------------------------------------------------------------

Made = Callable[[], Weights]
Planned = tuple[str, str, str, Made]
"""Format, method, statistics, and how the weights are made."""


class Bench:
    """Everything that rows need."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, Model()
        self.stores = Stores(self.model, folder)

    def product(self, format: str, method: str, source: str | None = None, words: str = "", **options: Any) -> Planned:
        """A row of the pipeline itself."""

        def make() -> Weights:
            given = {"statistics": self.stores.path(source)} if source else {}
            return converted(self.model, self.folder, {**FORMATS[format], "rounding": method, **given, **options})

        return format, method + words, SOURCES[source] if source else "-", make

    def main(self, formats: Sequence[str], methods: Sequence[str], sources: Sequence[str]) -> Iterator[Planned]:
        for format in formats:
            yield from (self.product(format, method) for method in methods)
            yield from (self.product(format, "calibrated", source) for source in sources)

    def rotation(self) -> Iterator[Planned]:
        for method in ("nearest", "mse", "calibrated"):
            sources = ("random", "english") if method == "calibrated" else ("",)
            for source in sources:
                words = SOURCES.get(source, "-")
                yield "nvfp4", f"{method}, rotated", words, self._rotated("nvfp4", method, source)

    def _rotated(self, format: str, method: str, source: str) -> Made:
        return lambda: rotated(self.model, format, method, self.stores, source)

    def asymmetric(self) -> Iterator[Planned]:
        for source, text in (("english", self.stores.text), ("docstrings", docstrings(CHARACTERS))):
            for correction in (None, *CORRECTIONS):
                words = "calibrated, in order" if correction is None else f"the same, corrected, c = {correction:g}"
                yield "nvfp4", words, SOURCES[source], Sequential(self.model, text, "nvfp4", correction).run
        both = Sequential(self.model, self.stores.text, "nvfp4", CORRECTIONS[1], rotate=True)
        yield "nvfp4", f"the same, corrected, c = {CORRECTIONS[1]:g}, rotated", SOURCES["english"], both.run

    def damping(self) -> Iterator[Planned]:
        for source in ("random", "docstrings", "english"):
            for damping in DAMPINGS:
                options = {"rounding_options": {"damping": damping}}
                yield self.product("nvfp4", "calibrated", source, f", damping {damping}", **options)
        yield "nvfp4", "calibrated, damping by held-out tokens", SOURCES["english"], lambda: chosen_damping(
            self.model, "nvfp4", self.stores
        )

    def sweeps(self) -> Iterator[Planned]:
        for format in ("nvfp4", "fp8 row"):
            for sweeps in SWEEPS:
                options = {"rounding_options": {"sweeps": sweeps}}
                yield self.product(format, "calibrated", "english", f", sweeps {sweeps}", **options)

    def bias(self) -> Iterator[Planned]:
        for method in ("nearest", "mse", "calibrated"):
            yield self.product("nvfp4", method, "english", " + bias", bias_correction=True)
        for format, source in (("nvfp4", "random"), ("int8 row", "english")):
            yield self.product(format, "calibrated", source, " + bias", bias_correction=True)

    def row(self, planned: Planned) -> Row:
        format, method, statistics, make = planned
        began = time.process_time()
        weights = make()
        seconds = time.process_time() - began
        release()
        return Row(format, method, statistics, *self.model.score(weights), seconds)


def shown(rows: Sequence[Row]) -> str:
    cells = [
        [row.format, row.method, row.statistics, f"{row.cosine:.5f}", f"{row.lowest:.4f}", f"{row.spearman:.4f}",
         f"{row.seconds:.1f}"]
        for row in rows
    ]  # fmt: skip
    return table(["format", "method", "statistics from", "cosine", "lowest", "Spearman", "CPU s"], cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rounding methods end to end on MiniLM.")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sources", default=",".join(SOURCES), help="statistics of the calibrated rows")
    parser.add_argument("--ideas", default=",".join(IDEAS))
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        formats, methods = chosen(args.formats, list(FORMATS)), chosen(args.methods, METHODS)
        planned = list(bench.main(formats, methods, chosen(args.sources, list(SOURCES))))
        for idea in chosen(args.ideas, IDEAS):
            planned += getattr(bench, idea)()
        for source in dict.fromkeys(planned_row[2] for planned_row in planned):
            for name, words in SOURCES.items():  # made beforehand: their time is no row's
                if words == source:
                    bench.stores.path(name)
        for one in planned:
            rows.append(bench.row(one))
            print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    print(f"All linear layers of MiniLM quantized, {len(EVALUATION)} sentences\n\n{shown(rows)}")
    save_json(args.json, {"machine": machine(), "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
