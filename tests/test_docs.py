"""Every Python block and every ``quantloom`` command of README and docs runs, on small models with real names.

The blocks of a page are one script, in which later ones use what earlier ones define. What a block prints is compared
with the ``text`` block right behind it, where there is one. The reference of the command line is the generated one.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from servers import serving

from quantloom.flow import cli, compat
from quantloom.formats.elements import E2M1, E4M3, E5M2
from quantloom.stages.presets import detect_preset

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


DOORS: dict[str, Callable[[list[str]], object]] = {"quantloom": cli.main, "convert_to_quant": compat.main}
"""Commands that documents may show -> what runs them."""
BETWEEN = "---------- next block"


def blocks(document: Path, language: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def scripts(document: Path) -> list[tuple[str, str | None]]:
    """Every Python block, with the output that stands behind it."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?"
    text = document.read_text(encoding="utf-8")
    return [(match[1], match[2]) for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)]


def commands(document: Path) -> list[list[str]]:
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    split = [shlex.split(os.path.expandvars(line), comments=True) for line in lines]
    return [words for words in split if words and words[0] in DOORS]


def load(name: str, path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``flux-dev/``, ``wan/``, ``t5xxl/``, ``qwen-image/``: small checkpoints with real names; ``llama/``: a model that
    runs; ``model.safetensors``; ``book.txt``."""
    folder = tmp_path_factory.mktemp("models")
    small = load("small_models", ROOT / "examples" / "small_models.py")
    small.save_flux_shards(folder / "flux-dev", 2)
    small.save_flux(folder / "model.safetensors")
    make_wan(folder / "wan")
    make_t5xxl(folder / "t5xxl")
    make_qwen_image(folder / "qwen-image")
    make_llama(folder / "llama")
    (folder / "book.txt").write_text(" ".join(f"w{number % 60}" for number in range(4000)))
    return folder


@pytest.fixture
def web(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The models at ``$MODELS``, as documents call a web server."""
    with serving(models) as server:
        monkeypatch.setenv("MODELS", server.url)
        yield


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the models lie."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_model(folder: Path, shapes: dict[str, tuple[int, ...]], *vectors: str) -> None:
    """Random weights of these shapes in BF16, and short tensors under their full names."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}
    tensors |= {name: torch.ones(8) for name in vectors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_t5xxl(folder: Path) -> None:
    """One thin block of T5-XXL's encoder; its width is what tells it from encoders whose markers ComfyUI ignores."""
    block = "encoder.block.0.layer."
    attention = dict.fromkeys((f"{block}0.SelfAttention.{part}" for part in "qkvo"), (64, 4096))
    mlp = {f"{block}1.DenseReluDense.{part}": (128, 4096) for part in ("wi_0", "wi_1")}
    save_model(folder, {"shared": (256, 4096), **attention, **mlp, f"{block}1.DenseReluDense.wo": (4096, 128)})


def make_wan(folder: Path) -> None:
    """Two blocks of Wan, 136 wide: a width that MXFP8 pads."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding": (136, 16, 1, 2, 2), "text_embedding.0": (136, 256), "time_embedding.0": (136, 64),
        "time_projection.1": (816, 136), "head.head": (64, 136),
    }  # fmt: skip
    for block in range(2):
        inner = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
        shapes |= {f"blocks.{block}.{name}": (136, 136) for name in inner}
        shapes |= {f"blocks.{block}.ffn.0": (512, 136), f"blocks.{block}.ffn.2": (136, 512)}
    save_model(folder, shapes, "head.modulation", "blocks.0.modulation")


def make_qwen_image(folder: Path) -> None:
    """Two blocks of Qwen-Image, 128 wide."""
    shapes: dict[str, tuple[int, ...]] = {
        "img_in": (128, 64), "txt_in": (128, 256), "txt_norm": (256,), "proj_out": (64, 128),
        "norm_out.linear": (256, 128), "time_text_embed.timestep_embedder.linear_1": (128, 256),
    }  # fmt: skip
    for block in range(2):
        prefix = f"transformer_blocks.{block}."
        inner = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
        shapes |= {f"{prefix}attn.{name}": (128, 128) for name in inner} | {f"{prefix}attn.norm_added_q": (32,)}
        shapes |= {f"{prefix}{part}_mod.1": (768, 128) for part in ("img", "txt")}
        shapes |= {f"{prefix}img_mlp.net.0.proj": (512, 128), f"{prefix}img_mlp.net.2": (128, 512)}
    save_model(folder, shapes)


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
def test_python_blocks_run_and_print_what_they_say(document: Path, folder: Path) -> None:
    found = scripts(document)
    if not found:
        return
    script = folder / "blocks.py"
    script.write_text(f"print({BETWEEN!r})\n".join(block for block, _ in found), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{document.name}:\n{done.stderr}"
    for (block, expected), printed in zip(found, done.stdout.split(f"{BETWEEN}\n"), strict=True):
        assert expected is None or printed == expected, f"{document.name}:\n{block}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
@pytest.mark.usefixtures("web")
def test_commands_run(document: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for block in blocks(document, "yaml"):  # its first line is a comment with the name of the file
        (folder / block.partition("\n")[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    for words in commands(document):
        with pytest.raises(SystemExit) as ended:
            DOORS[words[0]](words[1:])
        printed = capfd.readouterr()
        assert not ended.value.code, f"{document.name}: {shlex.join(words)}\n{printed.err}{printed.out}"


def test_every_command_stands_in_the_guide_or_the_readme() -> None:
    shown = {words[1] for document in DOCUMENTS for words in commands(document) if words[0] == "quantloom"}
    assert set(cli.cli.commands) <= shown


def test_the_command_line_reference_is_current() -> None:
    generator = load("make_cli", ROOT / "docs" / "make_cli.py")
    assert generator.TARGET.read_text(encoding="utf-8") == generator.render(), "run: python docs/make_cli.py"


def test_every_option_stands_in_the_reference() -> None:
    reference = (ROOT / "docs" / "CLI.md").read_text(encoding="utf-8")
    for name, command in cli.cli.commands.items():
        section = reference.partition(f"## quantloom {name}\n")[2].partition("\n## ")[0]
        for option in (spelled for param in command.params for spelled in param.opts if spelled.startswith("-")):
            assert f"`{option}`" in section, f"{name} {option}"


@pytest.mark.parametrize(
    ("name", "preset"), [("flux-dev", "flux2"), ("wan", "wan"), ("qwen-image", "qwen"), ("t5xxl", "t5xxl")]
)
def test_the_models_of_the_guide_are_known(models: Path, name: str, preset: str) -> None:
    """Otherwise its recipes would run on models that no user has."""
    keys = []
    for path in (models / name).glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        keys += [key for key in header if key != "__metadata__"]
    found = detect_preset(keys)
    assert found is not None
    assert found.name == preset


def test_the_table_of_numbers_is_that_of_the_code() -> None:
    """Largest value, smallest above zero, and how many values each grid has."""
    text = (ROOT / "docs" / "FORMATS.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| E")]
    rows = {cells[1]: cells for cells in (re.split(r" *\| *", line) for line in lines)}
    for grid, largest, smallest in ((E4M3, 448, 2.0**-9), (E5M2, 57344, 2.0**-16), (E2M1, 6, 0.5)):
        values = grid.values[grid.values.isfinite() & (grid.values > 0)]
        assert (float(values.max()), float(values.min())) == (largest, smallest)
        assert rows[grid.name][4] == str(largest)
        assert float(eval(rows[grid.name][5].replace("^", "**"))) == smallest
    assert int(E4M3.values.isnan().sum()) == 2
    assert all(f"{value:g}" in rows["E2M1"][3] for value in E2M1.values[:8].tolist())


def test_the_readme_shows_something_to_run() -> None:
    assert len(blocks(DOCUMENTS[0], "python")) >= 2
    assert len(commands(DOCUMENTS[0])) >= 5


PAGES = [*DOCUMENTS, *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "examples").rglob("*.md"), *ROOT.glob("C*.md")]


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert "@@" not in text
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        if target.startswith("http"):
            continue
        page = document.parent / target if target else document
        assert page.exists(), target
        if anchor and page.suffix == ".md":
            assert anchor in anchors(page), f"{target}#{anchor}"


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_a_page_has_one_title_and_sections_below_it(document: Path) -> None:
    levels = [len(level) for level, _ in headings(document)]
    assert levels[0] == 1
    assert all(1 < level <= before + 1 for before, level in itertools.pairwise(levels))


def headings(page: Path) -> list[tuple[str, str]]:
    """Number signs and text of every heading."""
    outside = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^(#+) (.+)$", outside, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What headings are called in links to them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for _, heading in headings(page)}
