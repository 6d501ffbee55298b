"""Targeting: which layers are quantized, who decides, and the reasons that people read."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantloom.formats.errors import UsageError
from quantloom.stages.decisions import Candidate, Decision, TargetingResult
from quantloom.stages.naming import (
    ROUTER,
    awkward,
    barred_formats,
    name_rule,
    not_a_matrix,
    reads_shape,
    unread_text_encoder,
)
from quantloom.stages.presets import load_presets
from quantloom.stages.rules import Rule
from quantloom.stages.stage import make_stage
from quantloom.stages.targeting import Targeting

W = (3072, 3072)


def layers(*names: str, shape: tuple[int, ...] = W) -> list[Candidate]:
    return [Candidate(name, shape, "BF16") for name in names]


FLUX = layers(
    "img_in", "txt_in", "time_in.in_layer", "final_layer.linear", "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_attn.proj", "double_blocks.0.img_mlp.0", "double_blocks.1.img_attn.qkv",
    "single_blocks.0.linear1", "single_blocks.0.modulation.lin",
)  # fmt: skip
LLAMA = layers(
    "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.down_proj",
)  # fmt: skip
QKV, MLP = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"


def kept(result: TargetingResult) -> dict[str, str]:
    return {name: decision.keep for name, decision in result.decisions.items() if decision.keep is not None}


# ---- names ----


def kept_by_name(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a weight stays unquantized by default."""
    if fact := not_a_matrix(shape):
        return fact
    rule = name_rule(name, shape)
    return rule.reason if rule else None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.norm", "norm"),
        ("model.layers.0.input_layernorm", "norm"),
        ("encoder.layer.0.output.LayerNorm", "norm"),
        ("blocks.0.norm1", "norm"),
        ("blocks.0.attn.norm_added_q", "norm"),
        ("h.0.ln_1", "norm"),
        ("visual.merger.ln_q", "norm"),
        ("model.embed_tokens", "embedding table"),
        ("model.embed_tokens_per_layer", "embedding table"),
        ("transformer.wte", "embedding table"),
        ("shared", "embedding table"),
        ("encoder.embed_tokens", "embedding table"),
        ("embeddings.word_embeddings", "embedding table"),
        ("embeddings.position_embeddings", "embedding table"),
        ("embeddings.token_type_embeddings", "embedding table"),
        ("text_model.embeddings.position_embedding", "embedding table"),
        ("visual.pos_embed", "embedding table"),
        ("cond_type_embedding", "embedding table"),
        ("embed_image_indicator", "embedding table"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "position bias table"),
        ("lm_head", "output head"),
        ("score", "output head"),
        ("classifier", "output head"),
        ("cls.predictions.decoder", "output head"),
        ("head.head", "output head"),
        ("model.layers.61.shared_head.head", "output head"),
        ("proj_out", "output head"),
        ("model.diffusion_model.proj_out", "output head"),
        ("model.diffusion_model.final_layer.linear", "output head"),
        ("all_final_layer.2-1.linear", "output head"),
        ("last.linear", "output head"),
        ("model.layers.0.mlp.router", "expert router"),
        ("model.layers.0.mlp.shared_expert_gate", "expert router"),
        ("nerf_blocks.0.param_generator", "pixel decoder, the last step of the image"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_names_that_stay(name: str, reason: str, suffix: str) -> None:
    assert kept_by_name(name + suffix, W) == reason


@pytest.mark.parametrize(
    "name",
    [
        "time_embedding.0", "text_embedding.2", "time_projection.1", "x_embedder", "t_embedder.mlp.0",
        "context_embedder", "transformer_blocks.0.norm1.linear", "norm_out.linear", "img_in", "time_in.in_layer",
        "single_transformer_blocks.0.proj_out", "middle_block.1.proj_out", "input_blocks.4.1.proj_out",
        "model.layers.0.mlp.gate_proj", "blocks.0.attn.gate", "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.output.dense", "pooler.dense", "label_emb.0.0", "add_embedding.linear_1",
        "model.layers.0.mlp.shared_experts.up_proj", "double_blocks.0.img_mod.lin", "final_layer.adaLN_modulation.1",
        "model.layers.0.self_attn.o_proj", "encoder.block.0.layer.1.DenseReluDense.wo", "lower_classifiers.0.fc",
        "multi_modal_projector.linear_1", "visual.merger.mlp.0", "blocks.0.cross_attn.norm_proj",
    ],
)  # fmt: skip
def test_names_of_linear_layers(name: str) -> None:
    assert kept_by_name(name, W) is None


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((), "scalar"),
        ((64,), "1-D (norm, scale or bias)"),
        ((64, 64, 3), "3-D convolution"),
        ((64, 16, 1, 2, 2), "5-D convolution"),
        ((0, 64), "matrix without elements"),
    ],
)
def test_only_matrices_are_quantized(shape: tuple[int, ...], reason: str) -> None:
    assert kept_by_name("blocks.0.proj", shape) == reason


