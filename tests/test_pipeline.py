"""The Python door: immutable pipelines, recipes as JSON, and lazy flows."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import pickle
import xml.etree.ElementTree as ET
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FORMATS, LINEAR
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from quantloom import Flow, Pipeline, QuantloomError, Recipe
from quantloom.flow.recipe import Output, Run
from quantloom.flow.report import Report
from quantloom.flow.sizes import parse_size, show_seconds, show_size
from quantloom.formats.errors import PlanError, UsageError


def test_the_whole_program_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    report = Pipeline().read(checkpoint).quantize("mxfp8").write(tmp_path / "out.safetensors")
    assert isinstance(report, Report)
    assert len(report.layers) == LINEAR
    assert load_file(tmp_path / "out.safetensors")["blocks.0.attn.qkv.weight_scale"].shape == (384, 4)


def test_every_verb_returns_a_new_pipeline() -> None:
    start = Pipeline(memory="1GB")
    steps = [start, start.read("a"), start.quantize("fp8"), start.read("a").quantize("fp8").target(include="x")]
    assert len({pipeline.to_json() for pipeline in steps}) == len(steps)
    assert start == Pipeline(memory="1GB")
    assert start.recipe.stages == ()
    with pytest.raises(AttributeError):
        start.memory = 5  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        start.recipe.run.memory = 5  # type: ignore[misc]


def test_a_verb_given_twice_replaces_and_order_of_verbs_does_not_matter() -> None:
    one = Pipeline().read("m").quantize("fp8").target(exclude="x").quantize("nvfp4")
    assert one == Pipeline().read("m").target(exclude="x").quantize("nvfp4")
    assert hash(one) == hash(Pipeline().read("m").target(exclude="x").quantize("nvfp4"))
    assert [stage.verb for stage in one.recipe.stages] == ["target", "quantize"]


def test_copies_and_pickles() -> None:
    pipeline = Pipeline(workers=2).read("m").quantize("int8", rotate="hadamard:64")
    assert copy.copy(pipeline) == copy.deepcopy(pipeline) == pickle.loads(pickle.dumps(pipeline)) == pipeline


def test_repr_shows_what_was_said_and_no_more() -> None:
    assert repr(Pipeline()) == "Pipeline()"
    pipeline = Pipeline(memory="1GB").read("flux/").target(exclude="final").quantize("int8", rotate="hadamard:256")
    wanted = "Pipeline(memory=1000000000).read('flux/').target(exclude='final')"
    assert repr(pipeline) == wanted + ".quantize(format='int8', rotate='hadamard:256')"
    flow = pipeline.write("out/", compute=False)
    assert repr(flow) == f"Flow({wanted}.quantize(format='int8', rotate='hadamard:256') -> 'out/')"
    assert repr(Pipeline().read(["a", "b"])) == "Pipeline().read(['a', 'b'])"


def test_editors_know_every_verb_and_its_options() -> None:
    """Verbs are found at run time; what type checkers and editors see is written by hand in the class."""
    from quantloom.flow import pipeline
    from quantloom.stages.stage import VERBS, stage_class

    tree = ast.parse(Path(pipeline.__file__).read_text(encoding="utf-8"))
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    stubs = {node.name: node.args for block in blocks for node in block.body if isinstance(node, ast.FunctionDef)}
    assert set(stubs) == set(VERBS)
    for verb, arguments in stubs.items():
        options = [item.name for item in fields(stage_class(verb))]
        shown = [each.arg for each in (*arguments.args[1:], *arguments.kwonlyargs)]
        assert shown == [name for name in options if name in shown], verb
        assert arguments.kwarg is not None or set(shown) == set(options), verb
        assert [each.arg for each in arguments.args[1:]] in ([], options[:1]), verb


def test_dir_lists_the_verbs() -> None:
    assert {"read", "write", "target", "quantize"} <= set(dir(Pipeline()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p.quantise("fp8"), "no verb 'quantise'; did you mean 'quantize'"),
        (lambda p: p.xyz(), "no verb 'xyz'; known: read, target, quantize, "),
    ],
)
def test_unknown_verbs_are_attribute_errors(call: Any, words: str) -> None:
    with pytest.raises(AttributeError, match=words.replace("?", r"\?")):
        call(Pipeline())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Pipeline().quantize("mxpf8"), "unknown format 'mxpf8'; did you mean 'mxfp8'"),
        (lambda: Pipeline().quantize("zzz"), "known: fp8, fp8_e5m2, int8, mxfp8, hybrid_mxfp8, nvfp4"),
        (lambda: Pipeline().quantize("fp8", scalings="row"), "no option 'scalings'; did you mean 'scaling'"),
        (lambda: Pipeline().quantize("fp8", scaling="rows"), "no scaling 'rows'; did you mean 'row'?"),
        (lambda: Pipeline().quantize("nvfp4", scaling="row"), "scales groups of 16 by definition"),
        (lambda: Pipeline().quantize("fp8", rounding="nearst"), "unknown rounding 'nearst'; did you mean 'nearest'?"),
        (lambda: Pipeline().quantize("fp8", nonfinite="drop"), "unknown nonfinite 'drop'"),
        (lambda: Pipeline().quantize("fp8", rotate="hadamard"), "rotation needs int8 with row scaling"),
        (lambda: Pipeline().quantize("int8", rotate="hadamard:32"), "32 is not a power of four"),
        (lambda: Pipeline().quantize("int8", rotate="fourier"), "unknown rotation 'fourier'"),
        (lambda: Pipeline().quantize("fp8", block_size="64"), "block_size must be a whole number or null, is '64'"),  # type: ignore[arg-type]
        (lambda: Pipeline().quantize(5), "format must be a string, is 5"),  # type: ignore[arg-type]
        (lambda: Pipeline().quantize("fp8", heuristics=True), "quantize has no option 'heuristics'"),
        (lambda: Pipeline().quantize("fp8", "row"), "takes one positional argument, format"),  # type: ignore[call-arg]
        (lambda: Pipeline().quantize(), "quantize needs format"),  # type: ignore[call-arg]
        (lambda: Pipeline().target(preset="flax2"), "unknown preset 'flax2'; did you mean 'flux2'"),
        (lambda: Pipeline().target(include="("), "include"),
        (lambda: Pipeline().target(fallback="fp9"), "unknown format 'fp9'"),
        (lambda: Pipeline().target(heuristics=1), "heuristics must be true or false, is 1"),  # type: ignore[arg-type]
        (lambda: Pipeline(scheduler="thread"), "unknown scheduler 'thread'; did you mean 'threads'?"),
        (lambda: Pipeline(device="gpu"), "unknown device 'gpu'"),
        (lambda: Pipeline(workers=0), "0 workers"),
        (lambda: Pipeline(workers="2"), "workers must be a whole number or null"),  # type: ignore[arg-type]
        (lambda: Pipeline(memory="8 bananas"), "memory '8 bananas' is no size"),
        (lambda: Pipeline(memory=-1), "must be positive"),
        (lambda: Pipeline().write("x", dialect="comfi"), "unknown dialect 'comfi'; did you mean 'comfy'?"),
        (lambda: Pipeline().write("x", shard_size="0"), "shard size 0"),
        (lambda: Pipeline().write(""), "path of the output is empty"),
    ],
)  # fmt: skip
def test_wrong_words_are_said_at_once(call: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert words in str(caught.value)


def test_an_incomplete_program_says_what_is_missing(checkpoint: Path) -> None:
    for pipeline, words in (
        (Pipeline().quantize("fp8"), "nothing to read"),
        (Pipeline().read(checkpoint), "nothing to do"),
    ):
        with pytest.raises(UsageError, match=words):
            pipeline.write("out.safetensors")
    with pytest.raises(UsageError, match="nowhere to write"):
        _ = Flow(Pipeline().read(checkpoint).quantize("fp8").recipe).plan


# -- recipes -----------------------------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0:"), min_size=1, max_size=20)  # no URLs
_PATTERNS = st.none() | st.sampled_from(["final", r"blocks\.\d+\.", "a|b", "ünï"])
_RUNS = st.builds(
    Run,
    memory=st.none() | st.integers(1, 2**40),
    workers=st.none() | st.integers(1, 64),
    device=st.sampled_from(["cpu", "cuda", "cuda:3"]),
    scheduler=st.sampled_from(["threads", "sync", "distributed", "tcp://host:8786"]),
)
_OUTPUTS = st.builds(Output, path=_TEXT, shard_bytes=st.none() | st.integers(1, 2**40), overwrite=st.booleans())
_SETTINGS = [{"skip": True}, {"format": "nvfp4"}, {"format": "fp8", "scaling": "row"}, {"rounding": "nearest"}]
_RULES = st.dictionaries(_TEXT.filter(str.isalnum), st.sampled_from(_SETTINGS), max_size=3)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    pipeline = Pipeline().read(draw(st.lists(_TEXT, min_size=1, max_size=3)))
    if draw(st.booleans()):
        pipeline = pipeline.target(
            preset=draw(st.sampled_from(["auto", "none", "flux2"])), include=draw(_PATTERNS), exclude=draw(_PATTERNS),
            fallback=draw(st.none() | st.sampled_from(["fp8", "int8"])), heuristics=draw(st.booleans()),
            rules=draw(_RULES),
        )  # fmt: skip
    options = draw(st.sampled_from(list(FORMATS.values())))
    pipeline = pipeline.stage(
        "quantize", **options, rounding=draw(st.sampled_from(["mse", "nearest"])),
        input_scale=draw(st.none() | st.floats(0.001, 10)) if options["format"] == "fp8" else None,
        nonfinite=draw(st.sampled_from(["refuse", "keep"])),
    )  # fmt: skip
    recipe = pipeline.recipe
    return Recipe(recipe.source, recipe.stages, draw(st.none() | _OUTPUTS), draw(_RUNS))


@settings(max_examples=60, deadline=None)
@given(recipes())
def test_recipes_survive_json(recipe: Recipe) -> None:
    text = recipe.to_json()
    assert Recipe.from_json(text) == recipe
    assert Recipe.from_json(text).to_json() == text
    assert Pipeline.from_recipe(text).recipe == recipe


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["a\0b", "\ud800", "tcp://", "cuda:\u0663", "cuda:" + "9" * 5000, 10**400, 1e-50]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_recipe_is_wrong_usage(data: st.DataObject) -> None:
    pipeline = Pipeline(workers=2).read("m").target(rules={"a": {"format": "int8"}}, fallback="fp8")
    values = pipeline.quantize("fp8", input_scale=2.0).write("o", compute=False).recipe.to_dict()
    place: Any = values
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = data.draw(_JSON)
    with contextlib.suppress(UsageError):
        Recipe.from_json(json.dumps(values))


@pytest.mark.parametrize(("stages", "words"), [
    ('[{"stage": "edit", "add": {"a": 1}}, {"stage": "edit", "add": {"b": 1}}]', "the stage edit is there twice"),
    ('[{"stage": "edit", "add": {"a": 1}, "add": {"b": 1}}]', "duplicate key 'add'"),
    ('[{"stage": "migrate", "input_scale": 1e999}]', "too large a number"),
])  # fmt: skip
def test_a_recipe_that_says_two_things(stages: str, words: str) -> None:
    """The later one would win in silence."""
    with pytest.raises(UsageError, match=words):
        Recipe.from_json(f'{{"quantloom_recipe": 1, "source": ["m"], "stages": {stages}}}')


def test_an_output_without_a_path() -> None:
    with pytest.raises(UsageError, match="recipe: output needs path"):
        Recipe.from_dict({"quantloom_recipe": 1, "output": {}})


@pytest.mark.parametrize("stage", [[], None, 5, {}])
def test_a_stage_without_a_name(stage: object) -> None:
    with pytest.raises(UsageError, match="unknown stage"):
        Recipe.from_dict({"quantloom_recipe": 1, "stages": [{"stage": stage}]})


@pytest.mark.parametrize("entry", [
    *({"rules": rules} for rules in (5, None, True, {"a": 5}, [5], [None], "a\0b", "\ud800", [{"a": 1}],
      [{"pattern": 5, "settings": {"skip": True}}], [{"pattern": "a", "settings": 5}],
      [{"pattern": "a", "settings": {"skip": True}, "order": "x"}])),
    {"fallback": 5}, {"fallback": []}, {"fallback": {}},
])  # fmt: skip
def test_a_target_that_means_nothing(entry: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Recipe.from_dict({"quantloom_recipe": 1, "stages": [{"stage": "target", **entry}]})


@pytest.mark.parametrize("entry", [
    {"run": []}, {"run": 0}, {"run": ""}, {"output": {"path": "a\0b"}}, {"output": {"path": "\ud800"}},
    {"source": ["a\0b"]}, {"output": {"path": "a", "shard_bytes": [[[5]]]}},
    *({"run": {"device": f"cuda:{index}"}} for index in ("\u0663", "\u00b2", "9" * 5000, "")),
])  # fmt: skip
def test_a_run_or_output_that_means_nothing(entry: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_dict({"quantloom_recipe": 1, **entry})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("size", ["\u0663", "\u00b2", "9" * 5000])
def test_rotations_are_plain_numbers(size: str) -> None:
    with pytest.raises(UsageError, match="unknown rotation"):
        Pipeline().quantize("int8", rotate=f"hadamard:{size}")


@pytest.mark.parametrize("scale", [1e300, 1e-50, 0.0, -1.0, float("nan"), float("inf"), 10**400])
def test_activation_scales_are_numbers_of_float32(scale: float) -> None:
    with pytest.raises(UsageError, match="positive number that float32 holds"):
        Pipeline().quantize("fp8", input_scale=scale)


def test_a_recipe_file_is_a_pipeline(checkpoint: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(workers=1).read(checkpoint).quantize("int8", scaling="tensor")
    (tmp_path / "recipe.json").write_text(pipeline.to_json())
    assert Pipeline.from_recipe(tmp_path / "recipe.json") == pipeline
    report = Pipeline.from_recipe(str(tmp_path / "recipe.json")).write(tmp_path / "out.safetensors")
    assert {layer.format for layer in report.layers} == {"int8 tensor"}


def test_sizes_in_a_recipe_may_be_words() -> None:
    values = Pipeline().read("m").quantize("fp8").recipe.to_dict()
    values["run"]["memory"] = "2GB"
    values["output"] = {"path": "out", "shard_bytes": "500MiB"}
    recipe = Recipe.from_dict(values)
    assert recipe.run.memory == 2 * 10**9
    assert recipe.output is not None
    assert recipe.output.shard_bytes == 500 * 2**20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantloom_recipe": 2}, "recipe version 2"),
        ({"quantloom_recipe": None}, "recipe version None"),
        ({"sources": []}, "recipe has no entry 'sources'; did you mean 'source'?"),
        ({"source": "m"}, "source must be a list of paths"),
        ({"stages": [{"format": "fp8"}]}, "a 'stage' each"),
        ({"stages": [{"stage": "quantise", "format": "fp8"}]}, "unknown stage 'quantise'; did you mean 'quantize'"),
        ({"stages": [{"stage": "quantize"}]}, "quantize needs format"),
        ({"stages": [{"stage": "quantize", "format": ["fp8"]}]}, "format must be a string"),
        ({"stages": [{"stage": "quantize", "format": "fp8", "roundin": "mse"}]}, "did you mean 'rounding'"),
        ({"output": {"path": "x", "shards": 5}}, "output has no entry 'shards'"),
        ({"output": {}}, "path"),
        ({"output": 3}, "output must be an object"),
        ({"run": {"memory": "much"}}, "memory 'much' is no size"),
        ({"run": {"workers": "two"}}, "workers must be a whole number or null, is 'two'"),
        ({"run": {"scheduler": 1}}, "scheduler must be a string"),
    ],
)
def test_broken_recipes_are_usage_errors(change: dict[str, Any], words: str) -> None:
    values = {**Pipeline().read("m").quantize("fp8").recipe.to_dict(), **change}
    with pytest.raises(UsageError) as caught:
        Recipe.from_json(json.dumps(values))
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000])
def test_text_that_is_no_recipe(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match=r"r\.json: recipe"):
        Recipe.load(tmp_path / "r.json")
    with pytest.raises(UsageError, match="cannot read the recipe"):
        Recipe.load(tmp_path / "missing.json")


# -- lazy flows --------------------------------------------------------------------------------------------------------


def test_a_flow_plans_without_writing(checkpoint: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    flow = Pipeline().read(checkpoint).quantize("nvfp4").write(tmp_path / "new" / "out.safetensors", compute=False)
    plan = flow.plan
    assert flow.plan is plan
    assert plan.formats == {"nvfp4": LINEAR}
    text = plan.explain()
    assert f"{LINEAR} layers to nvfp4" in text
    assert "1 tensor: embedding table" in text
    assert str(checkpoint) in text
    assert "estimate" in text
    assert "15 tensors" in text
    assert repr(plan) == (f"Plan({str(checkpoint)!r} -> {plan.output.path!r}: {LINEAR} of 15 tensors quantized, "
                          f"{show_size(plan.nbytes_in)} -> {show_size(plan.nbytes_out)})")  # fmt: skip
    odd = replace(plan, notes=("a <b> & c",))._repr_html_()
    assert odd.startswith("<pre>source ")
    assert "a &lt;b&gt; &amp; c" in odd
    assert sorted(tmp_path.rglob("*")) == before
    report = flow.compute()
    assert (tmp_path / "new" / "out.safetensors").stat().st_size == plan.nbytes_out == report.nbytes_out


def test_drawings(checkpoint: Path, tmp_path: Path) -> None:
    flow = Pipeline().read(checkpoint).quantize("int8", rotate="hadamard:16").write(tmp_path / "o", compute=False)
    svg = flow.visualize(tmp_path / "graph.svg")
    drawing = ET.parse(svg).getroot()
    assert drawing.tag.endswith("svg")
    texts = [element.text or "" for element in drawing.iter() if element.tag.endswith("text")]
    assert {"read", "rotate", "scale", "round", "pack", "write", "receipt", "copy"} <= set(texts)
    assert "6 x int8 row rotated 16" in texts
    assert "1 x int8 row" in texts  # 72 columns are no multiple of 16
    dot = flow.visualize(tmp_path / "graph.dot").read_text()
    assert dot.startswith("digraph quantloom {")
    assert dot.rstrip().endswith("}")
    assert r'"read\nblocks.0.attn.qkv" -> "rotate\nblocks.0.attn.qkv";' in dot
    assert dot.count("receipt") >= len(flow.plan.layers)
    with pytest.raises(UsageError, match=r"\.svg"):
        flow.visualize(tmp_path / "graph.png")
    with pytest.raises(QuantloomError, match="cannot write"):
        flow.visualize(tmp_path / "nowhere" / "graph.svg")


def test_nothing_to_quantize_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    pipeline = Pipeline().read(checkpoint).quantize("fp8", scaling="block", block_size=1000)
    flow = pipeline.write(tmp_path / "o", compute=False)
    with pytest.raises(PlanError, match=r"nothing to quantize to fp8: .*block size 1000 does not divide"):
        _ = flow.plan


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("8GB", 8 * 10**9), ("500MiB", 500 * 2**20), ("2.5G", 2_500_000_000), (" 1 kb ", 1000), ("7", 7), ("1TiB", 2**40),
     (12, 12), (None, None)],
)  # fmt: skip
def test_sizes(text: Any, value: int | None) -> None:
    assert parse_size(text, "memory") == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1PB", "1.GB", "8 G B", "9" * 400, True])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(UsageError, match=r"--memory .* is no size"):
        parse_size(text, "--memory")


@given(st.integers(0, 10**15))
def test_shown_sizes_read_back(count: int) -> None:
    back = parse_size(show_size(count).replace(" ", ""), "size")
    assert back is not None
    assert abs(back - count) <= max(1, count) * 0.005


def test_shown_times() -> None:
    shown = [show_seconds(value) for value in (0.25, 12.34, 245, 7800)]
    assert shown == ["250 ms", "12.3 s", "4 min 05 s", "2 h 10 min"]
