"""Headers: every refusal with its words, agreement with the safetensors library, layout, and fuzzing."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantloom.formats.errors import CheckpointError, PlanError
from quantloom.formats.heads import DATA_ALIGNMENT, layout
from quantloom.formats.safetensors import Header, parse_json, read_header
from quantloom.formats.tensors import DTYPE_BITS, TensorSpec, torch_dtype

if TYPE_CHECKING:
    from pathlib import Path

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
TORCH_DTYPES = [name for name, bits in DTYPE_BITS.items() if bits >= 8]


def pack(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def store(path: Path, table: Any, data: bytes = bytes(24)) -> Path:
    path.write_bytes(pack(table if isinstance(table, bytes) else json.dumps(table).encode(), data))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that generated examples overwrite."""
    return tmp_path_factory.mktemp("headers") / "fuzz.safetensors"


class TestReading:
    def test_places_dtypes_shapes_and_metadata(self, path: Path) -> None:
        table = {
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]},
        }
        header = read_header(store(path, table))
        start = path.stat().st_size - 24
        assert [(r.name, r.dtype, r.shape, r.start, r.nbytes) for r in header.refs] == [
            ("a", "BF16", (2, 4), start, 16),
            ("b", "F32", (2,), start + 16, 8),
        ]
        assert {r.path for r in header.refs} == {str(path)} == {header.path}
        assert header.metadata == {"format": "pt"}

    def test_digest_covers_the_header_and_not_the_data(self, path: Path) -> None:
        first = read_header(store(path, {"a": F32})).digest
        assert first == hashlib.sha256(path.read_bytes()[:-24]).hexdigest()
        assert read_header(store(path, {"a": F32}, b"\xff" * 24)).digest == first
        assert read_header(store(path, {"b": F32})).digest != first

    def test_no_tensor_and_no_metadata(self, path: Path) -> None:
        header = read_header(store(path, {}, b""))
        assert header.refs == ()
        assert header.metadata == {}

    def test_scalars_and_empty_tensors_wherever_they_lie(self, path: Path) -> None:
        table = {
            "scalar": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]},
            "last": {"dtype": "F32", "shape": [0, 5], "data_offsets": [8, 8]},
            "first": {"dtype": "F32", "shape": [3, 0], "data_offsets": [0, 0]},
        }
        refs = read_header(store(path, table, bytes(8))).refs
        assert [(r.name, r.nbytes) for r in refs] == [("first", 0), ("scalar", 8), ("last", 0)]

    @pytest.mark.parametrize(("dtype", "bits"), DTYPE_BITS.items())
    def test_every_dtype(self, path: Path, dtype: str, bits: int) -> None:
        store(path, {"a": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, bits]}}, bytes(bits))
        (ref,) = read_header(path).refs
        assert (ref.dtype, ref.nbytes, ref.start) == (dtype, bits, path.stat().st_size - bits)
        assert len(safetensors.deserialize(path.read_bytes())) == 1

    def test_trailing_spaces_and_unknown_fields_are_allowed(self, path: Path) -> None:
        store(path, json.dumps({"a": F32 | {"note": 1}}).encode() + b"   ")
        assert len(read_header(path).refs) == 1

    @pytest.mark.parametrize("length", [640, 896, 1152, 1408])
    def test_header_whose_length_looks_like_a_pickle(self, path: Path, length: int) -> None:
        text = json.dumps({"a": F32}).encode()
        store(path, text + b" " * (length - len(text)))
        assert path.read_bytes()[:2] in {b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}
        assert len(read_header(path).refs) == 1

    def test_no_weight_byte_is_read(self, path: Path) -> None:
        table = {"a": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}
        store(path, table, b"")
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + (1 << 40))
        tracemalloc.start()
        (ref,) = read_header(path).refs
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert ref.nbytes == 1 << 40
        assert peak < 1 << 20


def tensor(**changes: Any) -> dict[str, Any]:
    """A header of one tensor ``w``, different from a valid one in ``changes``; None leaves the field out."""
    return {"w": {key: value for key, value in (F32 | changes).items() if value is not None}}


def pair(begin: int, end: int) -> dict[str, Any]:
    """16 bytes of ``a``, then 8 bytes of ``b`` that claim to lie at ``begin`` to ``end``."""
    return {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [begin, end]},
    }


