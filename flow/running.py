"""What commands do with a recipe: run it, or show what it would do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..formats.errors import QuantloomError
from . import console
from .entry import STOPPED
from .options import one_stage_recipe

if TYPE_CHECKING:
    from .plan import Plan
    from .recipe import Recipe

Talking = dict[str, Any]
"""Options of a command, among them ``quiet``, ``verbose`` and ``as_json``."""


def run(recipe: Recipe, talking: Talking) -> None:
    """Runs it with progress, and prints the report."""
    from .pipeline import Flow

    quiet, as_json = talking["quiet"], talking["as_json"]
    console.run_flow(Flow(recipe), quiet or as_json, as_json)


def show(recipe: Recipe, talking: Talking, named: bool = True) -> None:
    """Prints the plan. ``named``: the user named the output, so that what forbids it is worth a warning."""
    from .budget import make_budget
    from .plan import make_plan

    made = make_plan(recipe)
    budget = make_budget(made.layers, recipe.run, "")
    if named:
        made = _with_refusal(made)
    if talking["as_json"]:
        console.print_json(made.to_dict(budget))
    elif not talking["quiet"]:
        console.print_plan(made, budget, talking["verbose"] > 0)


def run_stage(verb: str, values: dict[str, Any], source: str, destination: str, options: dict[str, Any]) -> int:
    """A command that is one stage, with its ``values`` (None: not given); ``options`` are those of ``options.WRITING``,
    ``TALKING`` and ``DRY_RUN``. Returns the exit status."""

    def action() -> int:
        console.setup_logging(-1 if options["quiet"] else options["verbose"])
        recipe = one_stage_recipe(verb, values, source, destination, options)
        (show if options["dry_run"] else run)(recipe, options)
        return 0

    return console.guarded(action, STOPPED)


def _with_refusal(made: Plan) -> Plan:
    """The plan with a warning where the run would not even start: the output exists, the disk is too small."""
    from .sink import check_output

    try:
        check_output(made)
    except QuantloomError as error:
        return replace(made, warnings=(*made.warnings, f"the run would be refused: {error}"))
    return made
