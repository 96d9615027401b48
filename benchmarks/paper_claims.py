"""The claims of five papers as figures of trained networks, with intervals and verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from paper_models import CHAIN_CURVES
from paper_statistics import (
    CORRELATION,
    Bound,
    Row,
    Statistic,
    bootstrap,
    column,
    configuration,
    correlation,
    distinct,
    exponent,
    network,
    quantile,
    rank,
    verdict,
)

from tpvprune.diagnostics.normalized_loss import Line, fit_line

LIAO = "[Liao et al. 2018](https://arxiv.org/abs/1807.09659)"
FRAGILE = "[Zhang and Louis 2025](https://arxiv.org/abs/2510.18934)"
LOUKAS = "[Loukas et al. 2021](https://arxiv.org/abs/2106.04186)"
VOLUME = "[Zhang et al. 2021](https://arxiv.org/abs/2103.06219)"
TPV = "[Arpit 2025](https://arxiv.org/abs/2512.11089)"
BY_WAY = ("opt", "lr", "num_train")  # of the learning curves; what is left differs in its seed


class Claim(NamedTuple):
    """One line of the table."""

    paper: str
    claim: str
    measured: str
    needs: str
    verdict: str


def claim(paper: str, said: str, on: str, bounds: Sequence[Bound]) -> Claim:
    """Return the line of a claim that needs all of its bounds."""
    figures = "; ".join(f"{bound.what} {bound.figure}" for bound in bounds)
    needs = "; ".join(bound.needs for bound in bounds)
    return Claim(paper, said, f"{on}: {figures}", needs, verdict(bounds))


def claims(rows: Sequence[Row], students: Sequence[Row]) -> list[Claim]:
    """Return all claims that the networks can tell of."""
    found: list[Claim] = []
    for images in dict.fromkeys(row["images"] for row in rows):
        mine = [row for row in rows if row["images"] == images]
        # Networks without BatchNorm are trained until they fit; what does not is left out.
        chains = [row for row in mine if row["arch"] == "chain" and fitted(row)]
        others = [row for row in mine if row["arch"] != "chain"]
        for some in (of(chains, "init"), others):
            found += liao(some) if some else []
        if of(chains, "curve"):
            found += [*fragile(chains), *loukas(chains, students), *volume(chains)]
        found += tpv(mine)
    return sorted(found, key=lambda line: (LIAO, FRAGILE, LOUKAS, VOLUME, TPV).index(line.paper))


def fitted(row: Row) -> bool:
    """Only networks that make at most 2 errors in 1,000 training images are compared."""
    return float(row["train_error"]) <= 0.002


def of(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the networks of one set."""
    return [row for row in rows if row["set"] == name]


def named(rows: Sequence[Row]) -> str:
    """Return which networks a figure is of."""
    archs = ", ".join(dict.fromkeys(f"{row['images']} ({row['arch']})" for row in rows))
    num, ways = len({*map(network, rows)}), len({*map(configuration, rows)})
    return f"{archs}, {num} networks of {ways} configurations"


def liao(rows: Sequence[Row]) -> Iterator[Claim]:
    """Normalized losses."""

    def line(rows: Sequence[Row], kind: str = "normalized_") -> Line:
        names = (f"{kind}train", f"{kind}test") if kind else ("train_loss", "test_loss")
        return fit_line(*(column(rows, name) for name in names))

    yield claim(
        LIAO,
        "Normalized test loss is a linear function of normalized training loss (slope 0.96, "
        "intercept 0.08, R² 0.9999 on the paper's set)",
        named(rows),
        [
            Bound("slope", bootstrap(rows, lambda r: line(r).slope), 0.9, 1.1),
            Bound("R²", bootstrap(rows, lambda r: line(r).r2, reach=(0, 1)), 0.99),
        ],
    )
    yield claim(
        LIAO,
        "Without normalization equal training losses go with very different test losses",
        named(rows),
        [Bound("R² less by", bootstrap(
            rows, lambda r: line(r).r2 - line(r, "").r2, reach=CORRELATION), 0.3)],
    )  # fmt: skip
    yield claim(
        LIAO,
        "Test error grows with normalized test loss, roughly monotonically",
        named(rows),
        [Bound("rank correlation", correlation(rows, "normalized_test", "test_error"), 0.7)],
    )


