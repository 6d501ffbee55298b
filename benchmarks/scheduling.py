"""What Dask takes for the graph of a plan when its steps do nothing: seconds, and microseconds a task.

    python benchmarks/scheduling.py MODEL --format nvfp4                # threads, and a local cluster of processes
    python benchmarks/giant.py giant/ --kind fp8 && python benchmarks/scheduling.py giant/ --format nvfp4

The tasks are those of a real run, with the same plans as arguments; only their function is another one, which answers
with the receipts. The share is that of the run that ``plan --simulate`` would predict for ``--simulate``.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest import mock

import quantloom.flow.graph
from quantloom import Pipeline
from quantloom.flow.budget import Budget, make_budget
from quantloom.flow.cluster import run_distributed
from quantloom.flow.graph import Failure, Graph, LayersOf, Results, batches, submission
from quantloom.flow.local_cluster import local_client
from quantloom.flow.packed_tasks import pack_tasks
from quantloom.flow.placement import Placement
from quantloom.flow.simulate import Cluster, simulate
from quantloom.stages.work import Environment, LayerPlan, Receipt


def no_work(plans: Sequence[LayerPlan], environment: Environment) -> list[Receipt]:
    """Receipts of layers that nobody converted."""
    return [Receipt(plan.layer.name, plan.format, plan.layer.nbytes, plan.nbytes_out, 0.0) for plan in plans]


def idle_graph(layers: Sequence[LayerPlan], environment: Environment) -> tuple[Graph, LayersOf]:
    """The graph of a run whose layers are all chains (no row ranges, no shared solutions), with ``no_work`` in it."""
    from scheduling import no_work  # by its module: what belongs to a script itself is pickled with all its code

    with mock.patch.object(quantloom.flow.graph, "run_chains", no_work):
        return submission([batch for batch in batches(layers) if not batch[0].parts], environment)


@dataclass(frozen=True)
class Cost:
    """What a graph took."""

    wall: float
    cpu: float
    """Seconds of this process: client and scheduler, and whoever works in it."""
    receipts: int


def timed(run: Callable[[], int]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    done = run()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, done)


def count(results: Results) -> int:
    """Receipts of a running graph; a failed task ends the benchmark."""
    total = 0
    for key, found in results:
        if isinstance(found, Failure):
            raise SystemExit(f"{key}: {found.error}")
        total += len(found)
    return total


def on_threads(graph: Graph, layers_of: LayersOf) -> Cost:
    from dask.threaded import get

    return timed(lambda: sum(map(len, get(graph, list(layers_of), num_workers=2))))


def on_processes(graph: Graph, layers_of: LayersOf, budget: Budget) -> Cost:
    """On worker processes of this machine, without the time that they take to start and to end."""
    import distributed

    with ExitStack() as stack:
        client = local_client(distributed, "distributed", budget, stack)
        client.run(no_work, (), budget.environment)  # workers import what tasks need
        return timed(lambda: count(run_distributed(client, graph, layers_of, budget, Placement())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--rounding", default="mse")
    parser.add_argument("--simulate", default="gpus=8,read=6GB/s")
    parser.add_argument("--on", default="threads,distributed")
    parser.add_argument("--processes", type=int, default=2, help="workers of distributed")
    args = parser.parse_args()
    pipeline = Pipeline().read(args.model).quantize(args.format, rounding=args.rounding)
    flow = pipeline.write("quantized/", compute=False)
    layers, run = flow.plan.layers, flow.recipe.run
    budget = make_budget(layers, run, "idle")
    seconds = simulate(layers, budget, Cluster.parse(args.simulate, run)).outcomes[0].seconds
    graph, layers_of = idle_graph(layers, budget.environment)
    expected = sum(map(len, layers_of.values()))
    size = sum(len(pickle.dumps(task)) for task in pack_tasks(graph).values())
    print(f"{expected} layers, {len(graph)} tasks, {size / len(graph):.0f} bytes a task; modelled {seconds:.0f} s")
    for where in args.on.split(","):
        if where == "threads":
            cost = on_threads(graph, layers_of)
        else:
            cost = on_processes(graph, layers_of, replace(budget, workers=args.processes))
        assert cost.receipts == expected
        found = {
            "on": where, "wall_s": round(cost.wall, 2), "us_per_task": round(cost.wall / len(graph) * 1e6),
            "cpu_us_per_task": round(cost.cpu / len(graph) * 1e6), "share": round(cost.wall / seconds, 4),
        }  # fmt: skip
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
