"""Presets: the data is complete, and the keys of known models lead to one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantloom.formats.errors import UsageError
from quantloom.stages.presets import detect_preset, find_preset, load_presets

EXPECTED = json.loads((Path(__file__).parent / "data" / "presets_expected.json").read_text())


def keys(text: str, blocks: int = 2) -> list[str]:
    """Full keys from a compact list: ``{n}`` runs over the blocks, a bare name ends in ``.weight``."""
    found = []
    for part in text.split():
        name = part if part.endswith(("!", ".bias")) else part + ".weight"
        found += [name.rstrip("!").replace("{n}", str(n)) for n in range(blocks if "{n}" in name else 1)]
    return found


FLUX = """img_in txt_in time_in.in_layer time_in.out_layer final_layer.linear final_layer.adaLN_modulation.1
    double_blocks.{n}.img_attn.qkv double_blocks.{n}.img_attn.proj double_blocks.{n}.img_attn.norm.key_norm.scale!
    double_blocks.{n}.img_mlp.0 double_blocks.{n}.txt_mlp.2 single_blocks.{n}.linear1 single_blocks.{n}.linear2"""
CHROMA = (
    FLUX.replace("time_in.in_layer time_in.out_layer", "distilled_guidance_layer.in_proj")
    + """
    distilled_guidance_layer.layers.{n}.in_layer distilled_guidance_layer.norms.0.scale!"""
)
RADIANCE = (
    CHROMA.replace("img_in txt_in", "img_in_patch txt_in").replace("final_layer.linear ", "")
    + """
    nerf_image_embedder.embedder.0 nerf_blocks.{n}.param_generator nerf_blocks.{n}.norm.scale!"""
)
LLAMA = """model.embed_tokens model.norm lm_head model.layers.{n}.input_layernorm model.layers.{n}.self_attn.q_proj
    model.layers.{n}.self_attn.o_proj model.layers.{n}.mlp.gate_proj model.layers.{n}.mlp.down_proj"""
QWEN_IMAGE = """img_in txt_in txt_norm time_text_embed.timestep_embedder.linear_1 norm_out.linear proj_out
    transformer_blocks.{n}.attn.norm_added_q transformer_blocks.{n}.attn.to_q transformer_blocks.{n}.attn.add_k_proj
    transformer_blocks.{n}.img_mod.1 transformer_blocks.{n}.txt_mod.1"""
LUMINA = """x_embedder cap_embedder.0 cap_embedder.1 t_embedder.mlp.0 final_layer.linear x_pad_token!
    context_refiner.{n}.attention.qkv noise_refiner.{n}.attention.qkv noise_refiner.{n}.attention.k_norm
    layers.{n}.attention.qkv layers.{n}.feed_forward.w1 layers.{n}.adaLN_modulation.0"""

MODELS: dict[str, tuple[str | None, str]] = {
    "flux1": ("flux2", FLUX + " vector_in.in_layer guidance_in.in_layer double_blocks.{n}.img_mod.lin"),
    "flux2": ("flux2", FLUX + " double_stream_modulation_img.lin single_stream_modulation.lin"),
    "chroma": ("distillation_large", CHROMA),
    "radiance conv": ("radiance", RADIANCE + " nerf_final_layer_conv.conv nerf_final_layer_conv.norm.scale!"),
    "radiance linear": ("nerf_large", RADIANCE + " nerf_final_layer.linear"),
    "wan": ("wan", """patch_embedding text_embedding.0 text_embedding.2 time_embedding.0 time_projection.1 head.head
        head.modulation! blocks.{n}.modulation! blocks.{n}.self_attn.q blocks.{n}.cross_attn.k blocks.{n}.ffn.0"""),
    "hunyuan video": ("hunyuan", """img_in.proj time_in.in_layer vector_in.in_layer guidance_in.in_layer
        txt_in.input_embedder txt_in.individual_token_refiner.blocks.{n}.norm1 final_layer.linear
        txt_in.individual_token_refiner.blocks.{n}.self_attn.qkv double_blocks.{n}.img_attn.qkv
        double_blocks.{n}.img_attn_q_norm single_blocks.{n}.linear1 single_blocks.{n}.modulation.linear"""),
    "qwen image": ("qwen", QWEN_IMAGE + " transformer_blocks.{n}.img_mlp.net.0.proj"),
    "lens": ("lens", QWEN_IMAGE + " transformer_blocks.{n}.img_mlp.w1 transformer_blocks.{n}.img_mlp.w3"),
    "z-image": ("zimage", LUMINA),
    "newbie": ("zimage", LUMINA + " clip_text_pooled_proj.0 time_text_embed.1"),
    "boogu": ("boogu", """x_embedder ref_image_patch_embedder image_index_embedding norm_out.linear_1
        time_caption_embed.timestep_embedder.linear_1 time_caption_embed.caption_embedder.0
        noise_refiner.{n}.attn.to_q single_stream_layers.{n}.attn.to_q
        double_stream_layers.{n}.img_instruct_attn.processor.img_to_q"""),
    "ltx-2": ("ltxv2", """patchify_proj audio_patchify_proj proj_out audio_proj_out adaln_single.linear
        audio_adaln_single.linear av_ca_a2v_gate_adaln_single.linear transformer_blocks.{n}.attn1.to_q
        transformer_blocks.{n}.attn2.to_k transformer_blocks.{n}.audio_attn1.to_q"""),
    "anima": ("anima", """net.x_embedder.proj.1 net.t_embedder.1.linear_1 net.final_layer.linear
        net.blocks.{n}.self_attn.q_proj net.blocks.{n}.mlp.layer1 net.blocks.{n}.adaln_modulation_mlp.1
        net.llm_adapter.blocks.{n}.cross_attn.q_proj net.llm_adapter.embed"""),
    "krea2": ("krea2", """first last.linear last.modulation.lin! tmlp.0 tproj.1 txtmlp.1 txtfusion.projector
        txtfusion.layerwise_blocks.{n}.attn.wq blocks.{n}.attn.wq blocks.{n}.attn.gate blocks.{n}.mlp.gate"""),
    "ideogram4": ("ideogram4", """input_proj llm_cond_norm llm_cond_proj t_embedding.mlp_in adaln_proj
        embed_image_indicator layers.{n}.attention.qkv layers.{n}.feed_forward.w1 layers.{n}.adaln_modulation
        final_layer.linear final_layer.adaln_modulation"""),
    "t5-xxl": ("t5xxl", """shared encoder.block.{n}.layer.0.SelfAttention.q encoder.block.{n}.layer.0.layer_norm
        encoder.block.0.layer.0.SelfAttention.relative_attention_bias encoder.block.{n}.layer.1.DenseReluDense.wi_0
        encoder.final_layer_norm"""),
    "gemma4 E4B": ("gemma4", LLAMA + """ model.embed_tokens_per_layer model.layers.{n}.per_layer_input_gate
        model.layers.{n}.per_layer_projection model.per_layer_model_projection"""),
    "gemma4 31B": ("gemma4", LLAMA.replace("model.", "model.language_model.") + """
        model.language_model.layers.{n}.layer_scalar! model.vision_tower.encoder.layers.{n}.self_attn.q_proj.linear"""),
    "gemma 3n": ("generic_text", LLAMA + " model.altup_projections.0 model.layers.{n}.per_layer_input_gate"),
    "qwen3.5": ("qwen35", LLAMA.replace("model.", "model.language_model.") + """
        model.language_model.layers.{n}.linear_attn.in_proj_a model.language_model.layers.{n}.linear_attn.in_proj_qkv
        model.visual.blocks.{n}.attn.qkv model.visual.merger.linear_fc1 mtp.fc"""),
    "mistral for flux2": ("mistral", LLAMA + " tekken_model!"),
    "mistral 3, transformers": ("mistral", LLAMA.replace("model.", "language_model.model.") + """
        vision_tower.patch_conv vision_tower.ln_pre multi_modal_projector.patch_merger.merging_layer"""),
    "qwen2.5-vl tower": ("visual", """visual.patch_embed.proj visual.blocks.{n}.attn.qkv visual.merger.mlp.0
        visual.blocks.{n}.mlp.gate_proj visual.blocks.{n}.mlp.down_proj"""),
    "qwen2.5-vl": ("generic_text", LLAMA + " visual.blocks.{n}.mlp.gate_proj visual.merger.mlp.0"),
    "llama": ("generic_text", LLAMA),
    "qwen3 moe": ("generic_text", LLAMA + " model.layers.{n}.mlp.gate model.layers.{n}.mlp.experts.{n}.up_proj"),
    "minilm": ("generic_text", """embeddings.word_embeddings embeddings.position_embeddings pooler.dense
        encoder.layer.{n}.attention.self.query encoder.layer.{n}.intermediate.dense"""),
    "sdxl": (None, """model.diffusion_model.input_blocks.{n}.1.transformer_blocks.0.attn2.to_k first_stage_model.conv_in
        conditioner.embedders.0.transformer.text_model.embeddings.token_embedding model.diffusion_model.out.2
        conditioner.embedders.0.transformer.text_model.encoder.layers.{n}.self_attn.q_proj"""),
    "clip-l": (None, """text_model.embeddings.token_embedding text_model.encoder.layers.{n}.self_attn.q_proj
        text_model.encoder.layers.{n}.mlp.fc1"""),
    "ltx video 1": (None, "patchify_proj proj_out adaln_single.linear transformer_blocks.{n}.attn2.to_k"),
}  # fmt: skip


def is_text(preset: str) -> bool:
    return bool(EXPECTED[preset]["category"] == "text")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_preset_keeps_exactly_its_substrings(name: str) -> None:
    preset = load_presets()[name]
    assert preset.category == EXPECTED[name]["category"]
    assert sorted(preset.keep) == EXPECTED[name]["keep"]
    assert list(preset.remove) == EXPECTED[name]["remove"]
    assert preset.title


def test_there_are_23_presets_and_no_others() -> None:
    assert set(load_presets()) == set(EXPECTED)
    assert len(EXPECTED) == 23


def test_presets_chosen_by_name_only_share_the_keys_of_a_larger_one() -> None:
    assert {name for name, preset in load_presets().items() if not preset.detect} == {
        "nerf_small", "distillation_small", "zimage_refiner"
    }  # fmt: skip


@pytest.mark.parametrize("model", sorted(MODELS))
def test_detection(model: str) -> None:
    expected, text = MODELS[model]
    found = detect_preset(keys(text))
    assert (found.name if found else None) == expected


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "net.", "transformer.", "audio_model."])
@pytest.mark.parametrize("model", [name for name, (preset, _) in MODELS.items() if preset and not is_text(preset)])
def test_a_prefix_does_not_hide_a_diffusion_model(model: str, prefix: str) -> None:
    expected, text = MODELS[model]
    found = detect_preset(prefix + key for key in keys(text))
    assert (found.name if found else None) == expected


@pytest.mark.parametrize("model", sorted(MODELS))
def test_no_two_presets_claim_the_same_keys(model: str) -> None:
    expected, text = MODELS[model]
    fitting = {name for name, preset in load_presets().items() if preset.fits(keys(text))}
    assert fitting - {"generic_text"} == {expected} - {"generic_text", None}


def test_every_detectable_preset_has_a_model_here() -> None:
    assert {expected for expected, _ in MODELS.values()} - {None} == {
        name for name, preset in load_presets().items() if preset.detect
    }


def test_detection_needs_no_low_block_numbers() -> None:
    part = [key.replace(".0.", ".30.").replace(".1.", ".31.") for key in keys(MODELS["wan"][1]) if "blocks." in key]
    assert detect_preset([*part, "text_embedding.2.weight", "head.head.weight"]) == find_preset("wan")


def test_a_diffusion_model_goes_before_the_text_encoders_beside_it() -> None:
    combined = [
        *("model.diffusion_model." + key for key in keys(MODELS["flux1"][1])),
        *("text_encoders.t5xxl.transformer." + key for key in keys(MODELS["t5-xxl"][1])),
    ]
    assert detect_preset(combined) == find_preset("flux2")


def test_t5_drops_its_own_decoder_and_nobody_elses() -> None:
    prefix = "text_encoders.t5xxl.transformer."
    own = [prefix + key for key in keys("decoder.block.0.layer.0.SelfAttention.q lm_head decoder.final_layer_norm")]
    others = ["vae.decoder.conv_in.weight", "lm_head.weight", prefix + "encoder.decoder_start.weight"]
    everything = [prefix + key for key in keys(MODELS["t5-xxl"][1])] + own + others
    assert find_preset("t5xxl").removed(everything) == own
    assert find_preset("wan,t5xxl").removed(everything) == own
    assert find_preset("wan").removed(everything) == []


def test_several_presets_keep_what_any_keeps() -> None:
    joined = find_preset("nerf_large, radiance")
    assert joined.name == "nerf_large,radiance"
    assert joined.keeps("img_in_patch.weight") == "img_in_patch"
    assert joined.keeps("nerf_blocks.0.param_generator.weight") == "nerf_blocks"
    assert joined.keeps("double_blocks.0.img_mlp.0.weight") is None


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown preset 'flux'; did you mean 'flux2'"):
        find_preset("flux")
