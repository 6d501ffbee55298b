"""Rules that hold for the whole package: which way imports point, who prints, how long things may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("formats", "stages", "flow")
"""Each may import itself and those before it."""
MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).glob("*.py"))]
NAMES = [f"{path.parent.name}/{path.name}" for path in MODULES]
PRINTERS = {"console.py", "compat.py"}
MOST_LINES = 260
MOST_PARAMETERS = 7
KNOWN_THIRD_PARTIES = {
    "formats": {"torch", "numpy", "xxhash"},
    "stages": {"torch", "numpy", "triton", "xxhash", "yaml", "zarr", "prodigyplus"},
    "flow": {"torch", "dask", "distributed", "dask_cuda", "psutil", "click", "rich", "filelock", "transformers",
             "diffusers"},
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of every import, those within functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                yield from ((node.level, alias.name) for alias in node.names)
            else:
                yield node.level, node.module


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_point_one_way(path: Path) -> None:
    layer = path.parent.name
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for level, module in imports(path):
        assert level <= 2, f"{path.name} climbs out of the package: {module}"
        assert not module.startswith("quantloom"), f"{path.name} imports the package by name: {module}"
        if level == 2 and module != "__version__":
            assert module.partition(".")[0] in allowed, f"{layer}/{path.name} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_third_parties_stay_where_they_belong(path: Path) -> None:
    import sys

    own = KNOWN_THIRD_PARTIES[path.parent.name]
    foreign = {
        module.partition(".")[0] for level, module in imports(path) if level == 0
    } - set(sys.stdlib_module_names) - {"__future__"}  # fmt: skip
    assert foreign <= own


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_modules_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "no docstring"


def is_kernel(node: ast.AST) -> bool:
    """Whether it is a function for a GPU, which takes pointers, strides and constants one by one."""
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(each) == "triton.jit" for each in node.decorator_list)


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_functions_take_few_parameters(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_kernel(node):
            continue
        given = node.args
        names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        names = [name for name in names if name not in ("self", "cls")]
        where = f"{path.name}:{node.lineno}"
        assert len(names) <= MOST_PARAMETERS, f"{where} takes {len(names)}: {', '.join(names)}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name not in PRINTERS],
                         ids=[name for name in NAMES if name.rpartition("/")[2] not in PRINTERS])  # fmt: skip
def test_nobody_prints_but_the_console(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            assert node.attr not in ("stdout", "stderr"), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_no_error_is_swallowed_whole(path: Path) -> None:
    """Bare ``except:`` nowhere; ``except Exception`` only where a clean-up must not hide the first error, or
    where the error is handed over."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}"
            caught = node.type.id if isinstance(node.type, ast.Name) else ""
            if caught in ("Exception", "BaseException"):
                again = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                handed_over = any(
                    (isinstance(inner, ast.Attribute) and inner.attr == "put")
                    or (isinstance(inner, ast.Name) and inner.id == "Failure") for inner in ast.walk(node)
                )  # fmt: skip
                assert again or handed_over, f"{path.name}:{node.lineno} catches {caught} and goes on"


def test_the_public_names() -> None:
    import quantloom

    assert set(quantloom.__all__) == {"Flow", "Pipeline", "QuantloomError", "Recipe", "__version__", "calibrate"}
    assert all(hasattr(quantloom, name) for name in quantloom.__all__)


def test_the_root_holds_one_module() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]