def _slopes(rows: Sequence[Row], key: str) -> list[float]:
    return [
        exponent([r for r in rows if (r["opt"], r["lr"]) == curve], key) for curve in CHAIN_CURVES
    ]


def _spread(rows: Sequence[Row], key: str) -> float:
    """Return the log of the largest over the smallest of the optimizers, mean over sizes."""
    ratios = []
    for size in sorted({r["num_train"] for r in rows}):
        means = [
            statistics.mean(column([r for r in rows if (r["opt"], r["lr"], r["num_train"])
                                    == (*curve, size)], key))
            for curve in CHAIN_CURVES
        ]  # fmt: skip
        ratios.append(math.log(max(means) / min(means)))
    return statistics.mean(ratios)


def _blindness(rows: Sequence[Row]) -> float:
    """Return by how much the exponent differs on random labels, of the test error's difference."""
    clean = [r for r in of(rows, "curve") if (r["opt"], r["lr"]) == CHAIN_CURVES[0]]
    gaps = [
        abs(exponent(clean, key) - exponent(of(rows, "random"), key))
        for key in ("pac_bayes_origin", "test_error")
    ]
    return gaps[0] / gaps[1]


def fragile(rows: Sequence[Row]) -> Iterator[Claim]:
    """Fragile measures."""
    curve = of(rows, "curve")
    drawn = partial(bootstrap, within=BY_WAY, unit=network)
    yield claim(
        FRAGILE,
        "A change of rate or optimizer reverses the slope of the path norm's learning curve",
        f"{named(curve)}, exponent in the number of images by SGD 0.05, SGD 0.01, Adam 0.001",
        [
            Bound("least", drawn(curve, lambda r: min(_slopes(r, "path_norm"))), most=-0.05),
            Bound("greatest", drawn(curve, lambda r: max(_slopes(r, "path_norm"))), 0.05),
        ],
    )

    def steadier(than: str) -> Statistic:
        return lambda r: _spread(r, "pac_bayes_origin") - _spread(r, than)

    yield claim(
        FRAGILE,
        "Values move with rate and optimizer though test error hardly does; the PAC-Bayes origin "
        "measure is among the steadiest",
        f"{named(curve)}, log of the largest over the smallest of the three, mean over sizes, "
        "PAC-Bayes less",
        [
            Bound(title, drawn(curve, steadier(key)), most=0)
            for key, title in (("path_norm", "path norm"), ("sharpness", "sharpness"))
        ],
    )
    both = [*curve, *of(rows, "random")]
    yield claim(
        FRAGILE,
        "The PAC-Bayes origin measure does not see data complexity in learning curves",
        f"{named(both)}, difference of its exponent between true and random labels",
        [
            Bound(
                "of that of the test error",
                bootstrap(both, _blindness, within=("set", *BY_WAY), unit=network),
                most=0.5,
            )
        ],
    )


def loukas(rows: Sequence[Row], students: Sequence[Row]) -> Iterator[Claim]:
    """Ways of the weights."""
    noise = of(rows, "noise")
    for said, before in (
        ("The steeper the function near the data, the longer, wider and farther the way of the "
         "weights", ""),
        ("The same of the first layer's bias, of which the theorems speak", "bias_"),
    ):  # fmt: skip
        yield claim(
            LOUKAS,
            said,
            f"{named(noise)}, 0 to 100 % random labels, rank correlation of the Lipschitz constant",
            [
                Bound(what, correlation(noise, "input_lipschitz", f"{before}{what}"), 0.7)
                for what in ("length", "variance", "distance")
            ],
        )
    if not students:
        return
    dense = len({row["seed"] for row in students})
    yield claim(
        LOUKAS,
        "Here: a network pruned further has a longer way back to the dense one's function",
        f"{len(students)} students at 0.2 to 0.8 of the MACs of {dense} dense networks, which are "
        "what is drawn, rank correlation of what is kept",
        [Bound("length", correlation(students, "keep", "length", unit=of_seed), most=-0.7)],
    )


