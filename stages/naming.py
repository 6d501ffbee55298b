"""What a tensor's name and shape say by themselves: weights that stay as they are whatever the model is.

Three tables. Name rules: norms, embeddings, output heads, routers. Shape readers: layers by whose stored shape
ComfyUI recognises a model (``comfy/model_detection.py``, ``comfy/sd.py``); padding or packing them breaks loading or,
worse, the first forward. Unread encoders: text encoders that ComfyUI builds without looking for quantization markers,
so that it would take codes for plain numbers, silently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Shape = tuple[int, ...]

MIN_DIMENSION = 64
"""Heuristics: a narrower layer saves little, and a large part of it is its scales."""
MAX_ASPECT = 64
"""Heuristics: a longer layer is an adapter or a projection to few values, and sensitive."""

NORM, EMBEDDING, HEAD, ROUTER = "norm", "embedding", "output head", "router"


@dataclass(frozen=True)
class NameRule:
    """A kind of layer, known by the end of its name."""

    kind: str
    pattern: re.Pattern[str]
    """Searched in the name without ``.weight``."""
    reason: str
    outside_blocks: bool = False
    """Holds only outside numbered blocks: a block's own ``proj_out`` is a layer like others."""
    narrowing: bool = False
    """Holds only with fewer rows than columns: ``mlp.gate`` is a router (experts x width) or half of a gated MLP."""


def _rule(kind: str, pattern: str, reason: str, *, outside_blocks: bool = False, narrowing: bool = False) -> NameRule:
    return NameRule(kind, re.compile(r"(?:^|\.)(?:" + pattern + r")$"), reason, outside_blocks, narrowing)


_NOT_LINEAR = r"(?![^.]*(?:proj|linear|fc))"
_TABLES = r"pos|position|positional|token|tok|word|type|class|cls|label|lang|language|speaker|genre|query|cond_type"

NAME_RULES: tuple[NameRule, ...] = (
    _rule(NORM, _NOT_LINEAR + r"(?:[^.]*_)?(?i:(?:layer|rms|group|batch|instance)_?norm|norm|ln)(?:\d+|_[^.]*)?",
          "norm"),
    _rule(EMBEDDING, r"embed(?:_tokens[^.]*|_in|_positions|dings?)?|tok_embeddings|wte|wpe|emb|shared|codebook",
          "embedding table"),
    _rule(EMBEDDING, rf"(?:[^.]*_)?(?:{_TABLES})(?:_[^.]*)?_(?:emb|embeds?|embeddings?|embedder)(?:_table)?",
          "embedding table"),
    _rule(EMBEDDING, r"embedding_table|embed_image_indicator|image_index_embedding|addition_t_embedding",
          "embedding table"),
    _rule(EMBEDDING, r"[^.]*relative_attention_bias|rel(?:ative)?_pos(?:ition)?[^.]*", "position bias table"),
    _rule(HEAD, r"(?:[^.]*_)?lm_head(?:\.[^.]+)?|embed_out|(?:shared_)?head\.head|vocab_projector|qa_outputs|score",
          "output head"),
    _rule(HEAD, r"cls\..+|(?:[^.]*_)?classifier(?:\.[^.]+)?", "output head", outside_blocks=True),
    _rule(HEAD, r"head|output|[^.]*proj_out|[^.]*final_layer(?:\.[\d-]+)?\.(?:linear|[^.]*_out)|last\.linear",
          "output head", outside_blocks=True),
    _rule(HEAD, r"nerf_blocks\..+|nerf_image_embedder(?:\..+)?|nerf_final_layer[^.]*(?:\..+)?",
          "pixel decoder, the last step of the image"),
    _rule(HEAD, r"distilled_guidance_layer\..+", "guidance network: modulates every block, runs once per step"),
    _rule(ROUTER, r"router(?:\.[^.]+)?|gate\.wg|shared_expert_gate", "expert router"),
    _rule(ROUTER, r"(?:[^.]*(?:mlp|moe|ffn|feed_forward|ff_i|ff))\.gate", "expert router", narrowing=True),
)  # fmt: skip

