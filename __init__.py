"""quantloom: streams model checkpoints of any size into quantized ones through a Dask graph of stages."""

__version__ = "0.1.0"

from quantloom.flow.calibrate import calibrate
from quantloom.flow.pipeline import Flow, Pipeline
from quantloom.flow.recipe import Recipe
from quantloom.formats.errors import QuantloomError

__all__ = ["Flow", "Pipeline", "QuantloomError", "Recipe", "__version__", "calibrate"]
