"""Every Python block and every ``quantloom`` command of README and docs runs, on a small Flux-like checkpoint."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[list[str]]:
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words and words[0] in ("quantloom", "convert_to_quant")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with ``flux-dev/``, a small checkpoint with Flux's names, ``llama/``, a model that runs, and
    ``book.txt``."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", ROOT / "benchmarks" / "make_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_checkpoint", module)
    spec.loader.exec_module(module)
    module.make_checkpoint(tmp_path / "flux-dev", "flux", 0.02, 2)
    (tmp_path / "model.safetensors").symlink_to(next((tmp_path / "flux-dev").glob("*.safetensors")))
    make_llama(tmp_path / "llama")
    (tmp_path / "book.txt").write_text(" ".join(f"w{number % 60}" for number in range(4000)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_llama(folder: Path) -> None:
    """A tiny language model with a tokenizer, as transformers stores them."""
    import tokenizers
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{number}": number for number in range(63)} | {"[UNK]": 63}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run(document: Path, folder: Path) -> None:
    for number, block in enumerate(blocks(document, "python")):
        script = folder / f"block{number}.py"
        script.write_text(block)
        done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{document.name}, block {number}:\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_run(document: Path, folder: Path) -> None:
    modules = {"quantloom": "quantloom.flow.cli", "convert_to_quant": "quantloom.flow.compat"}
    for words in commands(document):
        done = subprocess.run(
            [sys.executable, "-m", modules[words[0]], *words[1:]], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{document.name}: {shlex.join(words)}\n{done.stderr}"


def test_the_readme_shows_something_to_run() -> None:
    assert len(blocks(DOCUMENTS[0], "python")) >= 2
    assert len(commands(DOCUMENTS[0])) >= 5


@pytest.mark.parametrize("document", [*DOCUMENTS, *(ROOT / "benchmarks").glob("*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(document: Path) -> None:
    text = document.read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (document.parent / target).exists(), target
