"""Several formats in one model, from rules on layer names; the recipe is saved and gives the same bytes again.

Attention in FP8, MLPs in NVFP4, the last block rotated INT8, and MXFP8 for what no rule names. Of several rules that
match, the one that fixes most characters of the name wins.

    python examples/mixed_formats.py [FOLDER]
"""

from __future__ import annotations

from collections import Counter

from small_models import save_flux, working_folder

from quantloom import Pipeline

RULES = {
    r"attn\.(qkv|proj)$": {"format": "fp8"},
    r"_mlp\.\d+$": {"format": "nvfp4"},
    r"single_blocks\.1\.": {"format": "int8", "rotate": "hadamard:64"},
    r"txt_mlp\.0$": {"skip": True},
}


def main() -> None:
    folder = working_folder("mixed_formats")
    source = save_flux(folder / "flux.safetensors")
    pipeline = Pipeline().read(source).target(rules=RULES).quantize("mxfp8")
    report = pipeline.write(folder / "mixed.safetensors", overwrite=True)
    for layer in report.layers:
        print(f"{layer.name:32s} {layer.format:20s} error {layer.error:.4f}")
    print("layers by format:", dict(Counter(layer.format for layer in report.layers)))
    print("kept:", report.kept)

    recipe = folder / "mixed.json"
    recipe.write_text(pipeline.to_json())
    again = Pipeline.from_recipe(recipe).write(folder / "again.safetensors", overwrite=True)
    same = (folder / "mixed.safetensors").read_bytes() == (folder / "again.safetensors").read_bytes()
    print(f"from the saved recipe: {again.output}, {'the same bytes' if same else 'OTHER BYTES'}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
