"""Where the sizes in a forward pass come from, and what they must become after a removal.

Models write sizes down: ``x.view(B, N, self.num_heads, -1)``, ``x.split(self.width, 1)``.
While a model is tracked, its integer attributes and the sizes of labelled dimensions are
:class:`TracedInt`: integers that remember the expression they were computed by. Each time one of
them sizes a dimension whose channels may go, that is a :class:`SizeRule`; :func:`solve` finds the
attribute values under which every rule holds for the channels that stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tpvprune.groups.axes import Axis


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module (``position``: of an entry of a tuple or list)."""

    module: str
    name: str
    position: int | None = None


@dataclass(frozen=True)
class AxisSize:
    """The size of a labelled dimension: first its number in the tracker, later its axis."""

    number: int
    axis: Axis | None = None


@dataclass(frozen=True)
class Operation:
    """``left op right`` on integers."""

    op: str
    left: Expression
    right: Expression


Expression = Attribute | AxisSize | Operation | int

_OPERATIONS = ("add", "sub", "mul", "floordiv", "mod")


class TracedInt(int):
    """An integer that remembers how it was computed.

    ``compared`` is called with its expression and that of a traced integer it is found equal to.
    """

    expression: Expression
    compared: Callable[[Expression, Expression], None] | None

    def __new__(
        cls,
        value: int,
        expression: Expression,
        compared: Callable[[Expression, Expression], None] | None = None,
    ) -> TracedInt:
        """Make the integer ``value``, computed by ``expression``."""
        self = super().__new__(cls, value)
        self.expression, self.compared = expression, compared
        return self

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other) if isinstance(other, int) else other == int(self)
        if same is True and isinstance(other, TracedInt):
            for one, two in ((self, other), (other, self)):
                if one.compared is not None:
                    one.compared(one.expression, two.expression)
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def _traced(op: str, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    plain = getattr(int, f"__{'r' if reflected else ''}{op}__")

    def method(self: TracedInt, other: Any) -> Any:
        value = plain(self, other)
        if value is NotImplemented or not isinstance(other, int):
            return value
        if op == "mul" and other == 1:
            return self
        pair = (expression_of(self), expression_of(other))
        return TracedInt(value, Operation(op, *(reversed(pair) if reflected else pair)))

    return method


for _op in _OPERATIONS:
    setattr(TracedInt, f"__{_op}__", _traced(_op, reflected=False))
    setattr(TracedInt, f"__r{_op}__", _traced(_op, reflected=True))


def expression_of(value: int) -> Expression:
    """Return how an integer was computed; a plain integer is its own expression."""
    return value.expression if isinstance(value, TracedInt) else int(value)


def attributes(expression: Expression) -> Iterator[Attribute]:
    """Yield the attributes of an expression."""
    if isinstance(expression, Operation):
        yield from attributes(expression.left)
        yield from attributes(expression.right)
    elif isinstance(expression, Attribute):
        yield expression


def substitute(expression: Expression, axis_of: Callable[[AxisSize], AxisSize]) -> Expression:
    """Return the expression with every axis size replaced."""
    if isinstance(expression, Operation):
        left, right = substitute(expression.left, axis_of), substitute(expression.right, axis_of)
        return replace(expression, left=left, right=right)
    return axis_of(expression) if isinstance(expression, AxisSize) else expression


# Sizes that torch's own layers hand to a function, and that no shape of a parameter tells.
_USED_BY_TORCH = frozenset({"normalized_shape", "num_groups"})


def trace_attributes(model: nn.Module) -> None:
    """Make the integer attributes of a private copy traceable, but for torch's own layers."""
    for path, module in model.named_modules():
        torchs = type(module).__module__.startswith("torch.")
        for name, value in list(vars(module).items()):
            if name.startswith("_") or (torchs and name not in _USED_BY_TORCH):
                continue
            if _is_size(value):
                vars(module)[name] = TracedInt(value, Attribute(path, name))
            elif type(value) in {list, tuple} and any(_is_size(v) for v in value):
                vars(module)[name] = type(value)(
                    TracedInt(v, Attribute(path, name, i)) if _is_size(v) else v
                    for i, v in enumerate(value)
                )


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 1


@dataclass(frozen=True)
class SizeRule:
    """After a removal, ``expression`` must be the number of positions of ``axis`` that stay."""

    expression: Expression
    axis: Axis


def solve(
    rules: Iterable[SizeRule], kept: Mapping[str, Tensor], model: nn.Module
) -> dict[Attribute, int]:
    """Return the attributes that a removal changes, and their values; ValueError if none fit."""
    values: dict[Attribute, int] = {}
    open_rules: list[tuple[SizeRule, int]] = []
    for rule in rules:
        target = int(rule.axis.kept(kept).sum())
        if isinstance(rule.expression, Attribute):
            if values.setdefault(rule.expression, target) != target:
                raise ValueError(
                    f"{rule.expression.module}.{rule.expression.name} would have to be "
                    f"{values[rule.expression]} and {target} at once."
                )
        else:
            open_rules.append((rule, target))

    def evaluate(expression: Expression) -> int:
        if isinstance(expression, Attribute):
            return values.get(expression, get_attribute(model, expression))
        if isinstance(expression, AxisSize):
            assert expression.axis is not None
            return int(expression.axis.kept(kept).sum())
        if isinstance(expression, Operation):
            left, right = evaluate(expression.left), evaluate(expression.right)
            return int(getattr(operator, expression.op)(left, right))
        return expression

    for rule, target in open_rules:
        free = {
            leaf: get_attribute(model, leaf)
            for leaf in attributes(rule.expression)
            if leaf not in values
        }
        if evaluate(rule.expression) == target:
            values.update(free)
        elif not _adjust(rule, target, free, values, evaluate):
            raise ValueError(
                f"no attribute makes {evaluate(rule.expression)} channels {target} "
                f"in {rule.expression}."
            )
    return {a: v for a, v in values.items() if v != get_attribute(model, a)}


def _adjust(
    rule: SizeRule,
    target: int,
    free: Mapping[Attribute, int],
    values: dict[Attribute, int],
    evaluate: Callable[[Expression], int],
) -> bool:
    for leaf, dense in free.items():
        size = rule.axis.size
        for candidate in (dense * target // size, dense - size + target, target):
            values[leaf] = candidate
            if candidate > 0 and evaluate(rule.expression) == target:
                return True
            del values[leaf]
    return False


def get_attribute(model: nn.Module, attribute: Attribute) -> int:
    """Return the value of an attribute (or of one entry of it)."""
    value = getattr(model.get_submodule(attribute.module), attribute.name)
    return int(value if attribute.position is None else value[attribute.position])


def set_attribute(model: nn.Module, attribute: Attribute, value: int) -> None:
    """Set an attribute (or one entry of it) in place."""
    module = model.get_submodule(attribute.module)
    new: Any = value
    if attribute.position is not None:
        old = getattr(module, attribute.name)
        entries = [value if i == attribute.position else v for i, v in enumerate(old)]
        new = type(old)(entries)
    setattr(module, attribute.name, new)
