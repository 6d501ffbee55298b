"""A model in shards becomes a quantized model in shards; every weight is then compared with its source.

Large models are published as several files and an index that says which tensor lies where. quantloom reads the folder
as one checkpoint and writes a folder of the same kind, with shards of the size that you choose; configuration and
tokenizer files go along. No more than a few rows of a weight are in memory at a time.

    python examples/sharded_model.py [FOLDER]
"""

from __future__ import annotations

import json

from small_models import save_flux_shards, working_folder

from quantloom import Pipeline
from quantloom.flow.verify import verify


def main() -> None:
    folder = working_folder("sharded_model")
    source = save_flux_shards(folder / "flux")
    output = folder / "flux-mxfp8"
    flow = Pipeline().read(source).quantize("mxfp8").write(output, shard_size="300KB", overwrite=True, compute=False)
    print(flow.plan.explain())

    report = flow.compute()
    print(f"\n{report.summary()}")
    for file in sorted(output.iterdir()):
        print(f"  {file.stat().st_size:9,d}  {file.name}")

    index = json.loads(next(output.glob("*.index.json")).read_text())
    print("one layer's tensors:")
    for name, file in index["weight_map"].items():
        if name.startswith("double_blocks.0.img_attn.qkv."):
            print(f"  {name} in {file}")

    check = verify(str(output), str(source))
    print(f"{'sound' if check.ok else check.problems}: {sum(bool(layer.format) for layer in check.layers)} layers")
    raise SystemExit(0 if check.ok else 1)


if __name__ == "__main__":
    main()
