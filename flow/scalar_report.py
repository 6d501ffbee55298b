"""How far scalars take hybrid layers off whose groups have scales of their own: in words, for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..stages.scalar import AddScalar
from ..stages.work import LayerPlan, Receipt, root_share
from .sizes import count

_NAMED = 5


def scalar_errors(layers: Sequence[LayerPlan], receipts: Sequence[Receipt]) -> dict[str, float]:
    """||W_scalar - W|| / ||W|| of each layer that was given a scalar, the largest first."""
    given = {plan.layer.name for plan in layers if isinstance(plan.steps[0], AddScalar)}
    errors = {
        receipt.name: root_share(receipt.squared_error, receipt.squared_weight)
        for receipt in receipts if receipt.name in given
    }  # fmt: skip
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def scalar_warnings(errors: Mapping[str, float], receipts: Sequence[Receipt]) -> tuple[str, ...]:
    """What to tell the user; nothing where both decodes agree."""
    wrong = {name: error for name, error in errors.items() if error}
    if not wrong:
        return ()
    own = [receipt for receipt in receipts if receipt.name in errors]
    total = root_share(sum(each.squared_error for each in own), sum(each.squared_weight for each in own))
    worst = ", ".join(f"{name} {error:.3g}" for name, error in list(wrong.items())[:_NAMED])
    return (
        f"decoded by .weight_scalar, the weights of {count(len(wrong), 'layer')} are wrong: relative error {total:.3g} "
        f"over the model (by groups: as in the MXFP8 model). The worst: {worst}",
    )
