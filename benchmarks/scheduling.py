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
from typing import Any

from dask._task_spec import Task

from quantloom import Pipeline
from quantloom.flow.budget import make_budget
from quantloom.flow.graph import Graph, Key, batches
from quantloom.flow.simulate import Cluster, simulate
from quantloom.stages.work import Environment, LayerPlan, Receipt


def no_work(plans: Sequence[LayerPlan], environment: Environment) -> list[Receipt]:
    """Receipts of layers that nobody converted."""
    return [Receipt(plan.layer.name, plan.format, plan.layer.nbytes, plan.nbytes_out, 0.0) for plan in plans]


def idle_graph(layers: Sequence[LayerPlan], environment: Environment) -> tuple[Graph, list[Key]]:
    graph: Graph = {}
    for number, batch in enumerate(batches(layers)):
        key = (environment.run_id, "batch", str(number))
        graph[key] = Task(key, no_work, tuple(batch), environment)
    return graph, list(graph)


Run = Callable[[Graph, list[Key]], int]
"""Runs a graph; returns the number of receipts."""


def timed(run: Run, graph: Graph, keys: list[Key]) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds of this process (client and scheduler, and whoever works in it), receipts."""
    wall, cpu = time.perf_counter(), time.process_time()
    done = run(graph, keys)
    return time.perf_counter() - wall, time.process_time() - cpu, done


def on_threads(graph: Graph, keys: list[Key]) -> tuple[float, float, int]:
    from dask.threaded import get

    return timed(lambda graph, keys: sum(map(len, get(graph, keys, num_workers=2))), graph, keys)


def on_cluster(processes: bool, graph: Graph, keys: list[Key]) -> tuple[float, float, int]:
    """Without the time that the cluster takes to start and to end."""
    import distributed

    place = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "processes": processes, **place}
    with distributed.LocalCluster(**options, memory_limit=None) as cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(2)
        client.submit(int, 0).result()

        def run(graph: Graph, keys: list[Key]) -> int:
            futures = client.get(graph, keys, sync=False)
            return sum(len(done) for _, done in distributed.as_completed(futures, with_results=True))

        return timed(run, graph, keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--rounding", default="mse")
    parser.add_argument("--simulate", default="gpus=8,read=6GB/s")
    parser.add_argument("--on", default="threads,threads of distributed,processes of distributed")
    args = parser.parse_args()
    pipeline = Pipeline().read(args.model).quantize(args.format, rounding=args.rounding)
    flow = pipeline.write("quantized/", compute=False)
    layers, run = flow.plan.layers, flow.recipe.run
    budget = make_budget(layers, run, "idle")
    seconds = simulate(layers, budget, Cluster.parse(args.simulate, run)).outcomes[0].seconds
    graph, keys = idle_graph(layers, budget.environment)
    size = sum(len(pickle.dumps(task)) for task in list(graph.values())[::50]) * 50
    print(f"{len(layers)} layers, {len(graph)} tasks, {size / len(layers):.0f} bytes a layer; modelled {seconds:.0f} s")
    for where in args.on.split(","):
        if where == "threads":
            wall, cpu, done = on_threads(graph, keys)
        else:
            wall, cpu, done = on_cluster(where.startswith("processes"), graph, keys)
        assert done == len(layers)
        found = {
            "on": where, "wall_s": round(wall, 2), "us_per_task": round(wall / len(graph) * 1e6),
            "cpu_us_per_task": round(cpu / len(graph) * 1e6), "share": round(wall / seconds, 4),
        }  # fmt: skip
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