_BLOCK = re.compile(r"(?:^|[._])(?:blocks?|layers?|h|refiner|experts)\.\d+\.")


def not_a_matrix(shape: Sequence[int]) -> str | None:
    """Why a weight of this shape is no linear layer, whatever its name; None for a matrix."""
    if len(shape) == 2:
        return "matrix without elements" if 0 in shape else None
    if len(shape) < 2:
        return ("scalar", "1-D (norm, scale or bias)")[len(shape)]
    return f"{len(shape)}-D convolution"


def _plain(name: str) -> str:
    return name.removesuffix(".weight")


_ANY_INDEX = re.compile(r"\.(?!(?:0|1|23)\.)\d+(?=\.)")
"""Numbers of blocks and experts that no rule below tells apart; 0, 1 and 23 stand in one."""


@lru_cache(maxsize=4)
def _folded(name: str) -> str:
    """The name with block and expert numbers folded, so that few are left to search: 100,000 layers have dozens.

    Several questions are asked of one layer before the next."""
    return _ANY_INDEX.sub(".9", _plain(name))


def name_rule(name: str, shape: Shape) -> NameRule | None:
    """The first rule that a matrix falls under by its name."""
    return _rule_of(_folded(name), shape)


@lru_cache(maxsize=1 << 14)
def _rule_of(base: str, shape: Shape) -> NameRule | None:
    in_block = _BLOCK.search(base) is not None
    for rule in NAME_RULES:
        if (rule.outside_blocks and in_block) or (rule.narrowing and not shape[0] < shape[1]):
            continue
        if rule.pattern.search(base):
            return rule
    return None


_INPUTS = (
    r"img_in|txt_in|vector_in|guidance_in|time_in|time_r_in|byt5_in|vision_in|cond_in|latent_in|proj_in|proj_out"
    r"|audio_proj_out|project_in|input_proj|first|head|label_emb|class_embedding|add_embedding|to_(?:global|cond|timestep)_embed"
    r"|(?:all_)?(?:x|y|t|cap|context|extra|siglip)_embedder|time_embedder|clip_text_pooled_proj|clip_txt_mapper|cond_seq_linear"
    r"|(?:\w*_)?patch_embedding\w*|patch_embed|text_embedding|time_caption_embed|visual_embeddings|(?:\w*_)?patch_proj"
    r"|(?:\w*_)?patchify_proj|condition_proj|ref_image_patch_embedder|lq_proj|dec_net|(?:all_)?final_layer|nerf_final_layer\w*"
    r"|txtfusion\.projector|llm_cond_proj"
)
_PADDED_TO_32 = ("mxfp8", "hybrid_mxfp8")
_READS_SHAPE = re.compile(rf"(?:^|\.)(?:{_INPUTS})(?:\.[\w-]+){{0,3}}$")
_FIRST_BLOCK = re.compile(
    r"(?:^|\.)(?:transformer_blocks\.0\.attn2\.to_k|blocks\.0\.norm1\.linear|encoder\.block\.23\.layer\.1\.DenseReluDense\.wi_1)$"
)


def reads_shape(name: str) -> str | None:
    """Why this layer's stored shape must be its true shape, or None: NVFP4 for example stores half the columns."""
    return _reads_shape(_folded(name))


@lru_cache(maxsize=1 << 14)
def _reads_shape(base: str) -> str | None:
    if _FIRST_BLOCK.search(base) or (_READS_SHAPE.search(base) and not _BLOCK.search(base)):
        return "ComfyUI reads this layer's shape to recognise the model"
    return None