def test_a_gate_is_a_router_only_if_it_narrows() -> None:
    router = name_rule("model.layers.0.mlp.gate", (64, 2048))
    assert router is not None
    assert router.kind == ROUTER
    assert name_rule("blocks.0.mlp.gate", (16384, 6144)) is None


@pytest.mark.parametrize(
    "name",
    [
        "img_in", "txt_in", "vector_in.in_layer", "guidance_in.out_layer", "time_in.in_layer", "final_layer.linear",
        "final_layer.adaLN_modulation.1", "proj_in", "proj_out", "x_embedder", "x_embedder.proj.1", "patch_embedding",
        "text_embedding.0", "head.head", "cap_embedder.1", "txt_in.input_embedder", "first", "txtfusion.projector",
        "transformer_blocks.0.attn2.to_k", "input_blocks.4.1.transformer_blocks.0.attn2.to_k", "label_emb.0.0",
        "y_embedder.mlp.0", "t_embedder.mlp.0", "encoder.block.23.layer.1.DenseReluDense.wi_1",
        "time_caption_embed.caption_embedder.1", "all_x_embedder.2-1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_layers_whose_shape_is_read(prefix: str, name: str) -> None:
    assert reads_shape(prefix + name) is not None


@pytest.mark.parametrize(
    "name",
    [
        QKV, "single_transformer_blocks.0.proj_out", "middle_block.1.proj_in", "transformer_blocks.1.attn2.to_k",
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv", "blocks.0.self_attn.q",
        "noise_refiner.0.attention.qkv", "model.layers.0.self_attn.q_proj",
        "encoder.block.0.layer.1.DenseReluDense.wi_1",
    ],
)  # fmt: skip
def test_layers_whose_shape_is_not_read(name: str) -> None:
    assert reads_shape(name) is None
    assert barred_formats(name, W) == {}


def test_barred_formats() -> None:
    assert set(barred_formats("img_in", (3072, 64))) == {"nvfp4"}
    assert set(barred_formats("x_embedder", (3840, 68))) == {"nvfp4", "mxfp8", "hybrid_mxfp8"}
    assert "3840 x 68" in barred_formats("x_embedder", (3840, 68))["mxfp8"]
    assert set(barred_formats("model.embed_tokens", (32000, 4096))) == {"nvfp4", "mxfp8", "hybrid_mxfp8"}


# ---- text encoders that ComfyUI does not read markers for ----


def clip(width: int, prefix: str = "") -> list[Candidate]:
    base = f"{prefix}text_model.encoder.layers.0."
    found = layers(base + "self_attn.q_proj", base + "self_attn.out_proj", shape=(width, width))
    found += [Candidate(base + "mlp.fc1", (4 * width, width), "F16")]
    return [*found, Candidate(f"{prefix}text_model.embeddings.token_embedding", (49408, width), "F16")]


def open_clip(width: int, prefix: str = "") -> list[Candidate]:
    base = f"{prefix}transformer.resblocks.0."
    return [
        Candidate(base + "mlp.c_fc", (4 * width, width), "F16"),
        Candidate(base + "attn.out_proj", (width, width), "F16"),
        Candidate(base + "ln_1", (width,), "F16"),
    ]


def t5(width: int, prefix: str = "", rows: int | None = None) -> list[Candidate]:
    base = f"{prefix}encoder.block.0.layer."
    found = layers(base + "0.SelfAttention.q", shape=(rows or width, width))
    found += layers(base + "1.DenseReluDense.wo", shape=(width, 4 * width))
    return [*found, Candidate(f"{prefix}shared", (32128, width), "F16")]


@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        (clip(768), "CLIP-L"),
        (clip(1280), "CLIP-G"),
        (clip(1024), "CLIP-H"),
        (clip(512), "CLIP (width 512)"),
        (open_clip(1280), "CLIP-G"),
        (t5(2048), "T5-XL"),
        (t5(768), "T5-base"),
        (clip(768, "cond_stage_model.transformer."), "CLIP-L"),
        (clip(768, "conditioner.embedders.0.transformer."), "CLIP-L"),
        (open_clip(1280, "conditioner.embedders.1.model."), "CLIP-G"),
        (clip(768, "text_encoders.clip_l.transformer."), "CLIP-L"),
        (t5(768, "text_encoders.t5base.transformer."), "T5-base"),
    ],
)
def test_unread_encoders_stay_alone_and_inside_a_checkpoint(encoder: list[Candidate], name: str) -> None:
    for beside in ([], FLUX):
        result = Targeting().decide([*beside, *encoder])
        for candidate in encoder:
            keep = result.decisions[candidate.name].keep
            assert keep is not None
            assert len(candidate.shape) == 1 or "embed" in candidate.name or candidate.name.endswith("shared") or (
                keep.startswith(f"{name} text encoder: ComfyUI reads no quantization markers")
            )  # fmt: skip
        assert any(note.startswith("warning: ") and name in note for note in result.notes)
        if beside:
            assert result.decisions[QKV].keep is None
            assert result.preset is load_presets()["flux2"]
        else:
            assert result.preset is None
            assert not any("no preset" in note for note in result.notes)


