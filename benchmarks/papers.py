"""What five papers claim, tried on small networks: claims, measurements and verdicts.

    python benchmarks/papers.py [--data-dir TRAIN --test-dir TEST] [--docs docs/claims.md]

Networks without BatchNorm are trained to a loss of 0.01 on scikit-learn's digits (and, where
folders or tars of labelled images are named, on 1,000 of them) in many ways: initialisations of
several sizes, labels that are wrong at first, for good or on additional images, several sizes of
training set, SGD at two rates and Adam. Every measure is taken of each network
(results/papers-models.csv, to which a run that was stopped, or one of more seeds, adds what is
missing); a claim holds where its stated threshold is met
(results/papers-claims.csv).
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from environment import write_environment
from paper_models import BATCH, Images, Way, digits, measured, paths, trained
from tqdm import tqdm

from tpvprune import agreement, distill, prune
from tpvprune.diagnostics.ablation import spearman
from tpvprune.diagnostics.normalized_loss import Line, fit_line
from tpvprune.diagnostics.trajectory import Trajectory, input_lipschitz

RESULTS = Path(__file__).parent / "results"
MODELS = "papers-models.csv"
LIAO = "[Liao et al. 2018](https://arxiv.org/abs/1807.09659)"
FRAGILE = "[Zhang and Louis 2025](https://arxiv.org/abs/2510.18934)"
LOUKAS = "[Loukas et al. 2021](https://arxiv.org/abs/2106.04186)"
VOLUME = "[Zhang et al. 2021](https://arxiv.org/abs/2103.06219)"
TPV = "[Arpit 2025](https://arxiv.org/abs/2512.11089)"
CURVES = (("sgd", 0.05), ("sgd", 0.01), ("adam", 1e-3))

Row = dict[str, Any]


class Claim(NamedTuple):
    """One line of the table; ``holds`` is yes, no or partly, by the threshold in ``needs``."""

    paper: str
    claim: str
    measured: str
    needs: str
    holds: str


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    pools = [(digits(), ways(args.seeds))]
    if (own := paths(args)) is not None:
        pools.append((own, init_ways((0.7, 1.0, 2.0), (0.0, 1.0), 1)))
    rows = [row for images, chosen in pools for row in taken(args, images, chosen)]
    students = distilled(pools[0][0])
    claims = [
        *liao(rows),
        *fragile(rows),
        *loukas(rows, students),
        *volume(rows),
        *tpv(rows),
    ]
    write(args, claims)
    table = markdown(claims)
    print(table)
    seconds = time.perf_counter() - start
    print(f"\n{len(rows)} networks, {seconds:.0f} s")
    if args.docs:
        args.docs.write_text(page(table, rows, args))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder or tar of labelled training images")
    parser.add_argument("--test-dir", help="the same to test on")
    parser.add_argument("--num-images", type=int, default=1000, help="of each")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="write the table of claims here")
    return parser.parse_args(argv)


# ---- the sets -------------------------------------------------------------------------------


def taken(args: argparse.Namespace, images: Images, chosen: Sequence[Way]) -> list[Row]:
    """Read the rows of an earlier run and measure the networks that it lacks, row by row."""
    path = args.output / MODELS
    known: dict[tuple[str, ...], Row] = {}
    if path.exists():
        with path.open(newline="") as file:
            known = {_key(row): row for row in csv.DictReader(file)}
    rows = []
    for way in tqdm(chosen, desc=images.name, unit="network"):
        key = _key({"images": images.name, **asdict(way)})
        if key not in known:
            try:
                found = measured(images, way)
            except ValueError as error:  # large initialisations may end with dead layers
                print(f"left out: {way}: {error}")
                continue
            known[key] = {
                k: f"{v:.8g}" if isinstance(v, float) else str(v) for k, v in found.items()
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with path.open("a", newline="") as file:
                models = csv.DictWriter(file, list(known[key]))
                if new:
                    models.writeheader()
                models.writerow(known[key])
        rows.append({k: _number(v) for k, v in known[key].items()})
    return rows


def _key(row: Row) -> tuple[str, ...]:
    names = ("images", *(field.name for field in fields(Way)))
    return tuple(str(_number(str(row[name]))) for name in names)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def init_ways(scales: Sequence[float], wrongs: Sequence[float], seeds: int) -> list[Way]:
    return [
        Way("init", seed=seed, init_scale=scale, pretrain_wrong=wrong)
        for scale, wrong, seed in product(scales, wrongs, range(seeds))
    ]


def ways(seeds: int) -> list[Way]:
    """Every way of training on the digits."""
    every = range(seeds)
    found = [
        *init_ways((0.5, 0.7, 1.0, 1.5, 2.0), (0.0, 0.5, 1.0), seeds),
        *(
            Way("attack", seed=s, num_train=500, attack=n, opt=opt, lr=lr)
            for n, (opt, lr), s in product(
                (0, 50, 100, 200, 350, 500), (("sgd", 0.05), ("adam", 1e-3)), every
            )
        ),
        *(Way("noise", seed=s, wrong=w) for w, s in product((0, 0.1, 0.2, 0.4, 0.7, 1.0), every)),
        *(
            Way("curve", seed=s, num_train=n, opt=opt, lr=lr)
            for n, (opt, lr), s in product((125, 250, 500, 1000), CURVES, every)
        ),
        *(
            Way("random", seed=s, num_train=n, wrong=1.0)
            for n, s in product((125, 250, 500, 1000), every)
        ),
    ]
    return sorted(found, key=lambda way: way.seed)


def distilled(images: Images) -> list[Row]:
    """Prune one network to several sizes without repair and let the dense one teach each."""
    dense, _, (x, y), _ = trained(images, Way("dense"))
    del y
    batches, test = list(x.split(BATCH)), list(images.test[0].split(BATCH))
    rows = [{"keep": 1.0, "lipschitz": input_lipschitz(dense, batches[:4]).value}]
    for keep in (0.8, 0.6, 0.4, 0.2):
        small = prune(
            dense,
            batches,
            keep=keep,
            repair="none",
            planned_repair="compensate",
            repair_factors=False,
        ).model
        watch = Trajectory(small, x[:2])
        student = distill(small, dense, batches, epochs=20, lr=0.02, watch=watch)
        rows.append(
            {
                "keep": keep,
                "before": input_lipschitz(small, batches[:4]).value,
                "lipschitz": input_lipschitz(student, batches[:4]).value,
                "length": watch.weights.length,
                "distance": watch.weights.distance,
                "agreement": agreement(student, dense, test),
            }
        )
    return rows


# ---- the claims -----------------------------------------------------------------------------


def liao(rows: Sequence[Row]) -> list[Claim]:
    claims = []
    for images in dict.fromkeys(row["images"] for row in rows):
        mine = [r for r in rows if r["set"] == "init" and r["images"] == images and fitted(r)]
        line, raw = (
            fit_line(column(mine, train), column(mine, test))
            for train, test in (
                ("normalized_train", "normalized_test"),
                ("train_loss", "test_loss"),
            )
        )
        few = [r for r in mine if r["pretrain_wrong"] == 0 and r["init_scale"] == 1]
        spread = [100 * f(column(mine, "test_error")) for f in (min, max)]
        claims += [
            Claim(
                LIAO,
                "Normalized test loss is a linear function of normalized training loss (slope "
                "0.96, intercept 0.08, R² 0.9999 on the paper's set)",
                f"{images}, {len(mine)} networks: {described(line)}",
                "slope 0.9 to 1.1, R² ≥ 0.99",
                verdict(abs(line.slope - 1) <= 0.1 and line.r2 >= 0.99),
            ),
            Claim(
                LIAO,
                "Without normalization equal training losses go with very different test losses",
                f"{images}: test loss on training loss R² {raw.r2:.2f} (normalized {line.r2:.4f}); "
                f"test errors {spread[0]:.1f} to {spread[1]:.1f} %",
                "R² lower by 0.3",
                verdict(raw.r2 < line.r2 - 0.3 and bool(few)),
            ),
        ]
        rho = rank(mine, "normalized_test", "test_error")
        claims.append(
            Claim(
                LIAO,
                "Test error grows with normalized test loss, roughly monotonically",
                f"{images}: rank correlation {rho:+.2f}",
                "≥ 0.7",
                verdict(rho >= 0.7),
            )
        )
    return claims


def fragile(rows: Sequence[Row]) -> list[Claim]:
    measures = ("path_norm", "sharpness", "pac_bayes_origin", "l2_norm", "channel_tpv")
    slopes: dict[str, list[float]] = {m: [] for m in measures}
    spreads: dict[str, float] = {}
    curve = [r for r in rows if r["set"] == "curve" and fitted(r)]
    for name in measures:
        for opt, lr in CURVES:
            mine = [r for r in curve if (r["opt"], r["lr"]) == (opt, lr)]
            slopes[name].append(exponent(mine, name))
        spreads[name] = statistics.mean(
            math.log(max(means) / min(means))
            for n in sorted({r["num_train"] for r in curve})
            if (means := [
                statistics.mean(column([r for r in curve if (r["opt"], r["lr"], r["num_train"])
                                        == (opt, lr, n)], name))
                for opt, lr in CURVES
            ])
        )  # fmt: skip
    errors = [statistics.mean(column([r for r in curve if r["opt"] == o and r["lr"] == lr],
                                     "test_error")) for o, lr in CURVES]  # fmt: skip
    said = {m: ", ".join(f"{s:+.2f}" for s in slopes[m]) for m in measures}
    reversed_ = [m for m in measures if min(slopes[m]) < -0.05 and max(slopes[m]) > 0.05]
    moved = {m: math.exp(s) for m, s in spreads.items()}
    clean = [r for r in curve if (r["opt"], r["lr"]) == CURVES[0]]
    random = [r for r in rows if r["set"] == "random" and fitted(r)]
    gap = {m: abs(exponent(clean, m) - exponent(random, m)) for m in (*measures, "test_error")}
    names = "SGD 0.05, SGD 0.01, Adam 0.001"
    return [
        Claim(
            FRAGILE,
            "A change of rate or optimizer reverses the slope of the path norm's learning curve",
            f"exponent in the number of images by {names}: path norm {said['path_norm']}; "
            f"reversed: {', '.join(reversed_) or 'none'} (mean test errors "
            f"{', '.join(f'{100 * e:.1f} %' for e in errors)})",
            "signs differ, both beyond 0.05",
            verdict("path_norm" in reversed_),
        ),
        Claim(
            FRAGILE,
            "Values move with rate and optimizer though test error hardly does; the PAC-Bayes "
            "origin measure is among the steadiest",
            "largest over smallest of the three, mean over sizes: "
            + ", ".join(f"{m} {v:.2f}" for m, v in sorted(moved.items(), key=lambda i: i[1])),
            "PAC-Bayes steadier than path norm and sharpness",
            verdict(moved["pac_bayes_origin"] < min(moved["path_norm"], moved["sharpness"])),
        ),
        Claim(
            FRAGILE,
            "The PAC-Bayes origin measure does not see data complexity in learning curves",
            "exponent, true against random labels: PAC-Bayes "
            f"{exponent(clean, 'pac_bayes_origin'):+.2f} and "
            f"{exponent(random, 'pac_bayes_origin'):+.2f}; test error "
            f"{exponent(clean, 'test_error'):+.2f} and {exponent(random, 'test_error'):+.2f}",
            "exponents of the measure differ by less than half as much as those of the error",
            verdict(gap["pac_bayes_origin"] < 0.5 * gap["test_error"]),
        ),
    ]


def loukas(rows: Sequence[Row], students: Sequence[Row]) -> list[Claim]:
    mine = [r for r in rows if r["set"] == "noise" and fitted(r)]
    found = {
        key: rank(mine, "input_lipschitz", key)
        for key in (
            "length", "variance", "distance", "bias_length", "bias_variance", "bias_distance"
        )
    }  # fmt: skip
    cut = students[1:]
    far = spearman(torch.tensor([r["keep"] for r in cut]), torch.tensor([r["length"] for r in cut]))
    return [
        Claim(
            LOUKAS,
            "The steeper the function near the data, the longer, wider and farther the way of the "
            "weights",
            f"{len(mine)} networks, 0 to 100 % random labels; rank correlation of the Lipschitz "
            "constant with all weights' length, variance, distance: "
            + ", ".join(f"{found[k]:+.2f}" for k in ("length", "variance", "distance")),
            "all ≥ 0.7",
            verdict(min(found[k] for k in ("length", "variance", "distance")) >= 0.7),
        ),
        Claim(
            LOUKAS,
            "The same of the first layer's bias, of which the theorems speak",
            ", ".join(
                f"{found[k]:+.2f}" for k in ("bias_length", "bias_variance", "bias_distance")
            ),
            "all ≥ 0.7",
            verdict(
                min(found[k] for k in ("bias_length", "bias_variance", "bias_distance")) >= 0.7
            ),
        ),
        Claim(
            LOUKAS,
            "Here: a network pruned further has a longer way back to the dense one's function",
            f"Lipschitz constant dense {students[0]['lipschitz']:.1f}; "
            + "; ".join(
                f"at {r['keep']} of MACs length {r['length']:.1f}, distance {r['distance']:.1f}, "
                f"Lipschitz {r['before']:.1f} → {r['lipschitz']:.1f}, agreement "
                f"{100 * r['agreement']:.1f} %"
                for r in cut
            ),
            "length falls with what is kept (rank correlation ≤ -0.7)",
            verdict(far <= -0.7),
        ),
    ]


def volume(rows: Sequence[Row]) -> list[Claim]:
    attack = [r for r in rows if r["set"] == "attack" and fitted(r)]
    sgd = [r for r in attack if r["opt"] == "sgd"]
    ratios = [r["sharpness_rescaled"] / r["sharpness"] for r in sgd]
    still = max(abs(r["log_radius_rescaled"] - r["log_radius"]) for r in sgd)
    flat, flat_rescaled, room = (
        rank(sgd, key, "test_error") for key in ("sharpness", "sharpness_rescaled", "log_radius")
    )
    flat_all, room_all = (rank(attack, key, "test_error") for key in ("sharpness", "log_radius"))
    return [
        Claim(
            VOLUME,
            "Rescaling changes sharpness without changing the function; a volume stays",
            f"{len(sgd)} networks: sharpness {min(ratios):.1f} to {max(ratios):.1f} times; log "
            f"radius (relative coordinates) by at most {still:.0e}",
            "median ratio beyond 1.5, log radius within 1e-5",
            verdict(statistics.median(ratios) > 1.5 and still < 1e-5),
        ),
        Claim(
            VOLUME,
            "Trained to fit sets with wrongly labelled images, too, flatness goes with "
            "generalization for SGD",
            f"rank correlation of sharpness with test error {flat:+.2f}, after rescaling "
            f"{flat_rescaled:+.2f}",
            "≥ 0.7, and less after rescaling",
            verdict(flat >= 0.7, flat_rescaled < flat),
        ),
        Claim(
            VOLUME,
            "Volume goes with generalization, more robustly (in the paper the prior's, here the "
            "local one)",
            f"rank correlation of log radius with test error {room:+.2f}",
            "≤ -0.7, stronger than sharpness",
            verdict(room <= -0.7, abs(room) >= abs(flat)),
        ),
        Claim(
            VOLUME,
            "Adam beside SGD weakens the correlation of flatness, not that of volume",
            f"{len(attack)} networks of both: sharpness {flat_all:+.2f}, log radius "
            f"{room_all:+.2f}",
            "sharpness falls by 0.1 or more, log radius by less",
            verdict(flat - flat_all >= 0.1 and abs(room) - abs(room_all) < 0.1),
        ),
    ]


def tpv(rows: Sequence[Row]) -> list[Claim]:
    ratios = [r["tpv_test"] / r["tpv_train"] for r in rows]
    worst = [r["tpv_test"] / r["tpv_train"] for r in rows if r["wrong"] == 1.0]
    loss = {
        name: rank([r for r in rows if r["set"] == name and fitted(r)], "tpv_train", "test_loss")
        for name in ("attack", "noise", "init", "curve")
    }
    channels = {
        name: rank([r for r in rows if r["set"] == name and fitted(r)], "channel_tpv", "test_loss")
        for name in loss
    }
    return [
        Claim(
            TPV,
            "TPV on training images equals TPV on test images, whatever the generalization",
            f"Tr H_eff, test over training, {len(ratios)} networks: {min(ratios):.2f} to "
            f"{max(ratios):.2f}, median {statistics.median(ratios):.3f}; random labels only: "
            f"{min(worst):.2f} to {max(worst):.2f}",
            "all within 0.85 to 1.15",
            verdict(min(ratios) >= 0.85 and max(ratios) <= 1.15),
        ),
        Claim(
            TPV,
            "TPV of the training set goes with test loss",
            "rank correlation of Tr H_eff with test loss: "
            + ", ".join(f"{name} {rho:+.2f}" for name, rho in loss.items())
            + "; of channel TPV: "
            + ", ".join(f"{name} {rho:+.2f}" for name, rho in channels.items()),
            "Tr H_eff ≥ 0.7 in every set (partly: in half of them)",
            verdict(sum(r >= 0.7 for r in loss.values()) >= 2, min(loss.values()) >= 0.7),
        ),
    ]


# ---- small pieces ---------------------------------------------------------------------------


def fitted(row: Row) -> bool:
    """Only networks that make at most 2 errors in 1,000 training images are compared."""
    return float(row["train_error"]) <= 0.002


def verdict(*conditions: bool) -> str:
    return "yes" if all(conditions) else "partly" if any(conditions[:1]) else "no"


def column(rows: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows]


def rank(rows: Sequence[Row], x: str, y: str) -> float:
    return spearman(torch.tensor(column(rows, x)), torch.tensor(column(rows, y)))


def exponent(rows: Sequence[Row], key: str) -> float:
    """Return b of value ~ n^b over training sets of n images."""
    log: Callable[[float], float] = math.log
    return fit_line(
        [log(n) for n in column(rows, "num_train")], [log(v) for v in column(rows, key)]
    ).slope


def described(line: Line) -> str:
    return (
        f"slope {line.slope:.3f}, intercept {line.intercept:+.3f}, R² {line.r2:.4f}, "
        f"RMSE {line.rmse:.1e}"
    )


def markdown(claims: Sequence[Claim]) -> str:
    lines = ["| paper | claim | measured | holds if | holds |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(claim)} |" for claim in claims]
    return "\n".join(lines)


def page(table: str, rows: Sequence[Row], args: argparse.Namespace) -> str:
    names = " and ".join(dict.fromkeys(row["images"] for row in rows))
    own = " --data-dir … --test-dir …" if args.data_dir else ""
    return (
        "# Five papers' claims, tried here\n\n"
        f"{len(rows)} small networks on {names}, seeds: {args.seeds}, one thread; "
        "every number by\n\n"
        f"    python benchmarks/papers.py --seeds {args.seeds}{own} --docs docs/claims.md\n\n"
        "which also writes one row per network to `benchmarks/results/papers-models.csv`. A claim "
        "holds where its\nthreshold, set beforehand, is met: for networks of this size, on these "
        "images, and no further. Correlations are\nSpearman's. Where a paper measures something "
        "that is out of reach here, the line says what was taken instead.\n\n"
        f"{table}\n"
    )


def write(args: argparse.Namespace, claims: Sequence[Claim]) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "papers-claims.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(Claim._fields)
        lines.writerows(claims)
    write_environment(args.output / "papers.json", args)


if __name__ == "__main__":
    raise SystemExit(main())