REFUSALS: dict[str, tuple[Any, str]] = {
    "broken JSON": (b'{"w": ', "header: broken JSON: Expecting value"),
    "not UTF-8": (b'{"\xff": 1}', "broken JSON: .*utf-8.* can't decode"),
    "UTF-16": ('{"w": 1}'.encode("utf-16-le"), "broken JSON"),
    "nested too deep": (b'{"w":' + b"[" * 100_000, "broken JSON: nested too deep"),
    "not JSON's NaN": (b'{"w": NaN}', "broken JSON: NaN is not JSON"),
    "huge number": (b'{"w": ' + b"9" * 5000 + b"}", "broken JSON: Exceeds the limit"),
    "half a surrogate pair": (b'{"\\ud800": 1}', "broken JSON: .*surrogates not allowed"),
    "array": (b"[1, 2]", "does not begin with '{'"),
    "leading space": (b' {"w": 1}', "does not begin with '{'"),
    "two values": (b"{} {}", "broken JSON: Extra data"),
    "duplicate tensor": (b'{"w": 1, "v": 2, "w": 3}', "broken JSON: duplicate key 'w'"),
    "duplicate field": (b'{"w": {"dtype": "F32", "dtype": "F16"}}', "broken JSON: duplicate key 'dtype'"),
    "duplicate metadata": (b'{"__metadata__": {"a": "1", "a": "2"}}', "broken JSON: duplicate key 'a'"),
    "metadata list": ({"__metadata__": ["a"]}, r"__metadata__ is \['a'\], not an object"),
    "metadata null": ({"__metadata__": None}, "__metadata__ is None, not an object"),
    "metadata number": ({"__metadata__": {"step": 7}}, "__metadata__ key 'step' holds 7, not a string"),
    "metadata nested": ({"__metadata__": {"a": {"b": "c"}}}, "__metadata__ key 'a' holds .*, not a string"),
    "entry no object": ({"w": 3}, "tensor 'w': entry is 3, not an object"),
    "no dtype": (tensor(dtype=None), "tensor 'w': entry lacks dtype"),
    "no shape, no offsets": (tensor(shape=None, data_offsets=None), "tensor 'w': entry lacks shape, data_offsets"),
    "unknown dtype": (tensor(dtype="BFLOAT16"), r"tensor 'w': unknown dtype 'BFLOAT16'; did you mean .*'BF16'"),
    "dtype in lower case": (tensor(dtype="f8_e4m3"), "unknown dtype 'f8_e4m3'"),
    "dtype number": (tensor(dtype=3), "tensor 'w': unknown dtype 3"),
    "dtype list": (tensor(dtype=["F32"]), r"tensor 'w': unknown dtype \['F32'\]"),
    "shape number": (tensor(shape=6), "tensor 'w': shape 6 is not a list of non-negative integers"),
    "negative shape": (tensor(shape=[-2, -3]), r"shape \[-2, -3\] is not a list of non-negative integers"),
    "float shape": (tensor(shape=[2.0, 3]), r"shape \[2\.0, 3\] is not a list"),
    "bool shape": (tensor(shape=[True, 6]), r"shape \[True, 6\] is not a list"),
    "null in shape": (tensor(shape=[None]), r"shape \[None\] is not a list"),
    "absurd shape": (tensor(shape=[2**40, 2**40]), "shape .* has more than 2\\*\\*63 elements"),
    "absurd empty shape": (tensor(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), "more than 2\\*\\*63 elements"),
    "absurd number": (tensor(shape=[10**4000]), "more than 2\\*\\*63 elements"),
    "offsets missing one": (tensor(data_offsets=[24]), r"tensor 'w': data_offsets \[24\] is not \[begin, end\]"),
    "offsets three": (tensor(data_offsets=[0, 1, 24]), r"data_offsets \[0, 1, 24\] is not \[begin, end\]"),
    "offsets object": (tensor(data_offsets={"0": 24}), "data_offsets {'0': 24} is not"),
    "offsets negative": (tensor(data_offsets=[-24, 0]), r"data_offsets \[-24, 0\] is not"),
    "offsets backwards": (tensor(data_offsets=[24, 0]), r"data_offsets \[24, 0\] is not"),
    "offsets bool": (tensor(data_offsets=[False, 24]), r"data_offsets \[False, 24\] is not"),
    "offsets float": (tensor(data_offsets=[0, 24.0]), r"data_offsets \[0, 24\.0\] is not"),
    "offsets absurd": (tensor(data_offsets=[0, 2**63]), r"data_offsets \[0, 9223372036854775808\] is not"),
    "too few bytes": (tensor(data_offsets=[0, 20]), r"F32 of shape \[2, 3\] takes 24 bytes, but .*\[0, 20\] hold 20"),
    "too many bytes": (tensor(shape=[5]), r"F32 of shape \[5\] takes 20 bytes, but data_offsets \[0, 24\] hold 24"),
    "half a byte": (tensor(dtype="F4", shape=[47]), r"F4 of shape \[47\] takes 188 bits, not a whole number of bytes"),
    "three quarters": (tensor(dtype="F6_E2M3", shape=[3, 3]), r"F6_E2M3 of shape \[3, 3\] takes 54 bits"),
    "overlap": (pair(12, 20), "tensor 'b' overlaps 'a': it begins at byte (\\d+) of the file, where"),
    "same place": (pair(0, 8), "tensor 'a' overlaps 'b'"),
    "hole": (pair(20, 28), "tensor 'b' leaves a hole after 'a'"),
    "hole at the start": (tensor(data_offsets=[8, 32]), "tensor 'w' leaves a hole after 'header'"),
    "beyond the file": (tensor(shape=[3, 3], data_offsets=[0, 36]), "'w' ends at byte .*, beyond .* truncated"),
    "trailing bytes": (tensor(shape=[4], data_offsets=[0, 16]), "8 trailing bytes: data ends with 'w' at byte"),
    "data without tensors": ({}, "24 trailing bytes: data ends with 'header'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_names_file_and_fault(path: Path, case: str) -> None:
    table, message = REFUSALS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(store(path, table))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 600


def test_overlap_and_hole_give_the_two_offsets(path: Path) -> None:
    start = 8 + len(json.dumps(pair(12, 20)))
    with pytest.raises(CheckpointError, match=f"begins at byte {start + 12} of the file, where {start + 16} was due"):
        read_header(store(path, pair(12, 20)))


KINDS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes is too short"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "7 bytes is too short"),
    "length only": (b"\x40\0\0\0\0\0\0\0", r"header length 64 runs past the end of the file \(0 bytes follow it\)"),
    "header cut": (pack(b'{"a": ' + b" " * 600)[:300], "header length 606 runs past the end of the file .292 bytes"),
    "header cut, pickle length": (pack(b"{" + b" " * 639)[:300], "header length 640 runs past the end"),
    "over the limit": ((100_000_001).to_bytes(8, "little") + b"{" * 20, "header length 100000001 exceeds 100000000"),
    "largest length": (b"\xff" * 8 + b"{}", "header length 18446744073709551615 exceeds"),
    "no header": (bytes(16), "header of 0 bytes does not begin with"),
    "zip": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(40), "is a pickle, which can run code; convert it to safetensors"),
    **{
        f"pickle {protocol}": (b"\x80" + bytes([protocol]) + b"}q\x00(X\x01\x00\x00\x00a", "is a pickle, which can run")
        for protocol in (2, 3, 4, 5)
    },
    "old torch": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is a pickle"),
    "short pickle": (b"\x80\x04N.", "is a pickle"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "is a GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "is a web page"),
    "JSON": (b'{"architectures": ["LlamaForCausalLM"]}', "is a JSON file"),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_files_that_are_something_else(path: Path, case: str) -> None:
    content, message = KINDS[case]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))


