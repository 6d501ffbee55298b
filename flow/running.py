"""What commands do with a recipe: run it, or show what it would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..formats.errors import QuantloomError
from . import console
from .entry import STOPPED
from .options import one_stage_recipe

if TYPE_CHECKING:
    from .plan import Plan
    from .recipe import Recipe

Options = dict[str, Any]
"""Options of a command, among them ``quiet``, ``verbose`` and ``as_json``."""


def run_recipe(make: Callable[[], Recipe], options: Options) -> int:
    """A command that runs a recipe with progress and prints the report; with ``dry_run`` among its options it shows the
    plan instead. Returns the exit status."""

    def action() -> int:
        from .pipeline import Flow

        quiet, as_json = options["quiet"], options["as_json"]
        console.setup_logging(-1 if quiet else options["verbose"])
        recipe = make()
        if options.get("dry_run"):
            show_plan(recipe, options)
        else:
            console.run_flow(Flow(recipe), quiet or as_json, as_json)
        return 0

    return console.guarded(action, STOPPED)


def run_stage(verb: str, values: dict[str, Any], source: str, destination: str, options: Options) -> int:
    """``run_recipe`` for a command that is one stage, with its ``values`` (None: not given); ``options`` are those of
    ``options.WRITING``, ``DRY_RUN`` and ``TALKING``."""
    return run_recipe(lambda: one_stage_recipe(verb, values, source, destination, options), options)


def show_plan(recipe: Recipe, options: Options, named: bool = True) -> None:
    """Prints the plan. ``named``: the user named the output, so that what forbids it is worth a warning."""
    from .budget import make_budget
    from .pipeline import Flow

    flow = Flow(recipe)
    made = flow.plan
    simulation = None if options.get("simulate") is None else flow.simulate(options["simulate"])
    budget = make_budget(made.layers, recipe.run, "")
    if named:
        made = _with_refusal(made)
    if options["as_json"]:
        more = {} if simulation is None else {"simulation": simulation.to_dict()}
        console.print_json({**made.to_dict(budget), **more})
    elif not options["quiet"]:
        console.print_plan(made, budget, options["verbose"] > 0)
        if simulation is not None:
            console.print_text(simulation.explain())


def _with_refusal(made: Plan) -> Plan:
    """The plan with a warning where the run would not even start (the output exists, the disk is too small, another
    run was stopped there), and a note where it would continue."""
    from .output_checks import check_output
    from .output_files import log_of
    from .resume import earlier_run, finished
    from .session import standing

    try:
        check_output(made)
        if (record := earlier_run(made, log_of(made))) is not None:
            names = {receipt.name for receipt in finished(made, record.receipts, ())}
            note = f"an earlier run would be continued: {standing(len(names), made)}"
            made = replace(made, notes=(*made.notes, note))
    except QuantloomError as error:
        return replace(made, warnings=(*made.warnings, f"the run would be refused: {error}"))
    return made
