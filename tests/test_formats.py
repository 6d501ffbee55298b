"""Every registered format with every scaling: row ranges, error bounds, searches; and the element grids themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (  # noqa: F401
    Quantized,
    decode,
    one_thread,
    padded,
    quantize,
    row_multiplier,
    spread,
    squared_errors,
    whole_of,
)

from quantloom.formats.elements import (
    E2M1,
    E4M3,
    E5M2,
    INT8,
    Element,
    clear_last_bit_,
    e2m1_encode_,
    e8m0_ceil,
    e8m0_decode,
    e8m0_inverse,
    shorten_,
)
from quantloom.formats.format import Format, Scales
from quantloom.formats.reduce import absmax, halvings, least, tree_sum_
from quantloom.formats.registry import FORMATS, make_format
from quantloom.formats.rotation import rotate_, rotation_group
from quantloom.formats.scratch import scratch, tiles

GRIDS: dict[str, Element] = {"fp8": E4M3, "fp8_e5m2": E5M2, "int8": INT8, "mxfp8": E4M3, "hybrid_mxfp8": E4M3,
                              "nvfp4": E2M1}  # fmt: skip
"""What the codes of each format mean. A format that is registered without an entry here fails the suite."""

FORMAT_CASES = [
    (name, scaling, size)
    for name, info in FORMATS.items()
    for scaling in info.scalings
    for size in ((8, 16) if scaling == "block" else (None,))
]
CASES = [
    pytest.param(make_format(*case), search, id="-".join(str(part) for part in (*case, "mse" if search else 0) if part))
    for case in FORMAT_CASES
    for search in ((False, True) if make_format(*case).searches else (False,))
]
NEAREST = [case for case in CASES if not case.values[1]]
every_case = pytest.mark.parametrize(("fmt", "search"), CASES)

KINDS = ("normal", "bfloat16", "outliers", "zeros", "tiny", "mixed", "huge", "ternary")
SHAPES = ((33, 50), (1, 32), (48, 64), (64, 96))


def weights(kind: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 0.02
    rows = torch.arange(shape[0])[:, None]
    if kind == "bfloat16":
        return x.bfloat16().float()
    if kind == "outliers":
        return torch.where(torch.rand(shape, generator=generator) < 0.01, x * 300, x)
    if kind == "zeros":
        x[rows.flatten() % 3 == 1] = 0.0
        x[:, : shape[1] // 2] = -0.0
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "mixed":
        x *= torch.where(rows % 2 == 1, 1e-30, 1.0)
    elif kind == "huge":
        x = x / x.abs().max() * 3e38
    elif kind == "ternary":
        x = x.sign() * (x.abs() > 0.01)
    return x


def shapes_of(fmt: Format) -> Iterator[tuple[int, int]]:
    """Shapes that the format takes; the next multiples of its block where it does not."""
    for rows, columns in SHAPES:
        size = fmt.block_size or 1
        shape = (-(-rows // size) * size, -(-columns // size) * size) if fmt.scaling == "block" else (rows, columns)
        assert fmt.refuse(shape) is None
        yield shape


def same(a: Quantized, b: Quantized) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a.bits(), b.bits(), strict=True))


def in_pieces(fmt: Format, weight: torch.Tensor, search: bool, cuts: list[int]) -> Quantized:
    """Quantizes row ranges one after another and puts the results together."""
    whole = whole_of(fmt, weight, search)
    edges = [0, *sorted(set(cuts)), weight.shape[0]]
    pieces = [quantize(fmt, weight[a:b], search, whole) for a, b in pairwise(edges) if b > a]
    if fmt.scaling == "tensor":
        assert all(torch.equal(piece.scales.stored, pieces[0].scales.stored) for piece in pieces)
        scales = pieces[0].scales
    else:
        stored = [piece.scales.stored.view(torch.uint8) for piece in pieces]
        stored_type = pieces[0].scales.stored.dtype
        multiplier = torch.cat([piece.scales.multiplier for piece in pieces])
        scales = Scales(torch.cat(stored).view(stored_type), multiplier)
    codes = torch.cat([piece.codes.view(torch.uint8) for piece in pieces]).view(pieces[0].codes.dtype)
    return Quantized(codes, scales, whole)


def test_every_registered_format_is_covered() -> None:
    assert set(GRIDS) == set(FORMATS), "add the new format's grid to GRIDS"
    assert {(case[0], case[1]) for case in FORMAT_CASES} == {
        (name, scaling) for name, info in FORMATS.items() for scaling in info.scalings
    }


@every_case
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_row_ranges_equal_the_whole_tensor(fmt: Format, search: bool, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(list(shapes_of(fmt))))
    weight = weights(data.draw(st.sampled_from(KINDS)), shape, data.draw(st.integers(0, 99)))
    units = shape[0] // fmt.rows_multiple
    cuts = [cut * fmt.rows_multiple for cut in data.draw(st.lists(st.integers(0, units), max_size=4))]
    assert same(in_pieces(fmt, weight, search, cuts), quantize(fmt, weight, search))


@every_case
def test_row_ranges_beyond_one_tile(fmt: Format, search: bool) -> None:
    """Work is done in cache-sized tiles: their edges must not show either."""
    weight = weights("normal", (112, 2 * 512))
    assert same(in_pieces(fmt, weight, search, [16, 96]), quantize(fmt, weight, search))


@every_case
def test_threads_make_no_difference(fmt: Format, search: bool) -> None:
    weight, before = weights("outliers", (96, 1024)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quantize(fmt, weight, search)
        torch.set_num_threads(3)
        assert same(quantize(fmt, weight, search), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@every_case
def test_codes_are_the_nearest(fmt: Format, search: bool, kind: str) -> None:
    """No other code of the grid is nearer to weight / scale, and so no error exceeds half a step of the grid."""
    grid = grid_of(GRIDS[fmt.name])
    for shape in list(shapes_of(fmt))[:3]:
        weight = weights(kind, shape)
        quantized = quantize(fmt, weight, search)
        x, decoded = padded(fmt, weight).double(), decode(fmt, quantized).double()
        assert torch.isfinite(decoded).all()
        multiplier = spread(fmt, quantized.scales.multiplier, x.shape).double()
        assert (decoded[multiplier == 0] == 0).all()
        used = multiplier > 0
        ratio, code = (x[used] / multiplier[used]).contiguous(), decoded[used] / multiplier[used]
        above = torch.searchsorted(grid, ratio).clamp_(1, len(grid) - 1)
        distance = torch.minimum((grid[above] - ratio).abs(), (ratio - grid[above - 1]).abs())
        # Scales and products are rounded to float32; codes of subnormal weights to multiples of 2**-149.
        slack = ratio.abs() * 1e-6 + 2.0**-149 / multiplier[used]
        assert ((code - ratio).abs() <= distance + slack).all(), (shape, kind)
        if fmt.name != "nvfp4":  # its scale is rounded, so amax may lie a little beyond the grid
            assert ratio.abs().max() <= grid[-1] * (1 + 1e-6)


def grid_of(element: Element) -> torch.Tensor:
    """All finite values of a grid, ascending, float64."""
    values = element.values.double()
    values = values[values.isfinite() & (values.abs() <= element.largest)]
    return torch.unique(values)


@pytest.mark.parametrize("kind", KINDS)
@every_case
def test_encoding_decoded_weights_changes_nothing(fmt: Format, search: bool, kind: str) -> None:
    for shape in shapes_of(fmt):
        quantized = quantize(fmt, weights(kind, shape), search)
        again = fmt.encode_(decode(fmt, quantized), quantized.scales)
        assert torch.equal(again.view(torch.uint8), quantized.codes.view(torch.uint8))


@every_case
def test_shapes_and_types_are_those_announced(fmt: Format, search: bool) -> None:
    names = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8}
    for shape in shapes_of(fmt):
        quantized = quantize(fmt, weights("normal", shape), search)
        columns = fmt.columns(shape[1])
        assert quantized.codes.shape == (shape[0], fmt.code_columns(columns))
        assert quantized.codes.dtype == names[fmt.code_dtype]
        assert quantized.scales.stored.shape == quantized.scales.multiplier.shape == fmt.scale_shape(shape)
        assert quantized.scales.stored.dtype == (torch.float32 if fmt.scale_dtype == "F32" else names[fmt.scale_dtype])
        assert torch.equal(fmt.multiplier(quantized.scales.stored, quantized.whole), quantized.scales.multiplier)
        assert decode(fmt, quantized).shape == (shape[0], columns)


@every_case
def test_zero_groups(fmt: Format, search: bool) -> None:
    """Zero weights give zero codes, and a scale that a client can multiply by."""
    weight = weights("normal", (48, 64))
    weight[16:32] = 0.0
    for zeros in (weight, torch.zeros(48, 64)):
        quantized = quantize(fmt, zeros, search)
        stored = quantized.scales.stored.float()
        assert torch.isfinite(stored).all()
        if fmt.scale_dtype == "F32":
            assert (stored > 0).all()
        assert not quantized.codes[16:32].view(torch.uint8).any()
        assert not decode(fmt, quantized)[16:32].any()


@pytest.mark.parametrize(("fmt", "search"), NEAREST)
def test_formats_that_do_not_search(fmt: Format, search: bool) -> None:
    """Asked to search, they give the scales that they give otherwise."""
    weight = weights("outliers", (48, 64))
    assert fmt.searches or same(quantize(fmt, weight, not search), quantize(fmt, weight, search))


@every_case
def test_search_leaves_the_weights_alone(fmt: Format, search: bool) -> None:
    x = padded(fmt, weights("normal", (48, 64)))
    before = x.clone()
    whole = whole_of(fmt, x, search)
    amax = fmt.amax(x)
    fmt.search(x, torch.zeros(()) if fmt.scaling == "tensor" else amax, whole)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("fmt", "search"), NEAREST)
def test_decoding_some_rows(fmt: Format, search: bool) -> None:
    """Rows that do not lie side by side decode as they do in the whole tensor."""
    quantized = quantize(fmt, weights("normal", (48, 64)), search)
    multiplier = row_multiplier(fmt, quantized)
    some = fmt.decode(quantized.codes[3::5], multiplier if multiplier.dim() == 0 else multiplier[3::5])
    assert torch.equal(some, decode(fmt, quantized)[3::5])


@pytest.mark.parametrize(("fmt", "search"), NEAREST)
def test_amax_is_the_largest_of_each_group(fmt: Format, search: bool) -> None:
    for shape in shapes_of(fmt):
        x = padded(fmt, weights("outliers", shape))
        amax = spread(fmt, fmt.amax(x), x.shape)
        assert (x.abs() <= amax).all()
        assert set(amax.flatten().tolist()) <= set(x.abs().flatten().tolist())
        x[-1, -1] = torch.nan
        assert fmt.amax(x).isnan().any()


# Searches


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "huge"])
@pytest.mark.parametrize("case", [case for case in FORMAT_CASES if make_format(*case).searches], ids=str)
def test_search_is_never_worse(case: tuple[str, str, int | None], kind: str) -> None:
    """Per group where the scale of ``nearest`` is among the candidates; NVFP4 moves all, so on the whole tensor."""
    fmt = make_format(*case)
    for seed in range(3):
        weight = weights(kind, (64, 96), seed)
        nearest, mse = (squared_errors(fmt, weight, search) for search in (False, True))
        if fmt.scaling == "row":
            nearest, mse = nearest.sum(1), mse.sum(1)
        elif fmt.scaling == "block":
            size = fmt.block_size or 1
            nearest, mse = (e.view(64 // size, size, 96 // size, size).sum((1, 3)) for e in (nearest, mse))
        else:
            nearest, mse = nearest.sum(), mse.sum()
        assert (mse <= nearest * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("case", "nearest", "mse"),
    [(("nvfp4",), 0.0953, 0.0821), (("fp8", "row"), 0.0264, 0.0254)],
    ids=["nvfp4", "fp8-row"],
)
def test_search_gains(case: tuple[str, ...], nearest: float, mse: float) -> None:
    """Relative error on normally distributed weights."""
    weight = weights("normal", (256, 1024))
    for search, expected in ((False, nearest), (True, mse)):
        error = squared_errors(make_format(*case), weight, search).sum() / weight.double().square().sum()
        assert float(error.sqrt()) == pytest.approx(expected, rel=0.006)


def test_nvfp4_search_keeps_blocks_far_below_the_largest_weight() -> None:
    """E4M3 is coarse near its smallest scale: rounding a candidate down must not clip the block."""
    fmt = make_format("nvfp4")
    weight = weights("normal", (64, 64))
    weight[1:] *= torch.logspace(-5, -3, 63)[:, None]
    weight[0, 0] = 1.0
    nearest, mse = (squared_errors(fmt, weight, search).sum(1)[1:] for search in (False, True))
    assert mse.sum() <= nearest.sum()
    quantized = quantize(fmt, weight, search=True)
    largest = (padded(fmt, weight).abs() / spread(fmt, quantized.scales.multiplier, weight.shape)).nan_to_num(0, 0)
    assert largest.max() <= 7.0


# Element grids


@pytest.mark.parametrize("element", [E4M3, E5M2, INT8], ids=lambda e: e.name)
def test_every_value_encodes_to_itself(element: Element) -> None:
    values = element.values
    kept = values.isfinite() & (values.abs() <= element.largest)
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(element.encode_(values[kept].clone()).view(torch.uint8), codes[kept])
    assert torch.equal(element.decode(codes)[kept], values[kept])
    assert element.decode(codes).isnan().sum() == values.isnan().sum()


def test_every_e2m1_value_encodes_to_itself() -> None:
    packed = e2m1_encode_(E2M1.values.clone()[None])
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten()
    assert torch.equal(codes, torch.arange(16, dtype=torch.uint8))


def encode_any(element: Element, x: torch.Tensor) -> torch.Tensor:
    """Decoded codes of ``x``, float64."""
    if element is E2M1:
        packed = e2m1_encode_(x.clone().view(1, -1))
        return E2M1.decode(torch.stack((packed & 15, packed >> 4), -1)).double().flatten()
    return element.decode(element.encode_(x.clone())).double()


@pytest.mark.parametrize("element", [E4M3, E5M2, E2M1, INT8], ids=lambda e: e.name)
def test_rounding_to_nearest_even(element: Element) -> None:
    """All bfloat16 numbers, all midpoints and both neighbours of each, against the sorted grid."""
    grid = grid_of(element)
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    numbers = numbers[numbers.isfinite()]
    infinity = torch.tensor(torch.inf)
    x = torch.cat((numbers, middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)))
    x = x[: len(x) // 16 * 16]
    wide = x.double().clamp(-element.largest, element.largest)
    above = torch.searchsorted(grid, wide).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    # Of two neighbours on a grid one has an even last bit. Zero has; and from there they alternate.
    zero = int((grid == 0).nonzero())
    low_even = (above - 1 - zero) % 2 == 0
    takes_low = (wide - low < high - wide) | ((wide - low == high - wide) & low_even)
    expected = torch.where(takes_low, low, high)
    assert torch.equal(encode_any(element, x), expected)
    assert torch.equal(torch.signbit(encode_any(element, x)), torch.signbit(x)) or element is INT8
    if element is not INT8:
        inside = (x >= 0) & (x <= element.largest)
        assert torch.equal(element.nearest_(x[inside].clone()).double(), expected[inside])


@pytest.mark.parametrize("element", [E4M3, E5M2, E2M1], ids=lambda e: e.name)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_squared_error_is_that_of_the_nearest(element: Element, seed: int) -> None:
    """Just below powers of two, too; and half-precision weights times shortened scales need no rounding."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(256, generator=generator) * 2.0 ** torch.randint(-12, 6, (256,), generator=generator)).half()
    weight[::4] = 2.0 ** torch.randint(-6, 6, (64,), generator=generator)
    scale = torch.rand(256, generator=generator) + 0.5
    scale[::2] = torch.nextafter(torch.ones(128), torch.zeros(128))
    exact = weight.abs().float() * shorten_(scale.clone())
    assert torch.equal(exact.double(), weight.abs().double() * shorten_(scale).double())
    assert not (exact.view(torch.int32) & 1).any()
    for x in (exact, clear_last_bit_(weight.abs().float() * scale)):
        expected = (element.nearest_(x.clone()) - x).square()
        assert torch.equal(element.squared_error(x, torch.empty_like(x), torch.empty_like(x)), expected)