def test_claimed_header_is_not_allocated(path: Path) -> None:
    path.write_bytes((99_999_999).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="runs past the end"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="it is a folder"):
        read_header(tmp_path)


def test_parse_json_begins_with_the_place() -> None:
    assert parse_json(b'{"a": [1, "\\u00e9"]}', "x") == {"a": [1, "é"]}
    with pytest.raises(CheckpointError, match=r"^folder/index\.json: index: broken JSON"):
        parse_json(b"{", "folder/index.json: index")


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
metadatas = st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=3)


@st.composite
def specs(draw: st.DrawFn) -> list[TensorSpec]:
    found = []
    for name in draw(st.lists(names, max_size=8, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(shapes)
        # Sub-byte dtypes have to end on a byte.
        found.append(TensorSpec(name, dtype, shape if DTYPE_BITS[dtype] >= 8 else (*shape, 4)))
    return found


class TestAgreement:
    @settings(max_examples=150, deadline=None)
    @given(
        st.dictionaries(names, st.tuples(st.sampled_from(TORCH_DTYPES), shapes), max_size=6), metadatas, st.randoms()
    )
    def test_files_that_the_library_writes(
        self, scratch: Path, wanted: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], random: Any
    ) -> None:
        tensors = {}
        for name, (dtype, shape) in wanted.items():
            raw = torch.tensor(list(random.randbytes(TensorSpec(name, dtype, shape).nbytes)), dtype=torch.uint8)
            tensors[name] = (raw & 1 if dtype == "BOOL" else raw).view(torch_dtype(dtype)).reshape(shape)
        scratch.write_bytes(safetensors.torch.save(tensors, metadata or None))
        header = read_header(scratch)
        content = scratch.read_bytes()
        expected = {
            name: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
            for name, info in safetensors.deserialize(content)
        }
        found = {
            ref.name: (ref.dtype, ref.shape, content[ref.start : ref.start + ref.nbytes]) for ref in header.refs
        }
        assert found == expected
        with safetensors.safe_open(scratch, "pt") as opened:
            assert (opened.metadata() or {}) == header.metadata == metadata

    @settings(max_examples=150, deadline=None)
    @given(specs(), metadatas)
    def test_files_that_layout_places(self, scratch: Path, wanted: list[TensorSpec], metadata: dict[str, str]) -> None:
        head, starts, size = layout(wanted, metadata)
        content = bytearray(size)
        content[: len(head)] = head
        for number, (spec, start) in enumerate(zip(wanted, starts, strict=True)):
            content[start : start + spec.nbytes] = bytes([number + 1]) * spec.nbytes
        scratch.write_bytes(content)

        header = read_header(scratch)
        assert header.metadata == metadata
        assert header.digest == hashlib.sha256(head).hexdigest()
        assert {(r.name, r.dtype, r.shape, r.start) for r in header.refs} == {
            (s.name, s.dtype, s.shape, start) for s, start in zip(wanted, starts, strict=True)
        }
        library = {name: bytes(info["data"]) for name, info in safetensors.deserialize(bytes(content))}
        assert library == {s.name: bytes([number + 1]) * s.nbytes for number, s in enumerate(wanted)}


class TestLayout:
    def test_starts_follow_the_given_order_and_places_the_width(self) -> None:
        wanted = [
            TensorSpec("codes", "F8_E4M3", (3,)),
            TensorSpec("scale", "F32", (1,)),
            TensorSpec("bias", "BF16", (5,)),
            TensorSpec("offset", "I32", (2,)),
        ]
        head, starts, size = layout(wanted, {})
        assert [start - len(head) for start in starts] == [22, 0, 12, 4]
        assert size == len(head) + 25
        assert list(json.loads(head[8:])) == ["scale", "offset", "bias", "codes"]

    @settings(max_examples=100, deadline=None)
    @given(specs(), metadatas)
    def test_everything_is_aligned_without_holes(self, wanted: list[TensorSpec], metadata: dict[str, str]) -> None:
        head, starts, size = layout(wanted, metadata)
        assert len(head) % DATA_ALIGNMENT == 0
        assert len(head) == 8 + int.from_bytes(head[:8], "little")
        for spec, start in zip(wanted, starts, strict=True):
            assert start % max(DTYPE_BITS[spec.dtype] // 8, 1) == 0
        assert size == len(head) + sum(spec.nbytes for spec in wanted)

    def test_same_input_same_bytes_and_no_metadata_key_when_empty(self) -> None:
        wanted = [TensorSpec("a", "F16", (2,))]
        assert layout(wanted, {}) == layout(wanted, {})
        assert b"__metadata__" not in layout(wanted, {})[0]
        assert json.loads(layout(wanted, {"k": "v"})[0][8:])["__metadata__"] == {"k": "v"}

    def test_nothing_to_place(self) -> None:
        head, starts, size = layout([], {})
        assert (starts, size) == ([], len(head))
        assert head[8:].strip() == b"{}"

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            ([TensorSpec("a", "F16", (2,)), TensorSpec("a", "F32", (1,))], "'a' would be written twice"),
            ([TensorSpec("__metadata__", "F16", (2,))], "reserved name"),
            ([TensorSpec("a", "FP16", (2,))], "'a': unknown dtype 'FP16'; did you mean .*'F16'"),
            ([TensorSpec("a", "F4", (3,))], r"'a': F4 of shape \[3\] is not a whole number of bytes"),
            ([TensorSpec("\ud800", "F16", (2,))], "cannot be written as UTF-8"),
        ],
    )  # fmt: skip
    def test_what_no_reader_would_accept(self, wanted: list[TensorSpec], message: str) -> None:
        with pytest.raises(PlanError, match=message) as caught:
            layout(wanted, {})
        assert len(str(caught.value)) < 500


