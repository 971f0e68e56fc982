"""What was measured, as pictures."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uld_jax.benchmark.report import case_title, vocabularies

__all__ = ["plot_level_set", "plot_losses"]

_DOTS_PER_INCH = 150
# Colours that colour-blind readers tell apart; a new method takes the next that is left.
_COLOURS = {
    "auto": "#009e73",
    "sort": "#0072b2",
    "level_set": "#56b4e9",
    "jnp.sort": "#e69f00",
    "softmax": "#bbbbbb",
    "pytorch": "#d55e00",
    "pytorch_1": "#cc79a7",
}
_MORE_COLOURS = ("#f0e442", "#222222", "#8c6d31")


def plot_losses(cases: Sequence[Mapping[str, Any]], note: str, path: Path) -> None:
    """Draw bars of milliseconds a position, one panel for each pair of vocabularies.

    A bar is forward and backward, the line across it forward alone; a candidate that ran out of
    memory has none.

    Args:
        cases: as `losses.measure` returns them.
        note: a line below the panels.
        path: where to write the PNG; it is whole or absent.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    names = list(dict.fromkeys(name for case in cases for name in case["candidates"]))
    unnamed = [name for name in names if name not in _COLOURS]
    colours = _COLOURS | dict(zip(unnamed, _MORE_COLOURS * len(unnamed), strict=False))
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        panels.setdefault(vocabularies(case), []).append(case)
    figure = Figure(figsize=(9, 0.9 + 2.7 * len(panels)), layout="constrained")
    for axes, (title, own) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        for place, name in enumerate(names):
            _draw_bars(axes, own, name, colours[name], (place + 0.5) / len(names) - 0.5)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yscale("log")
        axes.margins(y=0.2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("ms / position")
        labels = [f"{case['positions']:,} position{'s' * (case['positions'] != 1)}" for case in own]
        axes.set_xticks(range(len(own)), labels)
        axes.tick_params(axis="x", length=0)
        _tidy(axes)
    figure.legend(
        list(figure.axes[0].get_legend_handles_labels()[0]),
        names,
        loc="outside upper center",
        ncols=len(names),
        frameon=False,
        fontsize=9,
    )
    figure.supxlabel(
        f"bar: forward + backward, line: forward alone, medians\n{note}",
        fontsize=7,
        color="#555555",
    )
    _write(figure, path)


def _draw_bars(
    axes: Any, cases: Sequence[Mapping[str, Any]], name: str, colour: str, shift: float
) -> None:
    """One candidate's bars, one a case; `shift` is its place in the group, from −½ to ½."""
    width = 0.86 / max(len(case["candidates"]) for case in cases)
    results = [case["candidates"][name] for case in cases]
    whole = [result["forward_backward"].get("median_ms", float("nan")) for result in results]
    alone = [result["forward"].get("median_ms", float("nan")) for result in results]
    at = [group + 0.86 * shift for group in range(len(cases))]
    bars = axes.bar(at, whole, 0.94 * width, color=colour, label=name)
    labels = ["" if x != x else f"{x:.3g}" for x in whole]
    axes.bar_label(bars, labels, rotation=90, padding=3, fontsize=7)
    half = 0.42 * width
    axes.hlines(alone, [x - half for x in at], [x + half for x in at], color="white", lw=1.2)


def plot_level_set(cases: Sequence[Mapping[str, Any]], note: str, path: Path) -> None:
    """Draw error and time by the bits of a bucket, a row of two panels a case.

    Args:
        cases: as `level_set.measure` returns them.
        note: a line below the panels.
        path: where to write the PNG; it is whole or absent.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 + 3 * len(cases)), layout="constrained")
    for row, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        curve = case["curve"]
        bits = [point["bucket_bits"] for point in curve]
        for key, label, colour, style in (
            ("mean_bound", "mean certified bound", "#222222", "dashed"),
            ("max_error", "largest error", "#d55e00", "solid"),
            ("mean_error", "mean error", "#0072b2", "solid"),
        ):
            values = [point.get(key, float("nan")) for point in curve]
            row[0].plot(bits, values, label=label, color=colour, ls=style, marker="o", ms=3)
        for key, label, colour in (
            ("forward_backward", "forward + backward", "#0072b2"),
            ("forward", "forward", "#56b4e9"),
        ):
            values = [point[key].get("median_ms", float("nan")) for point in curve]
            row[1].plot(bits, values, label=label, color=colour, marker="o", ms=3)
            exact = case["sort"][key].get("median_ms", float("nan"))
            row[1].axhline(exact, color=colour, ls="dotted", label=f"sort, {label}")
        row[0].set_ylabel("absolute error")
        row[1].set_ylabel("ms / position")
        row[0].set_title(case_title(case), loc="left", fontsize=10)
        for axes in row:
            axes.set_yscale("log")
            axes.set_xticks(bits)
            axes.set_xlabel("bucket bits")
            axes.legend(frameon=False, fontsize=8)
            _tidy(axes)
    figure.supxlabel(note, fontsize=7, color="#555555")
    _write(figure, path)


def _tidy(axes: Any) -> None:
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Any, path: Path) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(scratch, format="png", dpi=_DOTS_PER_INCH)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
