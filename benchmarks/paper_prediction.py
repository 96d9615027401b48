"""Which measure of a network tells how accurate it will be after pruning? Rank correlations."""

from __future__ import annotations

from collections.abc import Sequence

from paper_claims import fitted
from paper_models import KEEP
from paper_statistics import Interval, Row, configuration, correlation, distinct
from titles import markdown

MEASURES = {
    "channel_tpv": "TPV of the channels",
    "tpv_train": "TPV, Tr H_eff",
    "normalized_train": "normalized loss",
    "path_norm": "path norm",
    "sharpness": "sharpness",
    "pac_bayes_origin": "PAC-Bayes, origin",
    "input_lipschitz": "input-Lipschitz constant",
    "log_radius": "volume (log radius)",
    "train_loss": "for comparison: training loss",
    "test_error": "for comparison: test error before",
}
LABELLED = {"normalized_train", "sharpness", "pac_bayes_origin", "train_loss", "test_error"}
TARGETS = {
    "cut_agreement": "agreement, cut",
    "compensated_agreement": "agreement, compensated",
    "cut_top1": "top-1, cut",
    "compensated_top1": "top-1, compensated",
}


Line = tuple[str, str, dict[str, Interval]]
"""The networks, the measure's column, and its rank correlation with each target."""


def predictions(rows: Sequence[Row]) -> list[Line]:
    """Return the rank correlations, the strongest of each kind of network first.

    Chains are compared where they fit their training set, all ways of training together.
    """
    found = []
    every = distinct(rows)
    for images, arch in dict.fromkeys((row["images"], row["arch"]) for row in every):
        mine = [r for r in every if (r["images"], r["arch"]) == (images, arch)]
        mine = [r for r in mine if arch != "chain" or fitted(r)]
        ways = len({*map(configuration, mine)})
        lines = [
            (
                f"{images} ({arch}), {len(mine)} of {ways}",
                measure,
                {target: correlation(mine, measure, target) for target in TARGETS},
            )
            for measure in MEASURES
        ]
        found += sorted(lines, key=lambda line: -abs(line[2]["cut_agreement"].value))
    return found


def table(found: Sequence[Line]) -> str:
    """Return the table of :func:`predictions`."""
    return markdown(
        ["networks of configurations", "measure", "labels", *TARGETS.values()],
        [
            [networks, MEASURES[name], "yes" if name in LABELLED else "no", *map(str, of.values())]
            for networks, name, of in found
        ],
    )


def section(rows: Sequence[Row]) -> str:
    """Return what the page says of it."""
    return (
        "## Which measure tells what pruning will do?\n\n"
        f"Every network cut to {KEEP} of its MACs by TPV curves, as it is and with weights "
        "compensated: Spearman's rank\ncorrelation of each measure, taken before on training "
        "images, with the agreement of the pruned with the\ndense network and with its top-1 on "
        "test images.\n\n"
        f"{table(predictions(rows))}\n"
    )
