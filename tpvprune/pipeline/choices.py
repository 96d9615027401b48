"""What :func:`tpvprune.prune` is told beside a model and inputs: one record, passed on whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, cast, get_args

from torch import nn

from tpvprune.groups.budget import LatencyTable, check_budget
from tpvprune.passes.clock import Progress
from tpvprune.passes.detection import Forward
from tpvprune.passes.drawing import NUM_IMAGES
from tpvprune.passes.outputs import Chosen
from tpvprune.runtimes.names import Runtime, check_runtime
from tpvprune.scores.criteria import Scorer
from tpvprune.scores.taps import Probing
from tpvprune.widths.limits import Limits
from tpvprune.widths.ranking import Allocation, Ranking

Repair = Literal["none", "bn", "compensate", "reconstruct", "auto"]
Of = Literal["macs", "params", "latency"]
Granularity = Literal["channel", "branch"]
P = ParamSpec("P")
R = TypeVar("R")
_Takes = Callable[[nn.Module, Iterable[Any], "Choices"], R]
_Told = Callable[Concatenate[nn.Module, Iterable[Any], P], R]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The keyword arguments of :func:`tpvprune.prune`, which says what each means, checked.

    Raises:
        ValueError: If one is out of range, or some do not go together.
    """

    keep: float = 0.5
    of: Of = "macs"
    criterion: str | Scorer = "tpv"
    repair: Repair = "compensate"
    allocation: Allocation | None = None
    limits: Limits | None = None
    granularity: str | Sequence[Granularity] | None = None
    max_depth_removed: float = 1.0
    ranking: Ranking | None = None
    planned_repair: Repair | None = None
    repair_factors: bool | None = None
    mirrored: bool = False
    reconstructions: int = 1
    steps: int = 1
    num_images: int | None = NUM_IMAGES
    latency_batch_size: int = 1
    latency_runtime: Runtime | LatencyTable = "eager"
    latency_threads: int | None = None
    probing: Probing | None = None
    outputs: Chosen | None = None
    forward: Forward | None = None
    state: str | Path | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_budget(self.keep, "macs" if self.of == "latency" else self.of)
        self._check_latency()
        for repair in (self.repair, self.planned_repair):
            if repair not in {None, *get_args(Repair)}:
                repairs = ", ".join(get_args(Repair))
                raise ValueError(f"repair: expected one of {repairs}, found {repair!r}.")
        if self.mirrored and self.repair in {"none", "bn"}:
            raise ValueError(
                "mirrored: expected only with a repair that fits weights, found repair "
                f"{self.repair!r}: leave it out, or pass repair 'compensate'"
            )
        if self.reconstructions < 1 or (self.reconstructions > 1 and self.repair != "reconstruct"):
            raise ValueError(
                "reconstructions: expected at least 1, and more only with repair 'reconstruct', "
                f"found {self.reconstructions} and repair {self.repair!r}"
            )
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, found {self.steps}.")
        leaves, known = self.leaves, get_args(Granularity)
        if not leaves or set(leaves) - set(known):
            raise ValueError(f"granularity: expected some of {known}, found {self.granularity!r}.")
        if not 0 <= self.max_depth_removed <= 1:
            raise ValueError(
                f"max_depth_removed: expected a fraction in [0, 1], found {self.max_depth_removed}."
            )
        if self.max_depth_removed < 1 and "branch" not in leaves:
            raise ValueError(
                "max_depth_removed: expected only where branches may go, found "
                f"{self.max_depth_removed} and {self.named_leaves} alone: leave it out, or pass "
                "granularity channel,branch"
            )
        if "channel" not in leaves and self.criterion != "tpv":
            raise ValueError(
                "criterion: expected 'tpv' where only branches may go, which are ranked by it, "
                f"found {self.criterion!r}"
            )

    @property
    def leaves(self) -> Sequence[Granularity]:
        """What may leave."""
        return leaving(self.granularity, self.of)

    @property
    def views(self) -> dict[str, int]:
        """What repairs are told of mirror images; without them they go by their own defaults."""
        return {"num_views": 2} if self.mirrored else {}

    @property
    def named_leaves(self) -> str:
        """What may leave, as ``--granularity`` names it."""
        return ",".join(name for name in get_args(Granularity) if name in self.leaves)

    def _check_latency(self) -> None:
        size, threads, runtime = self.latency_batch_size, self.latency_threads, self.latency_runtime
        if size < 1 or (threads is not None and threads < 1):
            raise ValueError(
                "latency_batch_size and latency_threads: expected at least 1, found "
                f"{size} and {threads}"
            )
        if self.of != "latency" and (runtime != "eager" or threads is not None):
            raise ValueError(
                "latency_runtime and latency_threads: expected only with a budget of latency, "
                f"found one of {self.of}: leave them out"
            )
        if not isinstance(runtime, LatencyTable):
            check_runtime(runtime)
        elif size not in {1, runtime.batch_size}:
            raise ValueError(
                f"latency_batch_size: expected {runtime.batch_size}, that of the table, found "
                f"{size}: leave it out, or write another table"
            )


def leaving(granularity: str | Sequence[Granularity] | None, of: Of) -> Sequence[Granularity]:
    """Return what may leave; if nothing was asked for, channels, and branches for milliseconds."""
    if isinstance(granularity, str):
        return cast(Sequence[Granularity], granularity.split(","))
    if granularity is not None:
        return granularity
    # Narrower layers do not spare calls.
    return ("channel", "branch") if of == "latency" else ("channel",)


def told_by(choices: Callable[P, Choices]) -> Callable[[_Takes[R]], _Told[P, R]]:
    """Let a function of a model, inputs and a record take the fields of it as arguments."""

    def decorate(function: _Takes[R]) -> _Told[P, R]:
        own, fields = inspect.signature(function), inspect.signature(choices)

        @wraps(function)
        def called(model: nn.Module, batches: Iterable[Any], **told: Any) -> R:
            for name in told.keys() - fields.parameters.keys():
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}"
                )
            return function(model, batches, cast(Any, choices)(**told))

        parameters = [*list(own.parameters.values())[:2], *fields.parameters.values()]
        cast(Any, called).__signature__ = own.replace(parameters=parameters)
        return cast(Any, called)

    return decorate