@pytest.mark.parametrize(
    "encoder",
    [
        t5(4096),
        t5(4096, "text_encoders.t5xxl.transformer."),
        t5(1024, rows=16384),
        open_clip(1280, "visual."),
        LLAMA,
        layers("vision_model.encoder.layers.0.self_attn.q_proj", shape=(768, 768)),
    ],
)
def test_encoders_that_are_read(encoder: list[Candidate]) -> None:
    assert unread_text_encoder((candidate.name + ".weight", candidate.shape) for candidate in encoder) == []


def test_a_client_other_than_comfyui_has_no_such_limits() -> None:
    result = Targeting().decide([*clip(768), *FLUX], comfy=False)
    assert result.decisions["text_model.encoder.layers.0.mlp.fc1"] == Decision()
    assert all(not decision.formats_barred for decision in result.decisions.values())


# ---- presets ----


def test_a_preset_is_detected_and_announced() -> None:
    result = Targeting().decide(FLUX)
    assert result.preset is load_presets()["flux2"]
    assert result.notes == ["preset flux2 (Flux.1, Flux.2) detected"]
    assert kept(result) == {
        "img_in": "preset flux2: 'img_in'",
        "txt_in": "preset flux2: 'txt_in'",
        "time_in.in_layer": "preset flux2: 'time_in'",
        "final_layer.linear": "preset flux2: 'final_layer'",
    }


def test_without_a_preset_the_name_rules_hold() -> None:
    result = Targeting(preset="none").decide(FLUX)
    assert result.preset is None
    assert result.notes == []
    assert kept(result) == {"final_layer.linear": "output head"}
    assert set(result.decisions["img_in"].formats_barred) == {"nvfp4"}


def test_a_model_that_no_preset_fits_is_warned_about() -> None:
    result = Targeting().decide(layers("layers.0.w1", "layers.0.w2"))
    assert result.preset is None
    assert [note for note in result.notes if note.startswith("warning: no preset fits these keys")]


def test_keys_beyond_the_candidates_help_detection() -> None:
    gemma = layers("model.language_model.layers.0.self_attn.q_proj", "model.vision_tower.encoder.layers.0.mlp.fc1")
    result = Targeting().decide(gemma, keys=["model.language_model.layers.0.layer_scalar"])
    assert result.preset is load_presets()["gemma4"]
    assert set(kept(result)) == {"model.vision_tower.encoder.layers.0.mlp.fc1"}


def test_a_named_preset_that_does_not_look_right_is_warned_about() -> None:
    assert "warning: preset wan was asked for, but the keys look like flux2" in Targeting("wan").decide(FLUX).notes
    nothing = Targeting("nerf_small").decide(LLAMA).notes
    assert nothing == ["warning: preset nerf_small keeps nothing here: no key holds one of its names"]
    assert Targeting("flux2").decide(FLUX).notes == []


def test_several_presets() -> None:
    result = Targeting("distillation_small,flux2").decide(FLUX)
    assert result.decisions["img_in"].keep == "preset distillation_small,flux2: 'img_in'"


T5_WITH_DECODER = [*t5(4096), *layers("decoder.block.0.layer.0.SelfAttention.q", "lm_head", shape=(4096, 4096))]


