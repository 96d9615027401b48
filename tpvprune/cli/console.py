"""What people see on stderr: notes, progress bars and the before/after table."""

from __future__ import annotations

import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from tqdm import tqdm

from tpvprune.cli import outcome
from tpvprune.reports.tables import share_of
from tpvprune.reports.text import cost_labels

_WIDTH, _SHORTEST_NAME = 80, 12


def say(text: str = "", *, indent: str = "") -> None:
    """Print text to stderr, wrapped to the terminal."""
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    lines = textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    print("\n".join(lines), file=sys.stderr)


def bar(title: str, unit: str = "batch") -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Return a wrapper that shows the progress of an iteration where stderr is a terminal."""
    return partial(_bar, desc=title, unit=unit)


def _bar(items: Iterable[Any] | None = None, **how: Any) -> Any:
    quiet = not sys.stderr.isatty()
    return tqdm(items, file=sys.stderr, disable=quiet, leave=False, dynamic_ncols=True, **how)


@contextmanager
def stages(seconds: float = 30.0) -> Iterator[Callable[[str, int, int], None]]:
    """Show what runs and how long it will take; every so many seconds if stderr is no terminal."""
    shown, done = Stages(), threading.Event()
    terminal = sys.stderr.isatty()
    before, after = ("\r\x1b[K", "") if terminal else ("", "\n")

    def show() -> None:
        while not done.wait(0.5 if terminal else seconds):
            if line := shown.line():
                text = f"{before}{line[: _WIDTH - 1]}{after}"
                print(text, end="", file=sys.stderr, flush=True)

    ticker = threading.Thread(target=show, daemon=True)
    ticker.start()
    try:
        yield shown.update
    finally:
        done.set()
        ticker.join()
        print(before, end="", file=sys.stderr, flush=True)


@contextmanager
def running(what: str) -> Iterator[None]:
    """Show for how long something has run whose parts are not counted."""
    with stages() as progress:
        progress(what, 0, 1)
        yield


class Stages:
    """What runs, since when, and how much of it is done."""

    def __init__(self) -> None:
        self._stage, self._done, self._total = "", 0, 0
        self._start = time.monotonic()

    def update(self, stage: str, done: int, total: int) -> None:
        """Note that so many of the parts of a stage are done."""
        if stage != self._stage or done < self._done:
            self._stage, self._start = stage, time.monotonic()
        self._done, self._total = done, total

    def line(self) -> str:
        """Return a line for people, empty before the first stage."""
        if not self._stage:
            return ""
        took = time.monotonic() - self._start
        # When all parts are done, what makes one of them may still run.
        counts = self._done < self._total > 1
        label = f"{self._stage} {self._done}/{self._total}" if counts else self._stage
        if not counts or not self._done:
            return f"{label} ... {took:.0f} s"
        left = took * (self._total - self._done) / self._done
        return f"{label} ... {took:.0f} s, about {left:.0f} s left"


@contextmanager
def updates() -> Iterator[Callable[[str, int, int], None]]:
    """Show how far a training is and how long it will take: a bar, or a line per stage."""
    from tpvprune.repairs.duration import TICKS  # with torch, which most commands wait for later

    shown = _bar(unit="update")
    start, stage, first, last = time.monotonic(), "", 0, (0, 0)

    def report() -> None:
        done, total = last
        took = time.monotonic() - start
        left = took * (total - done) / (done - first)
        say(f"{stage}: {took:.0f} s, about {left:.0f} s left")

    def name(running: str, done: int, total: int) -> None:
        nonlocal start, stage, first, last
        if running != stage:
            if stage and shown.disable:
                report()
            if not stage:
                # A run that goes on does not begin at 0.
                start, first = time.monotonic(), done - 1
                shown.reset(total)
                if total == TICKS:  # parts of the minutes: their numbers tell nothing
                    shown.bar_format = "{l_bar}{bar}| {elapsed}<{remaining}"
                shown.initial = shown.n = first
            stage = running
            shown.set_description(stage, refresh=False)
        shown.update(done - shown.n)
        last = done, total

    with shown:
        yield name
    if stage and not sys.stderr.isatty():
        report()


def table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text, the first column to the left, the others to the right.

    Names take several lines where one would make the table too wide.
    """
    longest, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = max(_SHORTEST_NAME, _WIDTH - sum(width + 2 for width in widths))
    longest = min(longest, room)
    for name, *values in rows:
        wrapped = textwrap.wrap(name, longest, subsequent_indent="  ") if name else [""]
        cells = [cell.rjust(width) for cell, width in zip(values, widths, strict=True)]
        lines = [*wrapped[:-1], "  ".join([wrapped[-1].ljust(longest), *cells])]
        print("\n".join(map(str.rstrip, lines)), file=sys.stderr)


