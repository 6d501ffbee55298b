"""What runs: pipeline, plan, Dask graph, execution, report, command line."""