def test_t5xxl_drops_its_decoder_when_it_is_named() -> None:
    keys = ["decoder.final_layer_norm.weight"]
    result = Targeting("t5xxl").decide(T5_WITH_DECODER, keys)
    assert set(result.removed) == {
        "decoder.final_layer_norm.weight", "decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"
    }  # fmt: skip
    assert result.decisions["lm_head"].keep == "dropped by preset t5xxl"
    assert "preset t5xxl drops 3 tensors of decoder, lm_head" in result.notes
    assert set(result.decisions) == {candidate.name for candidate in T5_WITH_DECODER}


def test_auto_drops_nothing_but_says_what_it_could() -> None:
    result = Targeting().decide(T5_WITH_DECODER)
    assert result.removed == []
    assert result.decisions["decoder.block.0.layer.0.SelfAttention.q"].keep is None
    assert "2 tensors of decoder, lm_head are kept; name the preset (--preset t5xxl) to drop them" in result.notes


# ---- order of authority ----


def rule(pattern: str, order: int = 0, **values: object) -> Rule:
    return Rule(pattern, values, order)


def test_include_narrows() -> None:
    result = Targeting(include="double_blocks").decide(FLUX)
    assert result.decisions["single_blocks.0.linear1"].keep == "not in include 'double_blocks'"
    assert result.decisions[QKV].keep is None
    assert Targeting(include="img_in").decide(FLUX).decisions["img_in"].keep == "preset flux2: 'img_in'"
    assert Targeting(include=r"qkv\.weight$").decide(FLUX).decisions[QKV].keep is None


def test_exclude_wins_over_include() -> None:
    result = Targeting(include="double_blocks", exclude="mlp").decide(FLUX)
    assert result.decisions[MLP].keep == "exclude 'mlp'"


def test_rules_win_over_include_exclude_presets_and_names() -> None:
    targeting = Targeting(
        include="double_blocks",
        exclude="img_mlp",
        rules=(
            rule("img_mlp", format="int8", scaling="row"),
            rule("img_in", 1, format="fp8"),
            rule("single_blocks", 2, skip=False),
            rule("final_layer", 3, format="mxfp8"),
            rule("img_attn", 4, skip=True),
        ),
    )
    result = targeting.decide(FLUX)
    assert result.decisions[MLP] == Decision(None, {"format": "int8", "scaling": "row"})
    assert result.decisions["img_in"].settings == {"format": "fp8"}
    assert set(result.decisions["img_in"].formats_barred) == {"nvfp4"}, "a rule cannot make the shape right"
    assert result.decisions["single_blocks.0.linear1"] == Decision()
    assert result.decisions["final_layer.linear"].keep is None
    assert result.decisions[QKV].keep == "rule 'img_attn'"
    assert result.decisions["txt_in"].keep == "not in include 'double_blocks'"


def test_a_rule_without_a_format_refines_but_does_not_decide() -> None:
    result = Targeting(exclude="img_mlp", rules=(rule("double_blocks", rounding="nearest"),)).decide(FLUX)
    assert result.decisions[QKV] == Decision(None, {"rounding": "nearest"})
    assert result.decisions[MLP].keep == "exclude 'img_mlp'"


def test_no_rule_changes_a_fact() -> None:
    targeting = Targeting(rules=(rule("", format="fp8"),))
    stored = [Candidate("blocks.0.conv", (8, 8, 3), "BF16"), Candidate("blocks.0.codes", (64, 64), "I8")]
    result = targeting.decide([*stored, *clip(768), *LLAMA])
    assert result.decisions["blocks.0.conv"].keep == "3-D convolution"
    assert result.decisions["blocks.0.codes"].keep == "stored as I8: not plain weights"
    assert "CLIP-L" in (result.decisions["text_model.encoder.layers.0.mlp.fc1"].keep or "")
    assert result.decisions["model.embed_tokens"].settings == {"format": "fp8"}, "a name is no fact"
    assert "warning: rule '' cannot change 1 of its layers: 3-D convolution" in result.notes


def test_presets_win_over_names_and_names_over_heuristics() -> None:
    small = [*FLUX, *layers("double_blocks.2.a", "head", shape=(32, 3072)), *layers("b", shape=(65 * 64, 64))]
    reasons = kept(Targeting(heuristics=True).decide(small))
    assert reasons["final_layer.linear"] == "preset flux2: 'final_layer'"
    assert reasons["head"] == "output head"
    assert reasons["double_blocks.2.a"] == "heuristics: 32 x 3072 has a dimension below 64"
    assert reasons["b"] == "heuristics: 4160 x 64 has an aspect ratio of 65, above 64"
    assert "double_blocks.2.a" not in kept(Targeting().decide(small))
    assert awkward((4096, 64)) is None


