"""Diffusion models as diffusers loads them, and batches of random latents, timesteps and text embeddings.

Shapes are read from the model's own configuration. One entry in ``_INPUTS`` per class: what its ``forward`` takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.errors import CheckpointError, UsageError
from .sizes import count
from .token_batches import Amount

if TYPE_CHECKING:
    import torch
    from torch import nn

MISSING = "calibrating a diffusion model needs diffusers: pip install 'quantloom[calibrate]'"
_TEXT_TOKENS = 64
_LATENT_SIDE = 32
"""Latents are at most this many pixels high and wide."""


@dataclass(frozen=True)
class Draw:
    """Random inputs of one batch."""

    config: Any
    """The model's configuration."""
    size: int
    """Samples in the batch."""
    image_tokens: int
    """Image tokens of models that take latents as sequences."""
    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal (size, *shape)."""
        import torch

        return torch.randn((self.size, *shape), generator=self.generator).to(self.dtype)

    def text(self, width: int) -> torch.Tensor:
        """Text embeddings (size, tokens, width)."""
        return self.normal(_TEXT_TOKENS, width)

    def time(self, largest: float) -> torch.Tensor:
        """Timesteps (size,), uniform."""
        import torch

        return (torch.rand(self.size, generator=self.generator) * largest).to(self.dtype)

    def picture(self, channels: int) -> torch.Tensor:
        """Latents (size, channels, h, w)."""
        side = getattr(self.config, "sample_size", None) or _LATENT_SIDE
        side = min(side if isinstance(side, int) else min(side), _LATENT_SIDE)
        return self.normal(channels, side, side)


def _flux(draw: Draw) -> dict[str, Any]:
    import torch

    config, side = draw.config, math.isqrt(draw.image_tokens)
    axes = len(getattr(config, "axes_dims_rope", (0, 0, 0)))
    places = torch.zeros(side * side, axes)
    places[:, 1] = torch.arange(side).repeat_interleave(side)
    places[:, 2] = torch.arange(side).repeat(side)
    made: dict[str, Any] = {
        "hidden_states": draw.normal(side * side, config.in_channels),
        "encoder_hidden_states": draw.text(config.joint_attention_dim),
        "timestep": draw.time(1.0),
        "img_ids": places,
        "txt_ids": torch.zeros(_TEXT_TOKENS, axes),
    }
    if getattr(config, "pooled_projection_dim", None):
        made["pooled_projections"] = draw.normal(config.pooled_projection_dim)
    if getattr(config, "guidance_embeds", False):
        made["guidance"] = torch.full((draw.size,), 3.5, dtype=draw.dtype)
    return made


def _sd3(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.picture(draw.config.in_channels),
        "encoder_hidden_states": draw.text(draw.config.joint_attention_dim),
        "pooled_projections": draw.normal(draw.config.pooled_projection_dim),
        "timestep": draw.time(1000.0),
    }


def _captioned(draw: Draw) -> dict[str, Any]:
    made: dict[str, Any] = {
        "hidden_states": draw.picture(draw.config.in_channels),
        "encoder_hidden_states": draw.text(draw.config.caption_channels),
        "timestep": draw.time(1000.0),
    }
    if getattr(draw.config, "norm_type", "") == "ada_norm_single":
        made["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return made


def _wan(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(draw.config.in_channels, 2, _LATENT_SIDE // 2, _LATENT_SIDE // 2),
        "encoder_hidden_states": draw.text(draw.config.text_dim),
        "timestep": draw.time(1000.0),
    }


def _unet(draw: Draw) -> dict[str, Any]:
    import torch

    config = draw.config
    made: dict[str, Any] = {
        "sample": draw.picture(config.in_channels),
        "timestep": draw.time(1000.0).long(),
        "encoder_hidden_states": draw.text(config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        times = 6 * config.addition_time_embed_dim
        made["added_cond_kwargs"] = {
            "text_embeds": draw.normal(config.projection_class_embeddings_input_dim - times),
            "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).repeat(draw.size, 1).to(draw.dtype),
        }
    return made


_INPUTS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "PixArtTransformer2DModel": _captioned,
    "SanaTransformer2DModel": _captioned,
    "WanTransformer3DModel": _wan,
    "UNet2DConditionModel": _unet,
}


def load_diffusion_model(folder: Path, class_name: str, device: str) -> nn.Module:
    """The model in a folder, float32 on a CPU and bfloat16 elsewhere. Raises UsageError or CheckpointError."""
    if class_name not in _INPUTS:
        raise UsageError(
            f"{folder}: what a {class_name} is called with is not known here ({', '.join(_INPUTS)} are); "
            "load it and call quantloom.calibrate(model, batches) from Python"
        )
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise UsageError(MISSING) from error
    cls = getattr(diffusers, class_name, None)
    if cls is None:
        raise UsageError(f"{folder}: diffusers {diffusers.__version__} has no {class_name}; install a newer one")
    voice: Any = diffusers.utils.logging
    voice.set_verbosity_error()
    voice.disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        model: nn.Module
        model, loaded = cls.from_pretrained(
            str(folder), local_files_only=True, torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: diffusers cannot load it: {first}") from error
    if missing := sorted(loaded.get("missing_keys") or ()):  # diffusers leaves them without memory
        raise CheckpointError(
            f"{folder}: lacks {count(len(missing), 'tensor')} of {class_name}, {missing[0]} first: give the model's "
            "folder in the form of diffusers, such as transformer/ of its repository; ComfyUI's names are others"
        )
    return model.to(device)


def random_batches(model: Any, amount: Amount, seed: int) -> list[dict[str, Any]]:
    """Batches of random inputs with about ``amount.tokens`` text and latent tokens in all; each sample has its time."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    samples = max(1, math.ceil(amount.tokens / amount.sequence_length))
    image_tokens = max(16, amount.sequence_length - _TEXT_TOKENS)
    batches: list[dict[str, Any]] = []
    for first in range(0, samples, amount.batch_size):
        size = min(amount.batch_size, samples - first)
        draw = Draw(model.config, size, image_tokens, generator, dtype)
        batches.append({**_INPUTS[type(model).__name__](draw), "return_dict": False})
    return batches