@pytest.mark.parametrize("scaling", ["row", "block"])
def test_weights_that_were_fp8_stay_as_they_are(scaling: str) -> None:
    """A search finds the scale that they came from: its error is 0."""
    fmt = make_format("fp8", scaling, 16 if scaling == "block" else None)
    for seed in range(20):
        quantized = quantize(fmt, weights("normal", (48, 64), seed))
        weight = decode(fmt, quantized)
        again = decode(fmt, quantize(fmt, weight, search=True))
        assert torch.allclose(again, weight, rtol=1e-6, atol=0)


def test_e8m0_exponents_are_exact() -> None:
    """Around every power of two, for amax at 448 * 2**k and at 2**k: the smallest exponent that does not saturate."""
    numbers = torch.tensor([m * 2.0**k for k in range(-126, 119) for m in (1.0, 1.75)], dtype=torch.float64)
    x = numbers.float()
    infinity = torch.tensor(torch.inf)
    x = torch.cat((x, torch.nextafter(x, infinity), torch.nextafter(x, -infinity), torch.tensor([3.4e38, 1e-45, 0.0])))
    for amax, exponent in zip(x.tolist(), e8m0_ceil(x, 448.0).tolist(), strict=True):
        if amax == 0.0:
            assert exponent == 0
            continue
        near = math.frexp(amax)[1] - 12
        needed = next(e for e in range(near, near + 9) if Fraction(amax) <= 448 * Fraction(2) ** e)
        assert exponent == min(max(needed + 127, 1), 254), amax


