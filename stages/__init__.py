"""What happens to one layer: targeting, decoding, rotation, scaling, rounding, packing. Knows formats, not Dask."""
