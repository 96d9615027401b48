"""The tables of the README, of docs and of benchmarks/README.md, made from results/.

    python benchmarks/tables.py

writes every table between its two marks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import own_task_chart
import paper_chart
from own_task_chart import OURS
from photograph_tables import depth, headline, photographs, photographs_criteria
from rows import RESULTS, grouped, interpolated, mean_and_sd, mean_of
from stability_table import stability
from titles import NAMES, criterion_of, markdown

from tpvprune.benchmark.rows import Row, Summary, read_rows, summarise

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "benchmarks/README.md")]
PAGES += [ROOT / "docs" / name for name in ("results.md", "models.md")]
PAPER_PRUNING = "paper-pruning-cifar_resnet56-1280.csv"
PAPER_PRUNING_AS_THERE = "paper-pruning-cifar_resnet56-6400.csv"  # from as many images
MODELS = {"vit_tiny_patch16_224": "small ViT"}
OWN_TASK = RESULTS / "own-task.csv"


def main() -> int:
    """Write the tables."""
    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    if OWN_TASK.exists():
        (ROOT / "docs/own-task.svg").write_text(own_task_chart.chart(OWN_TASK), "utf-8")
    return 0


def filled(text: str) -> str:
    """Return the text with every table between its marks as the results have it."""

    def table(mark: re.Match[str]) -> str:
        return f"{mark[1]}\n{TABLES[mark[2]]()}\n{mark[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n(?:(?!<!--).*\n)*(<!-- /table -->)", table, text)


def accuracy() -> str:
    """Return top-1 by model, repair and budget."""
    keeps = ("0.7", "0.5", "0.47", "0.4", "0.3")
    lines = []
    for model in ("cifar_resnet56", "cifar_resnet20"):
        found = _oneshot(model)
        for repair, num, kind, fits, name in (
            ("compensate", "1000", "train", "1", "compensate"),
            ("compensate", "1000", "mirrored", "1", "compensate, mirrored"),
            ("reconstruct", "1000", "train", "1", "reconstruct"),
            ("reconstruct", "4000", "train", "1", "reconstruct, 4,000 images"),
            ("reconstruct", "3000", "train", "3", "mean of 3 reconstructions, 3,000 images"),
        ):
            rows = {k: found.get((repair, num, kind, fits, k)) for k in keeps}
            if measured := [r for r in rows.values() if r]:
                cells = (mean_and_sd(r, "top1") if r else "" for r in rows.values())
                lines.append([f"`{model}`", name, measured[0][0]["dense_top1"], *cells])
    return markdown(["model", "repair", "dense", *(f"{k} of MACs" for k in keeps)], lines)


def images() -> str:
    """Return top-1 by what pruning saw."""
    seen = {
        "1,000 training images": ("1000", "train"),
        "64 training images": ("64", "train"),
        "1,000 handwritten digits": ("1000", "digits"),
        "1,000 images of noise": ("1000", "noise"),
    }
    found = _oneshot("cifar_resnet56")
    rows = (found["compensate", num, kind, "1", "0.5"] for num, kind in seen.values())
    return markdown(list(seen), [[mean_and_sd(r, "top1") for r in rows]])


def _oneshot(model: str) -> Mapping[tuple[str, ...], list[dict[str, str]]]:
    key = ("repair", "num_images", "calibration", "reconstructions", "keep")
    return grouped(RESULTS / f"oneshot-{model}.csv", key)


def latency() -> str:
    """Return what pruning to milliseconds gave, beside models cut to MACs that are as fast."""
    lines = []
    for model, trained in (("cifar_resnet56", True), ("resnet50", False)):
        rows = grouped(RESULTS / f"latency-{model}.csv", ("batch_size", "of"))
        for (size, of), (row, *_) in rows.items():
            if of == "latency":
                spread = f"{row['ratio']} ({row['ratio_low']} to {row['ratio_high']})"
                points = [(float(r["ratio"]), float(r["agreement"])) for r in rows[size, "macs"]]
                same = interpolated(points, float(row["ratio"]))
                cells = [row["agreement"], f"{same:.2f}"] if trained and same else ["", ""]
                lines.append([f"`{model}`", size, spread, row["macs_kept"], *cells])
    head = "model|images a call|latency, of dense|MACs kept|agreement|... cut to MACs, as fast"
    return markdown(head.split("|"), lines)


def criteria() -> str:
    """Return top-1 by criterion, all compensated alike."""
    return _criteria("compensate")


def criteria_bn() -> str:
    """Return top-1 by criterion with BatchNorm recalibration alone."""
    return _criteria("bn")


def _criteria(repair: str) -> str:
    """Return top-1 by criterion, each with the better of its rankings."""
    best: dict[tuple[str, str], dict[tuple[str, str], Summary]] = {}
    columns: dict[tuple[str, str], str] = {}
    for name in ("resnet10t", "cifar_resnet56", "small_vit"):
        rows = read_rows(RESULTS / f"criteria-{name}.csv")
        for s in summarise(r for r in rows if r["repair"] == repair):
            column = s.model, f"{s.keep:g}"
            columns[column] = f"{s.dense_top1:.2f}"
            cells = best.setdefault((criterion_of(s), s.labels), {})
            if column not in cells or s.top1 > cells[column].top1:
                cells[column] = s
    first = next(iter(columns))

    def place(line: tuple[tuple[str, str], dict[tuple[str, str], Summary]]) -> tuple[bool, float]:
        (name, _), cells = line
        return not name.startswith("TPV"), -cells[first].top1 if first in cells else 0.0

    lines = [
        [name, labels, *(cells[column].shown if column in cells else "" for column in columns)]
        for (name, labels), cells in sorted(best.items(), key=place)
    ]
    head = ["criterion", "labels", *(f"{MODELS.get(m, f'`{m}`')} {keep}" for m, keep in columns)]
    return markdown(head, [*lines, ["dense", "", *columns.values()]])


def iterative() -> str:
    """Return top-1 on the way down in 18 steps, every third of them."""
    found = summarise(read_rows(RESULTS / "iterative-cifar_resnet20.csv"))
    keeps = sorted({s.keep for s in found}, reverse=True)[2::3]
    lines: dict[tuple[str, str], dict[float, Summary]] = {}
    for s in found:
        lines.setdefault((criterion_of(s), s.labels), {})[s.keep] = s
    return markdown(
        ["criterion", "labels", *(f"{keep:g}" for keep in keeps)],
        [
            [*line, *(cells[keep].shown if keep in cells else "" for keep in keeps)]
            for line, cells in lines.items()
        ],
    )


def paper_pruning() -> str:
    """Return top-1 on the way down in 18 steps to a tenth of the channels."""
    return paper_chart.table(RESULTS / PAPER_PRUNING)


def paper_pruning_as_there() -> str:
    """Return the same of fewer runs, from as many images as the paper."""
    return paper_chart.table(RESULTS / PAPER_PRUNING_AS_THERE)


def weights() -> str:
    """Return top-1 by criterion for single weights."""
    found = grouped(RESULTS / "weights-cifar_resnet56.csv", ("granularity", "scope", "criterion"))
    scopes = {"2:4": ("joint", "neighbours", "neighbours"), "weight": ("joint", "global", "row")}
    shown = [("2 of every 4", "2:4", "top1"), ("half of all", "weight", "top1"),
             ("... output variance", "weight", "output_variance")]  # fmt: skip
    criteria = ("tpv", "magnitude", "wanda")
    lines = [
        [
            title,
            *(
                mean_and_sd(found[granularity, scope, criterion], column)
                for scope, criterion in zip(scopes[granularity], criteria, strict=True)
            ),
        ]
        for title, granularity, column in shown
    ]
    return markdown(["removed", "TPV", "magnitude", "Wanda"], lines)


def fidelity() -> str:
    """Return rank correlations with brute-force removal."""
    models = ("cifar_resnet20", "cifar_resnet56", "resnet10t")
    found = [grouped(RESULTS / f"fidelity-{m}.csv", ("criterion", "groups")) for m in models]
    criteria = ("tpv", "tpv_8_probes", "jbr", "magnitude", "taylor_torch_pruning", "taylor")
    lines = []
    for name in criteria:
        rows = [f[name, "all"][0] for f in found]
        spearman = (f"{float(r['spearman']):.3f}" for r in rows)
        lines.append([NAMES[name], rows[0]["labels"], *spearman])
    return markdown(["criterion", "labels", *(f"`{m}`" for m in models)], lines)


def cost() -> str:
    """Return what scoring costs, of a labelled Taylor pass."""
    rows = grouped(RESULTS / "cost.csv", ("model", "procedure"))
    models = [model for model, procedure in rows if procedure == "tpv_plain_amp"]
    shown = {
        "time, `compensated=False`": ("tpv_plain", "time_ratio"),
        "... in bfloat16": ("tpv_plain_amp", "time_ratio"),
        "time, with stand-in maps (default)": ("tpv_compensated", "time_ratio"),
        "memory, `compensated=False`": ("tpv_plain", "memory_ratio"),
    }
    lines = [
        [title, *(f"{float(rows[m, procedure][0][column]):.2f}" for m in models)]
        for title, (procedure, column) in shown.items()
    ]
    return markdown(["", *(f"`{m}`" for m in models)], lines)


def timm_modules() -> str:
    """Return what prunes of timm, a line per module."""
    families = grouped(RESULTS / "coverage.csv", ("family",))
    lines = []
    for (family,), rows in families.items():
        names = ", ".join(dict.fromkeys(f"`{r['model']}`" for r in rows))
        least = max(float(r["smallest_ratio"]) for r in rows)
        whole = [r["blocked"] for r in rows]
        groups = ", ".join(r["groups"] for r in rows)
        lines.append([f"`{family}`", names, groups, ", ".join(whole), f"{least:.2f}"])
    head = ["module", "tried", "groups that prune", "that stay whole", "smallest share of MACs"]
    return markdown(head, lines)


def other_networks() -> str:
    """Return what prunes of other libraries, a line per network."""
    rows = grouped(RESULTS / "networks.csv", ("library", "network"))
    lines = [
        [library, f"`{name}`", r["verdict"], r["groups"], r["blocked"], r["macs_ratio"]]
        for (library, name), (r, *_) in rows.items()
    ]
    head = ["library", "network", "at 0.6 of MACs", "groups that prune", "that stay whole", "MACs"]
    return markdown(head, lines)


def own_task() -> str:
    """Return what each way to a smaller network gave in equal minutes, and who is ahead."""
    if not OWN_TASK.exists():
        return "(not measured yet)"
    found = grouped(OWN_TASK, ("keep", "way"))
    keeps = sorted({keep for keep, _ in found}, key=float, reverse=True)
    lines, verdicts = [], []
    for keep in keeps:
        ours = found.get((keep, OURS), [])
        of_keep = {way: rows for (k, way), rows in found.items() if k == keep}
        for way, rows in sorted(of_keep.items(), key=lambda f: -mean_of(f[1], "top1")):
            cells = [mean_and_sd(rows, name) for name in ("top1", "agreement", "minutes")]
            apart = _apart(rows, ours) if way != OURS else ""
            timed = [row for row in rows if row["ms_kept"]]
            cost = [f"{mean_of(rows, 'macs_kept'):.2f}"]
            cost += [f"{mean_of(timed, 'ms_kept'):.2f}" if timed else ""]
            cost += [f"{mean_of(rows, 'mb'):.1f}"]
            head = [f"**{way}**" if way == OURS else way, f"`{rows[0]['network']}`"]
            lines.append([*head, rows[0]["labels"], *cost, *cells, apart])
        if ours and (theirs := found.get((keep, "smaller + distill"))):
            verdicts.append(_verdict(keep, ours, theirs))
    head = "way|network|labels|MACs|time|MB|top-1|agreement|minutes|top-1, to `prune + distill`"
    return "\n".join([markdown(head.split("|"), lines), "", *verdicts])


def _differences(rows: Sequence[Row], others: Sequence[Row]) -> list[float]:
    """Return the differences in top-1 between rows of the same seed, in points."""
    of_seed = {row["seed"]: float(row["top1"]) for row in others}
    return [float(r["top1"]) - of_seed[r["seed"]] for r in rows if r["seed"] in of_seed]


def _apart(rows: Sequence[Row], others: Sequence[Row]) -> str:
    found = _differences(rows, others)
    return mean_and_sd([{"x": f"{x}"} for x in found], "x", sign="+") if found else ""


def _verdict(keep: str, ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    """Return a line that says which of the two is ahead, or that the seeds do not tell."""
    apart = _differences(theirs, ours)
    name, points = f"`{theirs[0]['network']}`", _apart(theirs, ours)
    if not apart or (min(apart) <= 0 <= max(apart)):
        who = f"the smaller network {name} and the pruned one are not told apart by these seeds"
    elif apart[0] > 0:
        who = f"the smaller network {name} is ahead of the pruned one"
    else:
        who = f"the pruned network is ahead of the smaller one {name}"
    return f"At {keep} of the MACs {who}: {points} points."


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        accuracy, images, latency, criteria, criteria_bn, iterative, weights, fidelity, cost,
        depth, own_task, stability, timm_modules, other_networks,
    )
}  # fmt: skip
if any(RESULTS.glob("photographs-*.csv")):  # what has not been measured has no table
    TABLES |= {f.__name__: f for f in (headline, photographs, photographs_criteria)}
for name, found in (
    (PAPER_PRUNING, paper_pruning),
    (PAPER_PRUNING_AS_THERE, paper_pruning_as_there),
):
    if (RESULTS / name).exists():
        TABLES[found.__name__] = found

if __name__ == "__main__":
    raise SystemExit(main())
