"""The Python door: an immutable pipeline whose verbs are the registered stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from ..formats.errors import UsageError, did_you_mean
from ..stages.stage import VERBS, make_stage
from .recipe import OtherRun, Output, Recipe, Run, refuse_unknown
from .sizes import parse_size

if TYPE_CHECKING:
    from distributed import Client

    from .execute import Progress
    from .plan import Plan
    from .report import Report
    from .settled import Settled
    from .simulate import Simulation

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Pipeline:
    """A conversion that is put together verb by verb; every verb returns a new pipeline.

    ``Pipeline().read(src).quantize("mxfp8").write(dst)`` is a whole program. Verbs beside ``read`` and ``write`` are
    the registered stages (``target``, ``quantize`` ...), with their fields as keyword arguments.

    Args:
        memory: What the process may use, in bytes or as ``"8GB"``; by default half of what is free.
        workers: Tasks at a time (on several GPUs: of each); by default as many as cores and memory allow.
        device: ``cpu``, ``cuda`` (every visible GPU), ``cuda:<index>``, or several such as ``cuda:0,cuda:1``.
        scheduler: ``threads``, ``sync``, ``distributed``, ``dask-cuda`` or the address of a Dask scheduler.
        run: Other fields of ``quantloom.flow.recipe.Run``: ``writes``, ``resume``, ``verify``, ``on_error``.
    """

    __slots__ = ("_recipe",)

    def __init__(self, *, memory: int | str | None = None, workers: int | None = None, device: str = "cpu",
                 scheduler: str = "threads", **run: Unpack[OtherRun]) -> None:  # fmt: skip
        refuse_unknown("Pipeline", run, tuple(OtherRun.__annotations__))
        self._recipe = Recipe(run=Run(parse_size(memory, "memory"), workers, device, scheduler, **run))

    @classmethod
    def from_recipe(cls, recipe: Recipe | str | os.PathLike[str]) -> Pipeline:
        """A pipeline from a recipe, its JSON text, or a file that holds it."""
        if isinstance(recipe, str) and recipe.lstrip().startswith("{"):
            recipe = Recipe.from_json(recipe)
        elif not isinstance(recipe, Recipe):
            recipe = Recipe.load(Path(recipe))
        pipeline = cls()
        pipeline._recipe = recipe
        return pipeline

    @property
    def recipe(self) -> Recipe:
        """The frozen, JSON-able value behind the pipeline."""
        return self._recipe

    def to_json(self) -> str:
        """The recipe as JSON; ``from_recipe`` reads it."""
        return self._recipe.to_json()

    def read(self, source: Paths) -> Pipeline:
        """A checkpoint: a .safetensors file, a folder, an index.json, a glob, or a list of files."""
        paths = [source] if isinstance(source, str | os.PathLike) else source
        return self._with(replace(self._recipe, source=tuple(os.fspath(path) for path in paths)))

    def stage(self, verb: str, **options: Any) -> Pipeline:
        """Adds the stage behind ``verb``, or replaces the one there is."""
        return self._with(self._recipe.with_stage(make_stage(verb, options)))

    if TYPE_CHECKING:

        def target(self, *, preset: str = "auto", include: str | None = None, exclude: str | None = None,
                   rules: Any = (), fallback: str | None = None, heuristics: bool = False) -> Pipeline:  # fmt: skip
            """Chooses layers; see ``quantloom.stages.target.Target``."""

        def quantize(self, format: str, *, scaling: str | None = None, block_size: int | None = None,
                     rotate: str | None = None, rounding: str = "mse", **options: Any) -> Pipeline:  # fmt: skip
            """Quantizes the chosen layers; see ``quantloom.stages.quantize.Quantize``."""

        def quantized_as(self, model: str, *, statistics: str | None = None) -> Pipeline:
            """Takes a quantized model instead; see ``quantloom.stages.quantized_as.QuantizedAs``."""

        def lora(self, *, rank: int | str = 32, target: str | None = None, depth: int = 1, ar_threshold: float = 0.0,
                 method: str = "auto", budget: int | str | None = None, **options: Any) -> Pipeline:  # fmt: skip
            """Writes an adapter for what quantization took; see ``quantloom.stages.lora.Lora``."""

        def edit(self, *, add: Any = ..., remove: Sequence[str] = (), filter: str | None = None,
                 rebuild_header: bool = False) -> Pipeline:  # fmt: skip
            """Edits what a quantized checkpoint says of its layers; see ``quantloom.stages.edit.Edit``."""

        def input_scales(self, *, statistics: str | None = None, input_scale: str | None = None,
                         file: str | None = None, lora: str | None = None, **options: Any) -> Pipeline:  # fmt: skip
            """Stores activation scales; see ``quantloom.stages.input_scales.InputScales``."""

        def hybrid(self, *, mode: str | None = None, tensor_scales: str | None = None) -> Pipeline:
            """Makes MXFP8 layers hybrid MXFP8; see ``quantloom.stages.hybrid.Hybrid``."""

        def dequantize(self, dtype: str = "bf16", *, nonfinite: str = "refuse") -> Pipeline:
            """Decodes every quantized layer; see ``quantloom.stages.dequantize.Dequantize``."""

        def migrate(self, to: str = "comfy", *, input_scale: float | None = None, clean: bool = False,
                    cast: str | None = None, **options: Any) -> Pipeline:  # fmt: skip
            """Stores quantized layers in another form; see ``quantloom.stages.migrate.Migrate``."""

    def __getattr__(self, verb: str) -> Callable[..., Pipeline]:
        if verb.startswith("_"):
            raise AttributeError(verb)
        if verb not in VERBS:
            raise AttributeError(f"Pipeline has no verb {verb!r}{did_you_mean(verb, ('read', *VERBS, 'write'))}")

        def call(*args: Any, **options: Any) -> Pipeline:
            from dataclasses import fields

            from ..stages.stage import stage_class

            names = [item.name for item in fields(stage_class(verb))]
            if len(args) > 1:
                raise UsageError(f"{verb} takes one positional argument, {names[0]}; name the others")
            return self.stage(verb, **dict(zip(names, args, strict=False)), **options)

        return call

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *VERBS]

    @overload
    def write(self, path: str | os.PathLike[str], *, dialect: str = ..., shard_size: int | str | None = ...,
              overwrite: bool = ..., compute: Literal[True] = ...) -> Report: ...  # fmt: skip

    @overload
    def write(self, path: str | os.PathLike[str], *, dialect: str = ..., shard_size: int | str | None = ...,
              overwrite: bool = ..., compute: Literal[False]) -> Flow: ...  # fmt: skip

    def write(self, path: str | os.PathLike[str], *, dialect: str = "comfy", shard_size: int | str | None = None,
              overwrite: bool = False, compute: bool = True) -> Report | Flow:  # fmt: skip
        """Writes a ``.safetensors`` file, or shards into a folder: runs and returns the report.

        With ``compute=False`` nothing runs: the flow that comes back can be planned, drawn and computed.
        """
        output = Output(os.fspath(path), dialect, parse_size(shard_size, "shard size"), overwrite)
        flow = Flow(replace(self._recipe, output=output))
        return flow.compute() if compute else flow

    def _with(self, recipe: Recipe) -> Pipeline:
        return type(self).from_recipe(recipe)

    def __repr__(self) -> str:
        run = self._recipe.run
        shown = {name: value for name, value in vars(run).items() if value != getattr(Run(), name)}
        parts = [f"Pipeline({_arguments(shown)})"]
        if self._recipe.source:
            source = self._recipe.source
            parts.append(f"read({source[0] if len(source) == 1 else list(source)!r})")
        parts += [f"{stage.verb}({_arguments(_changed(stage))})" for stage in self._recipe.stages]
        return ".".join(parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self._recipe == other._recipe

    def __hash__(self) -> int:
        return hash(self.to_json())


def _changed(stage: Any) -> dict[str, Any]:
    """Options of a stage that differ from their defaults."""
    from dataclasses import fields

    values = stage.to_dict()
    return {item.name: values[item.name] for item in fields(stage) if values[item.name] not in (item.default, [], {})}


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


class Flow:
    """A lazy conversion: planned when asked, run by ``compute``."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._continued: Settled | None = None

    @cached_property
    def plan(self) -> Plan:
        """Everything that would happen, from headers alone, but for ranks that must be surveyed, and what an earlier
        run that can be continued had found; raises what ``make_plan`` raises."""
        from .output_files import log_of
        from .plan import make_plan
        from .resume import settled_before
        from .survey import settle_ranks

        plan = make_plan(self.recipe)
        self._continued = settled_before(plan, log_of(plan))
        return settle_ranks(plan) if self._continued is None else make_plan(self.recipe, self._continued)

    def visualize(self, path: str | os.PathLike[str]) -> Path:
        """Draws the stage graph: equal chains once, with their number, into an .svg; every node into a .dot."""
        from .draw import draw

        return draw(self.plan, Path(path))

    def simulate(self, cluster: str = "") -> Simulation:
        """How long it would take elsewhere: ``gpus=8,read=6GB/s``, as ``quantloom plan --simulate`` has it.

        Raises what planning raises, and UsageError for a cluster that cannot be.
        """
        from .budget import make_budget
        from .simulate import Cluster, simulate

        run = self.recipe.run
        return simulate(self.plan.layers, make_budget(self.plan.layers, run, ""), Cluster.parse(cluster, run))

    def compute(self, client: Client | str | None = None, progress: Progress | None = None) -> Report:
        """Runs on the recipe's scheduler, or on a Dask client or address."""
        from .execute import run_plan
        from .nonfinite import settle_nonfinite

        plan = self.plan
        return run_plan(settle_nonfinite(plan) if self._continued is None else plan, client, progress)

    def __repr__(self) -> str:
        output = self.recipe.output.path if self.recipe.output else ""
        return f"Flow({Pipeline.from_recipe(self.recipe)!r} -> {output!r})"