def test_header_that_readers_would_refuse_for_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantloom.formats.heads.MAX_HEADER_BYTES", 1000)
    layout([TensorSpec("n" * 850, "F16", (2,))], {})
    with pytest.raises(PlanError, match="header of 1016 bytes; readers accept 1000: write more shards"):
        layout([TensorSpec("n" * 950, "F16", (2,))], {})


def check_hostile(scratch: Path, content: bytes) -> Header | None:
    """Read a file that may be anything: a header that holds, or CheckpointError, and little memory either way."""
    scratch.write_bytes(content)
    tracemalloc.start()
    try:
        header = read_header(scratch)
    except CheckpointError as error:
        header, message = None, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
    if header is None:
        assert message.startswith(str(scratch))
        assert len(message) < len(str(scratch)) + 1000
        return None
    position = len(content) - sum(ref.nbytes for ref in header.refs)
    for ref in header.refs:
        assert ref.start == position
        position += ref.nbytes
    # Whatever is accepted here, the library accepts too; -0 is a float to it.
    if b"-0" not in content:
        assert len(safetensors.deserialize(content)) == len(header.refs)
    return header


VALID = json.dumps({"__metadata__": {"format": "pt"}, **pair(16, 24), "é": F32 | {"data_offsets": [24, 48]}}).encode()
TOKENS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"9" * 30, b"null", b"true", b"1e9", b"NaN", b"\\ud800",
          b"F4", b"F32", b"U8", b"[" * 2000, b"\xff", b"\0", b'"a":', b"__metadata__", b" ", b"16", b"24"]  # fmt: skip
