"""Drawings of a plan's graph. Equal chains are drawn once: a picture of 70,000 nodes shows nothing.

SVG is written directly, since graphviz needs a program that pip cannot install; ``.dot`` is for those who have it.
"""

from __future__ import annotations

from collections import defaultdict
from html import escape
from pathlib import Path

from ..formats.errors import SinkError, UsageError
from ..stages.work import Environment, LayerPlan
from .graph import stage_graph
from .plan import Plan
from .sizes import show_size

_BOX, _GAP, _ROW, _LEFT = 84, 26, 56, 300
_FILL = {"read": "#dbeafe", "decode": "#dbeafe", "copy": "#dbeafe", "write": "#dcfce7"}


def draw(plan: Plan, path: Path) -> Path:
    """Writes ``.svg`` (chains with counts) or ``.dot`` (every node); UsageError for another ending."""
    makers = {".svg": _svg, ".dot": _dot}
    if path.suffix not in makers:
        raise UsageError(f"{path}: a drawing ends in .svg (chains with counts) or .dot (every node, for graphviz)")
    try:
        path.write_text(makers[path.suffix](plan))
    except OSError as error:
        raise SinkError(f"{path}: cannot write: {error.strerror}") from error
    return path


def _chains(plan: Plan) -> dict[tuple[tuple[str, ...], str, int], list[LayerPlan]]:
    """Layers by steps, format and number of row ranges."""
    chains: dict[tuple[tuple[str, ...], str, int], list[LayerPlan]] = defaultdict(list)
    for layer in plan.layers:
        chains[tuple(step.name for step in layer.steps), layer.format, len(layer.parts)].append(layer)
    return chains


def _svg(plan: Plan) -> str:
    rows, width = [], 0
    for index, ((steps, form, parts), layers) in enumerate(_chains(plan).items()):
        y = 20 + index * _ROW
        size = show_size(sum(layer.layer.nbytes for layer in layers))
        what = form or "kept"
        split = f", each in {parts} row ranges" if parts else ""
        rows.append(f'<text x="12" y="{y + 16}" font-weight="bold">{len(layers)} x {escape(what)}</text>')
        rows.append(f'<text x="12" y="{y + 34}" fill="#555">{escape(size + split)}</text>')
        for position, name in enumerate((*steps, "receipt")):
            x = _LEFT + position * (_BOX + _GAP)
            width = max(width, x + _BOX + 12)
            fill = _FILL.get(name, "#fef3c7")
            rows.append(f'<rect x="{x}" y="{y}" width="{_BOX}" height="36" rx="6" fill="{fill}" stroke="#334155"/>')
            rows.append(f'<text x="{x + _BOX / 2}" y="{y + 23}" text-anchor="middle">{escape(name)}</text>')
            if position:
                rows.append(f'<path d="M{x - _GAP} {y + 18}H{x - 5}" stroke="#334155" marker-end="url(#arrow)"/>')
    height = 20 + len(_chains(plan)) * _ROW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">'
        '<defs><marker id="arrow" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L6 3L0 6z" fill="#334155"/></marker></defs>'
    )
    return head + "".join(rows) + "</svg>\n"


def _dot(plan: Plan) -> str:
    graph = stage_graph(plan.layers, Environment())
    names = {key: f"{key[0]}\\n{' '.join(key[1:])}".replace('"', "'") for key in graph}
    lines = [f'  "{name}";' for name in names.values()]
    for key, node in graph.items():
        lines += [f'  "{names[above]}" -> "{names[key]}";' for above in sorted(node.dependencies) if above in names]
    return "digraph quantloom {\n  rankdir=LR; node [shape=box];\n" + "\n".join(lines) + "\n}\n"