def test_e8m0_scales() -> None:
    exponents = torch.arange(255, dtype=torch.int32)
    decoded, inverse = e8m0_decode(exponents.to(torch.uint8)), e8m0_inverse(exponents)
    assert decoded[0] == 0 == inverse[0]
    assert decoded[1:].tolist() == [2.0 ** (e - 127) for e in range(1, 255)]
    assert inverse[1:].tolist() == [2.0 ** (127 - e) for e in range(1, 255)]


# Rotation


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rotation_is_the_kronecker_power(group: int) -> None:
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < group:
        matrix = torch.kron(matrix, h4)
    matrix /= group**0.5
    x = weights("outliers", (33, 512))
    rotated = rotate_(x.clone(), group)
    expected = (x.double().view(33, -1, group) @ matrix.T).view(33, 512)
    assert torch.allclose(rotated.double(), expected, rtol=0, atol=float(x.abs().max()) * 1e-6)
    assert torch.allclose(rotate_(rotated.clone(), group), x, rtol=0, atol=float(x.abs().max()) * 1e-6)
    assert torch.equal(rotate_(x[5:9].clone(), group), rotated[5:9])


def test_rotation_groups() -> None:
    assert [rotation_group(n) for n in (3, 6, 4, 32, 768, 3072, 4096)] == [None, None, 4, 16, 256, 1024, 4096]
    assert rotation_group(4096, 256) == 256
    assert rotation_group(4096, 100) == 64


