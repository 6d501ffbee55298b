"""The per-layer file: what it may say, who wins, and what a mistake in it reports."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantloom.formats.errors import UsageError
from quantloom.stages.rule_files import load_rules
from quantloom.stages.rules import Rule, literal_characters, match_rules

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [f"double_blocks.{i}.{part}" for i in range(3) for part in ("img_attn.qkv", "img_mlp.0", "txt_mlp.2")]

JSON = r'{"double_blocks\\.\\d+\\.img_attn": {"format": "nvfp4"}, "img_mlp": {"format": "fp8", "scaling": "row"}}'
YAML = 'double_blocks\\.\\d+\\.img_attn: {format: nvfp4}\n"img_mlp":\n  format: fp8\n  scaling: row\n'
TOML = '\'double_blocks\\.\\d+\\.img_attn\' = {format = "nvfp4"}\n[img_mlp]\nformat = "fp8"\nscaling = "row"\n'


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "text"), [("a.json", JSON), ("a.yaml", YAML), ("a.yml", YAML), ("a.TOML", TOML)])
def test_the_same_rules_from_every_kind_of_file(tmp_path: Path, name: str, text: str) -> None:
    assert load_rules(written(tmp_path, name, text)) == (
        Rule(r"double_blocks\.\d+\.img_attn", {"format": "nvfp4"}, 0),
        Rule("img_mlp", {"format": "fp8", "scaling": "row"}, 1),
    )


@pytest.mark.parametrize("scale", ["1e300", "1e-50", ".nan", ".inf", "0.0", "-1.0"])
def test_activation_scales_are_numbers_of_float32(scale: str, tmp_path: Path) -> None:
    number = scale.replace("1e", "1.0e+").replace("+-", "-")
    with pytest.raises(UsageError, match=r"input_scale .* must be a positive number that float32 holds"):
        load_rules(written(tmp_path, "a.yaml", f"a: {{format: fp8, input_scale: {number}}}"))


def test_a_bomb_of_aliases_makes_a_short_message(tmp_path: Path) -> None:
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 8)]
    for text in (f"a: {{format: {{{', '.join(lines)}}}}}", f"a: {{block_size: 0x{'f' * 5000}}}"):
        with pytest.raises(UsageError) as caught:
            load_rules(written(tmp_path, "a.yaml", text))
        assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{\n "a": {"skip": true},\n}', "line 3"),
        ("a.json", '{"a": {"skip": true}, "a": {"skip": true}}', "'a' is given twice"),
        ("a.yaml", "a: {skip: true}\nb: {skip: true\n", "line 3"),
        ("a.yaml", "a: {skip: true}\na: {skip: true}\n", "line 2, column 1: 'a' is given twice"),
        ("a.yaml", "? [a, b]\n: {skip: true}\n", "line 1"),
        ("a.yaml", "1: {skip: true}\n", "1 is no pattern; quote it"),
        ("a.toml", "a = {skip = true}\nb = \n", "line 2"),
        ("a.toml", "a = {skip = true}\na = {skip = true}\n", "line 2"),
        ("a.txt", "a: {skip: true}", "must end in .json, .yaml, .yml or .toml"),
        ("a.json", "[]", "holds a list, not a mapping"),
        ("a.yaml", "", "holds nothing, not a mapping"),
        ("a.json", "{}", "holds no rule"),
        ("a.json", '{"a": "fp8"}', "'a' has text instead of settings"),
        ("a.json", '{"a": {}}', "no settings"),
        ("a.json", '{"a": {"formt": "fp8"}}', "unknown setting 'formt'; did you mean 'format'"),
        ("a.json", '{"a": {"format": "mxpf8"}}', "unknown format 'mxpf8'; did you mean 'mxfp8'"),
        ("a.json", '{"a": {"format": "fp8", "scaling": "rows"}}', "unknown scaling 'rows' of fp8; did you mean 'row'"),
        ("a.json", '{"a": {"scaling": "rows"}}', "unknown scaling 'rows'; did you mean 'row'"),
        ("a.json", '{"a": {"block_size": 0}}', "block_size must be a whole number above 0, not 0"),
        ("a.json", '{"a": {"block_size": true}}', "block_size must be a whole number above 0, not True"),
        ("a.json", '{"a": {"skip": "yes"}}', "skip must be true or false, not 'yes'"),
        ("a.json", '{"a": {"skip": true, "format": "fp8"}}', "skip leaves nothing to set, but format is set too"),
        ("a.json", '{"attn(": {"skip": true}}', r"'attn\(' is not a regular expression: .* at position 4"),
        ("a.json", '{"a{99999999999}": {"skip": true}}', "is not a usable regular expression"),
    ],
)
def test_a_mistake_names_the_file_and_the_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_rules(written(tmp_path, name, text))
    assert str(tmp_path / name) in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_rules(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": {"skip": true}}')
    with pytest.raises(UsageError, match="not UTF-8"):
        load_rules(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("", 0),
        ("attn", 4),
        (r"a\.b[.]c", 5),
        (r"blocks\.\d+\.attn", 12),
        ("(?:attn|mlp)x", 4),
        ("a*b+c?d{3}", 4),
        ("(?i:attn)$", 4),
        (r"attn(?=\.q)(?!xyz)", 6),
        ("(?P<n>ab)(?P=n)[xyz]", 2),
    ],
)
def test_specificity_counts_what_a_match_fixes(pattern: str, count: int) -> None:
    assert literal_characters(pattern) == count


def test_the_most_specific_rule_wins_and_ties_go_to_the_first() -> None:
    skip = {"skip": True}
    broad, narrow = Rule("blocks", skip, 0), Rule(r"double_blocks\.1\.", skip, 1)
    first, second = Rule("img_attn", skip, 2), Rule("attn.qkv", skip, 3)
    won = match_rules([second, first, broad, narrow], NAMES)
    assert set(won) == set(NAMES)
    assert won["double_blocks.0.img_mlp.0"] == broad
    assert won["double_blocks.1.img_mlp.0"] == narrow
    assert won["double_blocks.0.img_attn.qkv"] == first, "eight literals against seven and a dot that is any character"
    tied = match_rules([Rule("img", skip, 1), Rule("txt", skip, 2), Rule("mlp", skip, 0)], NAMES)
    assert tied["double_blocks.0.img_mlp.0"].pattern == "mlp"


def test_a_rule_that_wins_nothing_but_matches_is_no_mistake() -> None:
    won = match_rules([Rule("mlp", {"skip": True}, 0), Rule("img_mlp|txt_mlp", {"skip": True}, 1)], NAMES)
    assert {rule.pattern for rule in won.values()} == {"img_mlp|txt_mlp"}


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [("img_atn", "double_blocks.0.img_attn.qkv"), (r"^double_blcks\.\d+\.txt_mlp", "double_blocks.0.txt_mlp.2")],
)
def test_a_rule_that_matches_nothing_names_the_nearest(pattern: str, nearest: str) -> None:
    with pytest.raises(UsageError) as caught:
        match_rules([Rule(pattern, {"skip": True})], NAMES)
    assert repr(pattern) in str(caught.value)
    assert f"nearest: {nearest!r}" in str(caught.value)


def test_rules_travel() -> None:
    rule = Rule("attn", {"format": "int8", "scaling": "row", "rotate": "hadamard:256", "rounding": "mse"}, 3)
    assert Rule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert len({rule, Rule.from_dict(rule.to_dict())}) == 1
    with pytest.raises(UsageError, match="pattern, settings and order"):
        Rule.from_dict({"pattern": "a"})


@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=5))
def test_any_pattern_is_used_or_refused(pattern: str, names: list[str]) -> None:
    try:
        won = match_rules([Rule(pattern, {"skip": True})], names)
    except UsageError:
        return
    assert won