def before_after(dense: Mapping[str, Any] | None, pruned: Mapping[str, Any]) -> None:
    """Print costs and quality of two models side by side, or of one; what is None is left out."""
    sides = [pruned] if dense is None else [dense, pruned]

    def by_turns(*_: float) -> str:
        return f"{share_of(pruned, dense or {}, 'latency_ms'):.3f}"

    lines: list[tuple[str, str, Callable[[Any], str], Callable[[Any, Any], str]]] = [
        *((key, name, short, _ratio) for key, name in cost_labels(*sides).items()),
        ("latency_ms", _latency_label(pruned), "{:.2f} ms".format, by_turns),
        *((key, name, percent, _points) for key, name in (("top1", "top-1"), ("top5", "top-5"))),
        ("agreement", "agreement", percent, lambda *_: ""),
    ]
    rows: list[Sequence[str]] = [] if dense is None else [("", "dense", "pruned", "ratio")]
    for key, name, write, compared in lines:
        if pruned.get(key) is not None:
            values = [side[key] for side in sides]
            rows.append((name, *map(write, values), *([compared(*values)] if values[1:] else [])))
    table(rows)
    _say_spread(pruned, dense=dense)


def _ratio(before: float, after: float) -> str:
    return f"{after / before:.3f}"


def _points(before: float, after: float) -> str:
    return f"{100 * (after - before):+.2f} points"


def _latency_label(side: Mapping[str, Any]) -> str:
    runtime = side.get("latency_runtime") or "eager"
    where = "" if runtime == "eager" else f", {runtime}"
    return f"latency, {counted(side.get('latency_batch_size') or 1, 'image')}{where}"


def _say_spread(side: Mapping[str, Any], *, dense: Mapping[str, Any] | None = None) -> None:
    """Say between what milliseconds the calls lay."""
    sides = {"": side} if dense is None else {" dense": dense, " pruned": side}
    ranges = {name: one.get("latency_range_ms") for name, one in sides.items()}
    spread = ", ".join(f"{r[0]:.2f} to {r[1]:.2f} ms{name}" for name, r in ranges.items() if r)
    if spread:
        turns = "" if dense is None else "; ratio: median over turns"
        say(f"latency: median, {side['latency_device']}; quartiles {spread}{turns}")


def blocked_lines(blocked: Sequence[Mapping[str, Any]]) -> None:
    """Print how many groups stay whole, one line per reason."""
    named: dict[str, list[str]] = {}
    for group in blocked:
        # The line begins with the name already.
        reason = str(group["reason"]).removeprefix(f"{group['name']} is ")
        named.setdefault(reason, []).append(group["name"])
    for reason, names in sorted(named.items(), key=lambda of_one: -len(of_one[1])):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"left whole: {names[0]}{more}: {reason}", indent="  ")


def show_pruned(document: Mapping[str, Any]) -> None:
    """Print what pruning did and what it cost."""
    _say_outcome(
        document,
        f"{document['model']}: keep {document['keep']:g} of {document['of']}, criterion "
        f"{document['criterion']}, repair {document.get('repair_chosen') or document['repair']}",
    )
    if document.get("speed"):
        speed_line(document["speed"])
    if line := outcome.branches(document):
        say(line)
    blocked_lines(document["blocked"])
    if "training" in document:
        trained_line(document["training"])
    images = document["images"]
    used = (
        "LABELS WERE USED to choose channels, or before"
        if document["used_labels"]
        else "no label was used"
    )
    on = "" if document["pruned"].get("agreement") is None else "; agreement measured on "
    on = on and on + images["agreement_on"]
    say(f"{counted(images['num_images'], 'image')}, {used}{on}")
    if line := outcome.images_used(document):
        say(line)
    for line in outcome.quality(document):
        say(line, indent="  ")
    if not (document["reached"] or document.get("quality")):
        of, speed = document["of"], document.get("speed")
        left = speed["ratio"] if speed else document["pruned"][of] / document["dense"][of]
        say(f"budget not reached: {percent(left)} of {of} are left; the best effort is saved")
    _saved(document)


def _saved(document: Mapping[str, Any]) -> None:
    """Say where the folder is, and what can be done with it."""
    say(f"saved: {document['output']}")
    say("open its report.html; next: tpvprune export makes a file to deploy", indent="  ")