# Reductions and work buffers


@given(width=st.integers(1, 300), stop=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_tree_sum_is_one_tree(width: int, stop: int, seed: int) -> None:
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(seed))

    def reference(row: list[torch.Tensor]) -> torch.Tensor:
        while len(row) > 1:
            half = len(row) // 2
            sums = [a + b for a, b in zip(row[:half], row[half : 2 * half], strict=True)]
            if len(row) % 2:
                sums[0] = sums[0] + row[-1]
            row = sums
        return row[0]

    expected = reference(list(x.unbind(1)))
    assert torch.equal(tree_sum_(x.clone()), expected)
    halved = x.clone()
    steps, rest = halvings(halved, stop)
    for left, right in steps:
        left.add_(right)
    assert rest.shape[1] <= max(stop, 1)
    assert torch.equal(tree_sum_(rest), expected)


def test_tree_sum_does_not_depend_on_threads() -> None:
    x, before = torch.randn(8, 1 << 17), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = tree_sum_(x.clone())
        torch.set_num_threads(4)
        assert torch.equal(tree_sum_(x.clone()), one)
    finally:
        torch.set_num_threads(before)


def test_least_takes_the_first_of_equals() -> None:
    error = torch.tensor([[3.0, 0.0, 5.0], [1.0, 0.0, 4.0], [2.0, 0.0, 4.0]])
    candidates = torch.arange(9.0).view(3, 3)
    assert least(error, candidates).tolist() == [3.0, 1.0, 5.0]


