"""The loader node. ComfyUI's modules are imported when it runs."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from .correction import DIFFUSION, ENCODERS, AdapterFile, Beside, Placed, place, read_adapter, some


def attach(patcher: Any, placed: Placed, strength: float) -> None:
    """Makes a patcher, which is nobody else's, apply corrections while its model is loaded."""
    from comfy.patcher_extension import PatcherInjection

    beside = Beside(placed.layers, strength)
    # Two patchers with equal keys pass for the same model, and the corrections of one would stay with the other.
    patcher.set_injections(f"quantloom_correction_{uuid.uuid4().hex}", [PatcherInjection(beside.inject, beside.eject)])


class ErrorCorrectionLora:
    """Applies an error-correction LoRA beside the matmul."""

    DESCRIPTION = "Adds an error-correction LoRA to the outputs of quantized layers, and leaves their weights alone."
    CATEGORY = "loaders/quantloom"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "report")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import folder_paths

        strength = {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "lora_name": (folder_paths.get_filename_list("loras"),),
                "strength": ("FLOAT", strength),
            },
            "optional": {"clip": ("CLIP",)},
        }

    def apply(self, model: Any, lora_name: str, strength: float, clip: Any = None) -> tuple[Any, Any, str]:
        """Clones of model and clip that apply the LoRA, and what was done. At strength 0, both as they are.

        Raises ValueError where the file does not fit the model, and where none of its layers is in it.
        """
        if strength == 0:
            return model, clip, f"{lora_name}: strength 0, nothing to apply"
        import comfy.utils
        import folder_paths

        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        file = read_adapter(comfy.utils.load_torch_file(path, safe_load=True), lora_name)
        parts = [
            place(layers, each.model, lora_name) if each is not None else Placed({}, (), ())
            for layers, each in zip(_split(file), (model, getattr(clip, "patcher", None)), strict=True)
        ]
        lines = _report(file, parts, clip is not None)
        if not any(part.layers for part in parts):
            raise ValueError("\n".join([f"{lora_name}: no layer of it is in this model", *lines]))
        lines.insert(0, f"{lora_name}: {sum(len(part.layers) for part in parts)} layers at strength {strength:g}")
        if parts[0].layers:
            model = model.clone()
            attach(model, parts[0], strength)
        if parts[1].layers:
            clip = clip.clone()
            attach(clip.patcher, parts[1], strength)
        for line in lines[1:]:
            logging.warning("%s: %s", lora_name, line)
        return model, clip, "\n".join(lines)


def _split(file: AdapterFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Layers of the diffusion model and of text encoders, under the paths of their modules."""
    diffusion = {name: each for name, each in file.layers.items() if name.startswith(DIFFUSION)}
    encoders = {name.removeprefix(ENCODERS): each for name, each in file.layers.items() if name not in diffusion}
    return diffusion, encoders


def _report(file: AdapterFile, parts: list[Placed], has_clip: bool) -> list[str]:
    """What was not applied, and why."""
    encoders = [name for name in file.layers if name.startswith(ENCODERS)]
    lines = []
    if encoders and not has_clip:
        lines.append(f"layers of text encoders, not applied because clip is not connected: {some(encoders)}")
    absent = [name for part in parts for name in part.absent]
    if absent:
        lines.append(f"layers that are not in this model: {some(absent)}")
    if file.foreign:
        lines.append(f"keys of another dialect: {some(file.foreign)}; write the adapter with --lora-dialect comfy")
    plain = [name for part in parts for name in part.unquantized]
    if plain:
        lines.append(f"layers that are not quantized, so a correction makes them worse: {some(plain)}")
    return lines
