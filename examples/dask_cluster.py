"""A conversion on a Dask cluster: one that this script starts, or one that runs already.

The same plan and graph run on every scheduler, and the files are the same, byte for byte. Only plans travel to the
workers and only receipts come back: workers read the source and write the output themselves, so both paths must mean
the same place everywhere. To start from a cluster of your own, give its address; clusters of dask-jobqueue,
dask-kubernetes or dask-cuda are used through their client in the same way.

    python examples/dask_cluster.py [FOLDER] [tcp://scheduler:8786]
"""

from __future__ import annotations

import sys

from distributed import Client, LocalCluster
from small_models import save_flux, working_folder

from quantloom import Pipeline


def main() -> None:
    folder = working_folder("dask_cluster")
    source = save_flux(folder / "flux.safetensors")
    pipeline = Pipeline().read(source).quantize("nvfp4")
    flow = pipeline.write(folder / "cluster.safetensors", overwrite=True, compute=False)
    if len(sys.argv) > 2:
        with Client(sys.argv[2]) as client:
            report = flow.compute(client)
    else:
        # One thread a worker: a conversion divides cores and memory by itself.
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster) as client,
        ):
            report = flow.compute(client)
    print(report.summary())
    here = pipeline.write(folder / "here.safetensors", overwrite=True)
    same = (folder / "cluster.safetensors").read_bytes() == (folder / "here.safetensors").read_bytes()
    print(f"beside {here.output}: {'the same bytes' if same else 'OTHER BYTES'}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":  # a cluster of processes imports this file again in each of them
    main()
