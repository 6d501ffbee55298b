"""Bytes and numbers: formats, dialects, safetensors files. Knows torch and bytes, nothing of stages or Dask."""
