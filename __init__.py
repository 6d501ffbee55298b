"""quantloom: streams model checkpoints of any size into quantized ones through a Dask graph of stages."""
