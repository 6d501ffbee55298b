"""quantloom for ComfyUI: formats that stock ComfyUI refuses, and error-correction LoRAs beside the matmul.

Copy this folder into ``ComfyUI/custom_nodes/``. Outside ComfyUI its modules can be imported too, and register nothing.
"""

import logging
import sys

from .node import ErrorCorrectionLora

NODE_CLASS_MAPPINGS = {"QuantloomErrorCorrectionLora": ErrorCorrectionLora}
NODE_DISPLAY_NAME_MAPPINGS = {"QuantloomErrorCorrectionLora": "Apply error-correction LoRA beside the matmul"}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

if "comfy.ops" in sys.modules:  # ComfyUI has imported it long before it loads custom nodes
    from .loading import install

    try:
        added = install(sys.modules["comfy.ops"], sys.modules["comfy.quant_ops"])
        logging.info("quantloom: formats added: %s", ", ".join(added) or "none, all are known already")
    except RuntimeError as error:
        logging.warning("quantloom: %s; the LoRA node works without them", error)