def test_fallback_replaces_exclusion_but_not_norms_embeddings_and_facts() -> None:
    extra = [
        *layers("double_blocks.0.img_attn.norm_k", "txt_in.embed_tokens"),
        *layers("img_in_patch", shape=(8, 3, 2, 2)),
    ]
    result = Targeting("flux2", exclude="img_attn|patch", fallback="fp8").decide([*FLUX, *extra])
    assert result.decisions[QKV] == Decision(None, {"format": "fp8"})
    assert result.decisions["final_layer.linear"].settings == {"format": "fp8"}
    assert result.decisions["double_blocks.0.img_attn.norm_k"].keep == "exclude 'img_attn|patch'"
    assert result.decisions["txt_in.embed_tokens"].keep == "preset flux2: 'txt_in'"
    assert result.decisions["img_in_patch"].keep == "4-D convolution"
    assert result.decisions[MLP] == Decision()
    name_rules_stay = Targeting("none", fallback="fp8").decide(LLAMA)
    assert kept(name_rules_stay) == {"model.embed_tokens": "embedding table", "lm_head": "output head"}


def test_fallback_takes_only_the_rounding_of_a_rule() -> None:
    rules = (rule("img_attn", scaling="row", rounding="nearest"),)
    result = Targeting(exclude="img_attn", fallback="mxfp8", rules=rules).decide(FLUX)
    assert result.decisions[QKV].settings == {"format": "mxfp8", "rounding": "nearest"}


# ---- mistakes ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "flx2"}, "unknown preset 'flx2'; did you mean 'flux2'"),
        ({"include": "a("}, r"include: 'a\(' is not a regular expression: .* at position 1"),
        ({"exclude": "*"}, r"exclude: '\*' is not a regular expression: nothing to repeat at position 0"),
        ({"fallback": "fp9"}, "unknown format 'fp9'; did you mean 'fp8'"),
    ],
)
def test_mistakes_are_found_before_any_file_is_opened(values: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Targeting(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["include", "exclude"])
def test_a_pattern_that_finds_nothing_names_the_nearest(what: str) -> None:
    with pytest.raises(UsageError, match=rf"{what} 'img_atn' matches no layer; nearest: 'double_blocks.0.img_attn"):
        Targeting(**{what: "img_atn"}).decide(FLUX)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="rule 'img_atn' matches no layer"):
        Targeting(rules=(rule("img_atn", skip=True),)).decide(FLUX)


def test_nothing_to_decide() -> None:
    assert Targeting(include="a", exclude="b").decide([]) == TargetingResult({})


def test_targeting_travels() -> None:
    targeting = Targeting("wan", "a", "b", (rule("c", format="fp8"), rule("d", 1, skip=True)), "int8", True)
    stage = make_stage("target", json.loads(json.dumps(targeting.to_dict())))
    assert stage.to_dict() == targeting.to_dict()
    assert pickle.loads(pickle.dumps(stage)) == stage
    with pytest.raises(UsageError, match="target has no option 'presets'; did you mean 'preset'"):
        make_stage("target", {"presets": "wan"})


PARTS = [
    "blocks",
    "0",
    "12",
    "text_model",
    "encoder",
    "layers",
    "block",
    "layer",
    "SelfAttention",
    "q",
    "norm",
    "embed",
    "lm_head",
    "final_layer",
    "linear",
    "decoder",
    "img_in",
    "self_attn",
    "q_proj",
    "mlp",
    "gate",
    "shared",
]
NAMES = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(PARTS), max_size=6).map(".".join))
CANDIDATES = st.builds(
    Candidate, NAMES, st.lists(st.integers(0, 5000), max_size=4).map(tuple), st.sampled_from(["BF16", "F32", "I64"])
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(CANDIDATES, max_size=8),
    st.lists(NAMES, max_size=4),
    st.sampled_from(["auto", "none", *load_presets()]),
    st.booleans(),
    st.sampled_from([None, "fp8"]),
)
def test_every_candidate_gets_a_decision(
    candidates: list[Candidate], keys: list[str], preset: str, heuristics: bool, fallback: str | None
) -> None:
    targeting = Targeting(preset, rules=(), fallback=fallback, heuristics=heuristics)
    result = targeting.decide(candidates, keys)
    assert set(result.decisions) == {candidate.name for candidate in candidates}
    for candidate in candidates:
        decision = result.decisions[candidate.name]
        if decision.keep is None and [c.name for c in candidates].count(candidate.name) == 1:
            assert len(candidate.shape) == 2
            assert candidate.dtype != "I64"
