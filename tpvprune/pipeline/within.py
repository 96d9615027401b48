"""The smallest model that loses no more than so many points: several sizes of one ranking."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from tpvprune.passes.clock import Clock
from tpvprune.passes.drawing import NUM_IMAGES, hold_back, num_set_aside
from tpvprune.passes.loss import CONFIDENCE, Loss, Losses, halves, num_measured
from tpvprune.pipeline.pruning import PruningResult, Sizes
from tpvprune.processes.membership import num_processes
from tpvprune.widths.ranking import Ranking

NUM_SIZES = 5  # to a 32nd of the cost; one repair each
_OLD_RANKING = (
    "the ranking was given: images that decide or judge here may have taken part in it, unless it "
    "was made under a limit of loss, of the same images and seed"
)
PruneTo = Callable[[float], PruningResult]


def prune_within(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_loss: float,
    labelled: Iterable[tuple[Tensor, Tensor]] | None = None,
    num_sizes: int = NUM_SIZES,
    num_images: int | None = NUM_IMAGES,
    images_to_measure: int | None = None,
    ranking: Ranking | None = None,
    seed: int = 0,
    notice: Callable[[str], None] | None = None,
    **options: Any,
) -> PruningResult:
    """Prune a model as far as it loses no more than so many points, by bisection over its size.

    Channels are ranked once, and each size that is tried costs a repair. Images that neither scores
    nor repairs see are set aside: half of them decide which size it is, the other half take no part
    in anything, and judge what came out.

    The smallest size that was tried is returned whose loss on the images that decide is estimated
    at ``max_loss`` at most. As it is the estimate that decides, the loss on further images is a
    little more as often as a little less: ``report["quality"]`` has both losses with their
    intervals, and ``warnings`` says where the images are too few to tell.

    Args:
        model: See :func:`tpvprune.prune`.
        batches: Re-iterable of unlabeled input tensors [B, ...]; labels are dropped unread.
        max_loss: In points above 0 and below 100: images of a hundred on which the pruned model
            may choose another class than the dense one.
        labelled: Pairs of inputs and class indices [B]. With these, every other of which decides,
            the loss is in points of top-1. Nothing else sees them.
        num_sizes: So many sizes are tried at most; each halves the range of sizes left, from all.
        num_images: As in :func:`tpvprune.prune`.
        images_to_measure: So many are set aside if ``batches`` has them beside ``num_images``, else
            a quarter of all; None: as many as make the intervals no wider than ``max_loss``, at
            most 10,000. Where ``labelled`` is given none are.
        ranking: As in :func:`tpvprune.prune`; one that was made of other images than those set
            aside, or these have taken part in it.
        seed: Of everything random.
        notice: Told in a line what each size loses.
        **options: Others of :func:`tpvprune.prune`, but ``keep``.

    Returns:
        The result. ``reached`` tells whether the limit was kept; if no size did, it is the largest
        that was tried. The sizes, what was promised and what was measured are in
        ``report["quality"]``, in points.

    Raises:
        ValueError: If an argument is out of range, the images are too few to set some aside, or the
            model chooses no classes.
    """
    check_max_loss(max_loss, num_sizes)
    outputs = options.get("outputs")
    source: Iterable[Any] | None = labelled
    if labelled is None:
        wanted = num_measured(max_loss) if images_to_measure is None else images_to_measure
        aside = partial(num_aside, num_images=num_images, wanted=wanted)
        drawn = None if num_images is None else num_images + wanted
        batches, source = hold_back(batches, num_images=drawn, seed=seed, held=aside)
        num_images = None
    measured = [
        Losses(model, half, labelled=labelled is not None, outputs=outputs)
        for half in halves(source or ())
    ]

    measured[0].prepare()  # a model without classes is refused before any work
    given = {**options, "ranking": ranking, "num_images": num_images, "seed": seed}
    return smallest_within(
        Sizes(model, batches, **given).prune, *measured, max_loss=max_loss, num_sizes=num_sizes,
        is_given=ranking is not None, notice=notice,
    )  # fmt: skip


def check_max_loss(max_loss: float, num_sizes: int = NUM_SIZES) -> None:
    """Check the limit."""
    if not 0 < max_loss < 100:
        raise ValueError(f"max_loss: expected points above 0 and below 100, found {max_loss}")
    if num_sizes < 1:
        raise ValueError(f"num_sizes: expected at least 1, found {num_sizes}")


def num_aside(num: int, *, num_images: int | None, wanted: int, source: str = "batches") -> int:
    """Return how many of so many images are set aside; see :func:`num_set_aside`.

    ValueError if that leaves none to decide, to judge, or to fit to.
    """
    found = num_set_aside(num, num_images=num_images, wanted=wanted)
    if not 2 * num_processes() <= found <= num - 2 * num_processes():
        raise ValueError(
            f"{source}: expected at least {8 * num_processes()} images, some of which are set "
            f"aside to measure a loss, found {num}: a few thousand work well"
        )
    return found


@dataclass(frozen=True)
class Size:
    """A size that was tried."""

    keep: float  # fraction of the dense cost that was asked for
    share: float  # fraction that is left; above ``keep`` where there is nothing smaller
    macs: int
    params: int
    loss: Loss  # on the images that decide


def bisect(tried: Callable[[float], tuple[float, float]], max_loss: float, num_sizes: int) -> None:
    """Try sizes, smaller ones after one that keeps the limit and larger ones after one that fails.

    ``tried``: fraction to keep -> (fraction that is left, points that are lost). ``num_sizes``: so
    many at most; fewer where the smallest possible one keeps it.
    """
    low, high = 0.0, 1.0
    for _ in range(num_sizes):
        keep = (low + high) / 2
        share, points = tried(keep)
        if points > max_loss:
            low = max(keep, share)
        elif share > keep:
            return
        else:
            high = keep
        if low >= high:
            return


def smallest_within(
    prune_to: PruneTo,
    deciding: Losses,
    judging: Losses,
    *,
    max_loss: float,
    num_sizes: int = NUM_SIZES,
    is_given: bool = False,
    notice: Callable[[str], None] | None = None,
) -> PruningResult:
    """Find the smallest size that keeps a limit; see :func:`prune_within`.

    ``prune_to``: prunes to a fraction of the cost. ``is_given``: channels were ranked before.
    """
    sizes: list[Size] = []
    best: PruningResult | None = None
    chosen: Size | None = None

    def tried(keep: float) -> tuple[float, float]:
        nonlocal best, chosen
        result = prune_to(keep)
        report, loss = result.report, deciding.of(result.model)
        dense, pruned, of = report["dense"], report["pruned"], report["of"]
        share = report["speed"]["ratio"] if "speed" in report else pruned[of] / dense[of]
        size = Size(report["keep"], float(share), pruned["macs"], pruned["params"], loss)
        sizes.append(size)
        if notice is not None:
            notice(f"size {len(sizes)} of at most {num_sizes}: keep {keep:g} loses {size.loss}")
        # Sizes only fall once one has kept the limit, and only grow until then.
        if size.loss.points <= max_loss or chosen is None or chosen.loss.points > max_loss:
            best, chosen = result, size
        return size.share, size.loss.points

    clock = Clock(None)
    with clock("all sizes"):
        bisect(tried, max_loss, num_sizes)
    assert best is not None and chosen is not None
    measured, report = judging.of(best.model), best.report
    quality = {
        "max_loss": max_loss,
        "of": "top-1" if deciding.labelled else "agreement",
        "confidence": CONFIDENCE,
        "met": chosen.loss.points <= max_loss,
        "promised": asdict(chosen.loss),
        "measured": asdict(measured),
        "sizes": [asdict(size) for size in sizes],
    }
    more = _warnings(chosen, measured, max_loss, report["repair"])
    said = {
        "reached": quality["met"],
        "quality": quality,
        "warnings": [*report["warnings"], *more, *([_OLD_RANKING] if is_given else [])],
        "timings": {**report["timings"], **clock.seconds},
    }
    return replace(best, report={**report, **said})


def _warnings(chosen: Size, measured: Loss, max_loss: float, repair: str) -> list[str]:
    """Return what the user must know of the loss, a line each."""
    lines, promised = [], chosen.loss
    better = "distillation" if repair == "reconstruct" else "repair reconstruct"
    if promised.points > max_loss:
        lines.append(
            f"even keep {chosen.keep:g}, the largest size tried, loses {promised.points:.2f} "
            f"points, more than {max_loss:g}: try {better}, more images, or a larger limit"
        )
    elif measured.low > max_loss:
        lines.append(
            f"on images that took no part {measured} are lost, more than {max_loss:g}: try a "
            "smaller limit, or more images to decide by"
        )
    if promised.width > max_loss:
        lines.append(
            f"{promised.num_images} images decide, which leaves an interval of "
            f"{promised.width:.2f} points, more than the {max_loss:g} that may be lost: about "
            f"{promised.needed(max_loss)} would be needed, and as many to judge"
        )
    return lines