def of_seed(row: Row) -> Hashable:
    """Return the dense network that a student comes from."""
    return row["seed"]


def volume(rows: Sequence[Row]) -> Iterator[Claim]:
    """Flatness and volume."""
    attack = of(rows, "attack")
    sgd = [r for r in attack if r["opt"] == "sgd"]
    on = named(sgd)
    flat, rescaled, room = (
        rank(key, "test_error") for key in ("sharpness", "sharpness_rescaled", "log_radius")
    )
    yield claim(
        VOLUME,
        "Rescaling changes sharpness without changing the function; a volume stays",
        on,
        [
            Bound("median ratio of sharpness", bootstrap(
                sgd, quantile(lambda r: r["sharpness_rescaled"] / r["sharpness"], 0.5)), 1.5),
            Bound("log radius moves by at most", bootstrap(
                sgd, quantile(lambda r: abs(r["log_radius_rescaled"] - r["log_radius"]), 1)),
                most=1e-5),
        ],
    )  # fmt: skip
    yield claim(
        VOLUME,
        "Trained to fit sets with wrongly labelled images, too, flatness goes with generalization "
        "for SGD",
        f"{on}, rank correlation of sharpness with test error",
        [
            Bound("as it is", bootstrap(sgd, flat, reach=CORRELATION), 0.7),
            Bound("rescaled less by", bootstrap(sgd, lambda r: flat(r) - rescaled(r)), 0),
        ],
    )
    yield claim(
        VOLUME,
        "Volume goes with generalization, more robustly (in the paper the prior's, here the local "
        "one)",
        f"{on}, rank correlation of log radius with test error",
        [
            Bound("log radius", bootstrap(sgd, room, reach=CORRELATION), most=-0.7),
            Bound(
                "stronger than sharpness by",
                bootstrap(sgd, lambda r: abs(room(r)) - abs(flat(r)), reach=CORRELATION),
                0,
            ),
        ],
    )

    def lost(measure: Statistic) -> Statistic:
        return lambda r: abs(measure([x for x in r if x["opt"] == "sgd"])) - abs(measure(r))

    fall = partial(bootstrap, attack, within=("opt",), reach=CORRELATION)
    yield claim(
        VOLUME,
        "Adam beside SGD weakens the correlation of flatness, not that of volume",
        f"{named(attack)} of both, rank correlation with test error falls",
        [
            Bound("sharpness", fall(lost(flat)), 0.1),
            Bound("log radius", fall(lost(room)), most=0.1),
        ],
    )


def tpv(rows: Sequence[Row]) -> Iterator[Claim]:
    """Stability of TPV."""
    every = distinct(rows)

    def ratio(row: Row) -> float:
        return row["tpv_test"] / row["tpv_train"]

    yield claim(
        TPV,
        "TPV on training images equals TPV on test images, whatever the generalization",
        f"{named(every)}, Tr H_eff, test over training",
        [
            Bound("5 % quantile", bootstrap(every, quantile(ratio, 0.05)), 0.85),
            Bound("95 % quantile", bootstrap(every, quantile(ratio, 0.95)), most=1.15),
        ],
    )
    for key, title in (("tpv_train", "Tr H_eff"), ("channel_tpv", "channel TPV")):
        sets = {
            name: [r for r in of(rows, name) if fitted(r) or r["arch"] != "chain"]
            for name in ("attack", "noise", "init", "curve", "resnet")
        }
        some = {name: mine for name, mine in sets.items() if mine}
        yield claim(
            TPV,
            f"TPV of the training set goes with test loss ({title})",
            f"{named([r for mine in some.values() for r in mine])}, rank correlation by set",
            [Bound(name, correlation(mine, key, "test_loss"), 0.7) for name, mine in some.items()],
        )