@pytest.mark.parametrize("width", [1, 2, 16, 32, 50, 257])
def test_absmax(width: int) -> None:
    x = torch.randn(5, 3, width)
    assert torch.equal(absmax(x), x.abs().amax(-1))
    x[2, 1, -1] = torch.nan
    x[0, 0, 0] = -torch.inf
    largest = absmax(x)
    assert largest[2, 1].isnan()
    assert largest[0, 0] == torch.inf
    assert largest.isnan().sum() == 1


def test_tiles_cover_everything_once() -> None:
    for rows, size in ((1, 1), (10, 1), (10, 35), (10, 1000), (0, 10)):
        x = torch.zeros(rows, 10)
        parts = [row for part in tiles(x, size) for row in range(part.start, part.stop)]
        assert parts == list(range(rows))


def test_scratch_is_reused() -> None:
    cpu = torch.device("cpu")
    first = scratch("test", (4, 8), torch.float32, cpu)
    second = scratch("test", (8, 4), torch.int32, cpu)
    assert first.data_ptr() == second.data_ptr()
    assert scratch("test other", (4,), torch.float32, cpu).data_ptr() != first.data_ptr()


# Devices


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@every_case
def test_a_gpu_gives_the_same_bytes(fmt: Format, search: bool) -> None:
    for kind in KINDS:
        for shape in (*shapes_of(fmt), (176, 1536)):
            weight = weights(kind, shape)
            on_gpu = quantize(fmt, weight.cuda(), search)
            assert same(on_gpu, quantize(fmt, weight, search)), (kind, shape)
            assert torch.equal(decode(fmt, on_gpu).cpu(), decode(fmt, quantize(fmt, weight, search))), (kind, shape)
