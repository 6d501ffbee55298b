"""Converts on workers that SLURM starts: one job for each worker, one GPU for each job.

    python examples/cluster/slurm.py SOURCE OUTPUT --jobs 8 --partition gpu
    python examples/cluster/slurm.py SOURCE OUTPUT --jobs 2 --local       # the same without SLURM, to try it

Source and output must lie on storage that every node mounts at the same path. The script itself may run on a login
node: it plans, sends plans and collects receipts, and needs no GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

from distributed import Client

from quantloom import Pipeline


def make_cluster(arguments: argparse.Namespace) -> Any:
    """dask-jobqueue's cluster; its jobs end with it."""
    import dask_jobqueue

    # One process a job; its threads are tasks at a time. Six keep a GPU busy: one computes, others read and write.
    common = {"processes": 1, "cores": arguments.tasks, "memory": arguments.memory, "death_timeout": 60}
    if arguments.local:
        from dask_jobqueue.local import LocalCluster

        return LocalCluster(**common, scheduler_options={"dashboard_address": "127.0.0.1:0"})
    return dask_jobqueue.SLURMCluster(
        **common, queue=arguments.partition, walltime=arguments.walltime,
        job_extra_directives=["--gres=gpu:1"] if arguments.device == "cuda" else [],
        worker_extra_args=["--no-dashboard"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--rounding", default="mse")
    parser.add_argument("--device", default="cpu", help="cuda: each job gets a GPU")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=6, help="tasks at a time of each job")
    parser.add_argument("--memory", default="32GB", help="of each job")
    parser.add_argument("--partition")
    parser.add_argument("--walltime", default="02:00:00")
    parser.add_argument("--local", action="store_true", help="jobs are processes of this machine")
    arguments = parser.parse_args()
    pipeline = Pipeline(device=arguments.device, memory=arguments.memory).read(arguments.source)
    flow = pipeline.quantize(arguments.format, rounding=arguments.rounding).write(arguments.output, compute=False)
    with make_cluster(arguments) as cluster, Client(cluster) as client:
        cluster.scale(jobs=arguments.jobs)
        client.wait_for_workers(1, timeout=3600)
        print(flow.compute(client).summary())


if __name__ == "__main__":
    main()