edits = st.lists(
    st.tuples(st.integers(0, len(VALID)), st.integers(0, 8), st.sampled_from(TOKENS) | st.binary(max_size=4)),
    min_size=1, max_size=4,
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(sorted(DTYPE_BITS)) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
entries = st.fixed_dictionaries({
    "dtype": st.sampled_from(sorted(DTYPE_BITS)) | values,
    "shape": st.lists(st.integers(-1, 4), max_size=3) | values,
    "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | values,
})  # fmt: skip


class TestHostile:
    def test_the_unharmed_file_is_accepted(self, scratch: Path) -> None:
        assert check_hostile(scratch, pack(VALID, bytes(48))) is not None

    @settings(max_examples=300, deadline=None)
    @given(edits)
    def test_edited_headers(self, scratch: Path, changes: list[tuple[int, int, bytes]]) -> None:
        header = VALID
        for at, removed, inserted in changes:
            header = header[:at] + inserted + header[at + removed :]
        check_hostile(scratch, pack(header, bytes(48)))

    @settings(max_examples=200, deadline=None)
    @given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | values), st.integers(0, 16))
    def test_odd_values_in_the_right_places(self, scratch: Path, table: dict[str, Any], size: int) -> None:
        check_hostile(scratch, pack(json.dumps(table).encode(), bytes(size)))

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=12), st.integers(0, 2**64 - 1) | st.integers(0, 400), st.integers(0, 300))
    def test_wrong_lengths_and_random_bytes(self, scratch: Path, head: bytes, length: int, kept: int) -> None:
        check_hostile(scratch, head)
        check_hostile(scratch, length.to_bytes(8, "little") + VALID[:kept])
        check_hostile(scratch, length.to_bytes(8, "little") + head)