def barred_formats(name: str, shape: Shape) -> dict[str, str]:
    """Formats in which ComfyUI would misread a matrix that it accepts in others, each with the reason."""
    rows, columns = shape
    rule = name_rule(name, shape)
    if rule and rule.kind == EMBEDDING:
        reason = "ComfyUI reads quantized embeddings in FP8 and INT8 only"
        return dict.fromkeys(("nvfp4", *_PADDED_TO_32), reason)
    reads = reads_shape(name)
    if reads is None:
        return {}
    barred = {"nvfp4": f"{reads}; NVFP4 stores two weights in a column"}
    if rows % 32 or columns % 32:
        barred |= dict.fromkeys(_PADDED_TO_32, f"{reads}; MXFP8 would pad {rows} x {columns} to multiples of 32")
    return barred


def awkward(shape: Shape) -> str | None:
    """Why a matrix is hardly worth quantizing (the ``heuristics`` option), or None."""
    rows, columns = shape
    small, large = min(shape), max(shape)
    if small < MIN_DIMENSION:
        return f"heuristics: {rows} x {columns} has a dimension below {MIN_DIMENSION}"
    if large > MAX_ASPECT * small:
        return f"heuristics: {rows} x {columns} has an aspect ratio of {large / small:.0f}, above {MAX_ASPECT}"
    return None


_CLIP = re.compile(r"^(?P<prefix>.*?)text_model\.encoder\.layers\.\d+\.(?:self_attn\.q_proj|mlp\.fc1)$", re.DOTALL)
_OPEN_CLIP = re.compile(r"^(?P<prefix>.*?)transformer\.resblocks\.\d+\.mlp\.c_fc$", re.DOTALL)
_T5 = re.compile(r"^(?P<prefix>.*?)encoder\.block\.\d+\.layer\.0\.SelfAttention\.q$", re.DOTALL)

_CLIP_NAMES = {768: "CLIP-L", 1024: "CLIP-H", 1280: "CLIP-G"}
_T5_NAMES = {512: "T5-small", 768: "T5-base", 1024: "T5-large", 1472: "ByT5-small", 2048: "T5-XL"}
_T5_11B_ROWS = 16384
"""Rows of a query of the first T5-11B, 1024 wide: ComfyUI loads it as it loads T5-XXL."""


def unread_text_encoder(keys_with_shapes: Iterable[tuple[str, Sequence[int]]]) -> list[tuple[str, str]]:
    """The text encoders whose quantization markers ComfyUI does not read.

    Returns (pattern, reason) per encoder; the pattern is anchored at the encoder's prefix and matches its layers, in a
    file of its own or inside a combined checkpoint. Names may end in ``.weight`` or not. Measured for CLIP-L
    (0 of 73 layers quantized, no warning, output error 0.92); the others are built by the same code. T5-XXL reads them.
    """
    found: dict[str, str] = {}
    for key, shape in keys_with_shapes:
        base = _plain(key)
        if len(shape) != 2 or not base.endswith((".q_proj", ".fc1", ".c_fc", ".q")):
            continue
        encoder = _recognise(base, shape)
        if encoder:
            found.setdefault(*encoder)
    return list(found.items())


def _recognise(base: str, shape: Sequence[int]) -> tuple[str, str] | None:
    width = shape[1]
    if match := _CLIP.match(base):
        pattern = r"(?:text_model\.|text_projection$)"
        name = _CLIP_NAMES.get(width, f"CLIP (width {width})")
    elif (match := _OPEN_CLIP.match(base)) and not match["prefix"].endswith("visual."):
        pattern = r"(?:transformer\.resblocks\.|text_projection$)"
        name = _CLIP_NAMES.get(width, f"CLIP (width {width})")
    elif (match := _T5.match(base)) and width != 4096 and shape[0] != _T5_11B_ROWS:
        pattern = r"(?:encoder|decoder)\.block\."
        name = _T5_NAMES.get(width, f"T5 (width {width})")
    else:
        return None
    reason = f"{name} text encoder: ComfyUI reads no quantization markers there and would use codes as numbers"
    return "^" + re.escape(match["prefix"]) + pattern, reason
