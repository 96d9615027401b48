"""Which outputs of a network count, and how much each counts beside the others.

A network may return several tensors: two heads, logits and boxes, a pyramid of features. Scores and
output variances are those of all of them together, as if they were one vector: each output is
divided by the root of its own second moment, so that none is forgotten for its scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.running import by_image, evaluating, first_output, named_outputs, on_device
from tpvprune.processes.shares import by_first, summed, total

Chosen = Sequence[str] | Mapping[str, float]
"""Names of the outputs that count, or how much each counts beside the others."""


def is_of_images(output: Tensor, num: int) -> bool:
    """Tell whether an output holds real numbers, one entry for each image."""
    return output.is_floating_point() and output.ndim > 1 and len(output) == num


@dataclass(frozen=True)
class Outputs:
    """The outputs that count.

    Attributes:
        scales: Name -> what it is multiplied by; a single output by 1.
        left_out: Name of another tensor that the model returns -> why it does not count.
    """

    scales: Mapping[str, float]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def measured(
        cls,
        model: nn.Module,
        inputs: Iterable[Tensor],
        chosen: Outputs | Chosen | None = None,
        *,
        first: Tensor | None = None,
    ) -> Outputs:
        """Find the outputs of real numbers that have one entry for each image; ValueError if none.

        Of a model with several all inputs are run, to see how large each is. ``chosen``: those
        that count; None: all, alike. What was measured before is returned. ``first``: the first of
        the inputs, where it is at hand: of a model with one output no other is read.
        """
        if isinstance(chosen, Outputs):
            return chosen
        with evaluating(model), torch.no_grad():
            found, left_out = by_first(_of_each_image, model, inputs if first is None else [first])
            wanted = dict.fromkeys(found, 1.0) if chosen is None else _weights(chosen, found)
            if len(wanted) == 1:
                return cls(dict.fromkeys(wanted, 1.0), left_out)
            returned = (dict(named_outputs(model(on_device(x, model)))) for x in inputs)
            return cls(_scales(wanted, returned), left_out)

    @classmethod
    def of_sizes(
        cls, returned: Sequence[Mapping[str, Tensor]], chosen: Outputs | Chosen | None = None
    ) -> Outputs:
        """Return the same from what a network returned for each batch, name -> [B, ...]."""
        if isinstance(chosen, Outputs):
            return chosen
        names = list(returned[0]) if returned else []
        wanted = dict.fromkeys(names, 1.0) if chosen is None else _weights(chosen, names)
        return cls(dict.fromkeys(wanted, 1.0) if len(wanted) <= 1 else _scales(wanted, returned))

    @classmethod
    def among(cls, returned: Any, num: int) -> Outputs:
        """Return those of one call on so many images, unscaled; if there is none, the first."""
        found = [name for name, t in named_outputs(returned) if is_of_images(t, num)]
        return cls(dict.fromkeys(found or ["output"], 1.0))

    @property
    def first(self) -> Outputs:
        """The first of them alone."""
        return Outputs(dict.fromkeys(list(self.scales)[:1], 1.0))

    def of(self, returned: Any) -> dict[str, Tensor]:
        """Return what counts of what the model returned, unscaled; ValueError if it is not there.

        If only one does, a model may call it something else: then it is its first.
        """
        found = dict(named_outputs(returned))
        if len(self.scales) == 1 and not self.scales.keys() & found.keys():
            return dict.fromkeys(self.scales, first_output(returned))
        for name in self.scales:
            if name not in found:
                raise ValueError(
                    f"expected a model that returns {name!r} for every input, found "
                    f"{', '.join(map(repr, found)) or 'nothing'}: leave it out (outputs=)"
                )
        return {name: found[name] for name in self.scales}

    def said(self) -> list[str]:
        """Return what is to be said of outputs that do not count, and of how several do."""
        lines = [
            f"output {name!r} {reason}: it is neither scored nor measured"
            for name, reason in self.left_out.items()
        ]
        if len(self.scales) > 1:
            names = ", ".join(map(repr, self.scales))
            lines.append(
                f"the model returns {len(self.scales)} outputs that count, {names}: scores and "
                "output variance are those of all, each in units of its own second moment; "
                "agreement is that of the first"
            )
        return lines

    def joined(self, returned: Any, num: int) -> Tensor:
        """Return what counts as one row for each image, scaled: [num, K]."""
        rows = [by_image(output, num) for output in self.of(returned).values()]
        if len(rows) == 1:
            return rows[0]
        return torch.cat(
            [r * scale for r, scale in zip(rows, self.scales.values(), strict=True)], 1
        )


def logits_of(returned: Any, outputs: Outputs | Chosen | None = None) -> Tensor:
    """Return the first output that counts (None: of real numbers), for what asks for classes."""
    if outputs is None:
        return first_output(returned)
    if isinstance(outputs, Outputs):
        return next(iter(outputs.first.of(returned).values()))
    found = dict(named_outputs(returned))
    return found[next(iter(_weights(outputs, list(found))))]


def _of_each_image(model: nn.Module, inputs: Iterable[Tensor]) -> tuple[list[str], dict[str, str]]:
    """Return the names of outputs with an entry for each image, and why others have none."""
    first = on_device(next(iter(inputs))[:1], model)
    # Of one image any first dimension could be that of the images.
    once, twice = model(first), model(torch.cat([first, first]))
    sizes = {name: t.shape for name, t in named_outputs(twice)}
    found, left_out = [], {}
    for name, output in named_outputs(once):
        shape = list(output.shape)
        if not output.is_floating_point():
            left_out[name] = f"holds no real numbers but {output.dtype}".replace("torch.", "")
        elif not is_of_images(output, 1) or sizes.get(name) != (2, *output.shape[1:]):
            left_out[name] = f"has no entry per image along dimension 0: {shape} for one image"
        else:
            found.append(name)
    if not found:
        by_image(first_output(twice), 2)  # which says what is wrong
    return found, left_out


def _scales(
    wanted: Mapping[str, float], returned: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Return the scales of outputs, name -> [B, ...] for each batch of this process."""
    squares, num = dict.fromkeys(wanted, 0.0), 0
    for each in returned:
        for name in squares:
            squares[name] += float(each[name].double().square().sum())
        num += len(each[next(iter(wanted))])
    sums = summed(torch.tensor(list(squares.values()), dtype=torch.float64))[0] / total(num)
    return {
        name: (weight / float(size)) ** 0.5 if float(size) else 0.0
        for (name, weight), size in zip(wanted.items(), sums, strict=True)
    }


def _weights(chosen: Chosen, found: Sequence[str]) -> dict[str, float]:
    weights = dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(chosen, 1.0)
    unknown = [name for name in weights if name not in found]
    if unknown or not weights:
        raise ValueError(
            f"outputs: expected some of {', '.join(found)}, found {', '.join(unknown) or 'none'}"
        )
    if any(not 0 < weight < float("inf") for weight in weights.values()):
        raise ValueError(f"outputs: expected weights above 0, found {weights}")
    return {name: float(weights[name]) for name in found if name in weights}