def show_trained(document: Mapping[str, Any]) -> None:
    """Print what training a pruned model did."""
    training = document["training"]
    length = length_of(training["epochs"], training.get("minutes"))
    _say_outcome(
        document,
        f"{document['model']}: {length}, peak rate {training['lr']:g}, on "
        + (counted(training["num_images"], "image") if training["num_images"] else "a stream"),
    )
    trained_line(training)
    if (num := document["pruned"].get("num_images")) is not None:
        say(f"top-1 of {counted(int(num), 'labelled image')}")
    _saved(document)


def _say_outcome(document: Mapping[str, Any], head: str) -> None:
    """Print a line if the model is broken, the head, what else to know, the table and its proof."""
    if line := outcome.broken(document):
        say(line)
    say(head)
    for line in outcome.warnings(document):
        say(line, indent="  ")
    before_after(document["dense"], document["pruned"])
    if line := outcome.held_back(document):
        say(line)


def speed_line(speed: Mapping[str, Any]) -> None:
    """Print what the clock, or a table, says of both models."""
    if not speed["rounds"]:
        say(
            f"by the table of {speed['device']}: {speed['dense_ms']:.2f} ms dense, "
            f"{speed['pruned_ms']:.2f} ms pruned, ratio {speed['ratio']:.3f}; nothing was timed "
            "here"
        )
        return
    say(
        f"timed by turns, {counted(speed['batch_size'], 'image')} a call, {speed['runtime']}: "
        f"{speed['dense_ms']:.2f} ms dense, "
        f"{speed['pruned_ms']:.2f} ms pruned, ratio {speed['ratio']:.3f} (quartiles "
        f"{speed['ratio_low']:.3f} to {speed['ratio_high']:.3f} of {speed['rounds']} rounds)"
    )


def trained_line(training: Mapping[str, Any]) -> None:
    """Print how much closer training brought the outputs, and whether labels were used."""
    used = "LABELS WERE USED to train" if training["used_labels"] else "no label was used to train"
    before, after = training["before"], training["after"]
    decided = ""
    if training.get("decided_by") == "divergence":
        decided = (
            f"divergence of the classes, which decides, {before['divergence']:.4g} before, "
            f"{after['divergence']:.4g} after, "
        )
    shares = "".join(
        f", {name} {percent(before[key])} before, {percent(after[key])} after"
        for key, name in (("agreement", "agreement"), ("top1", "top-1 by --eval-dir"))
        if before.get(key) is not None and after.get(key) is not None
    )
    varied = (
        f"output variance, of the dense model's own, {before['variance_share']:.3g} before, "
        f"{after['variance_share']:.3g} after"
    )
    on = counted(training["num_held_back"], "held-back image")
    say(f"{used}; {on}: {decided}{varied}{shares}")
    if training["saved"] == "start":
        say(
            "note: training took the model further from its teacher, so the weights it began "
            "with are saved: try more images or a lower --lr"
        )
    elif training["fraction"] < 1:
        by = "divergence of the classes" if decided else "output variance"
        say(
            f"note: saved are the weights {training['fraction']:g} of the way from those it began "
            f"with to those it ended with, which are closest to the teacher by the {by}: a lower "
            "--lr or more images may bring more"
        )


def show_evaluated(document: Mapping[str, Any]) -> None:
    """Print the costs and the quality of one model, beside those of the dense one if known."""
    before_after(document["dense"], document)
    for line in outcome.warnings(document):
        say(line)
    if document["dense"] is None and document["top1"] is None:
        say(
            "only costs were measured: top-1 needs one subfolder per class of the model, "
            "agreement needs --dense F, the weights that a saved pruned model came from"
        )


def short(count: float) -> str:
    """Return a count in three digits with its unit.

    Example:
        >>> short(125_485_706)
        '125 M'
        >>> short(853_018)
        '853 k'
    """
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= factor:
            scaled = count / factor
            return f"{scaled:.{max(0, 2 - len(str(int(scaled))) + 1)}f}{unit}"
    return f"{count:.0f}"


def length_of(epochs: int | None, minutes: float | None) -> str:
    """Return how long a training is, of which one of the two is known."""
    if epochs is not None:
        return counted(epochs, "epoch")
    return f"{minutes:g} minute" + ("" if minutes == 1 else "s")


def counted(num: int, what: str) -> str:
    """Return a number with its noun, as 1 epoch and 2 epochs."""
    return f"{num} {what}" + ("" if num == 1 else "s")


def percent(fraction: float) -> str:
    """Return a fraction as text, as 93.39 %."""
    return f"{100 * fraction:.2f} %"
