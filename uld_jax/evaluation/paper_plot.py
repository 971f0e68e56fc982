"""The differences of a paper's table as a picture."""

from collections.abc import Sequence
from pathlib import Path

from uld_jax.evaluation.paper_table import Baseline, Line
from uld_jax.evaluation.scores import METRICS

# Colour (told apart by colour-blind readers) and mark.
_MARKS = {"undistilled": ("#777777", "s"), "teacher": ("#009e73", "^")}


def plot_differences(
    lines: Sequence[Line],
    path: Path,
    baselines: Sequence[Baseline] = (),
    *,
    metric: str = METRICS[0],
) -> None:
    """Draw each difference with its interval, the published one, and the scores beside, as a PNG.

    Args:
        lines: What was compared.
        path: where to write.
        baselines: Teachers and students as they are.
        metric: Which.
    """
    # Imported here: see `plot_losses`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.9 + 0.5 * len(lines)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, line in enumerate(lines):
        x = line.metrics[metric]
        left.plot([x["low"], x["high"]], [place, place], color="#0072b2", lw=2)
        left.plot(x["difference"], place, "o", color="#0072b2", label="difference")
        if metric in line.published:
            text, uld = line.published[metric]
            left.plot(
                uld - text, place, "D", color="#d55e00", mfc="none", label="published difference"
            )
        right.axhline(place, color="#dddddd", lw=1, zorder=0)
        for name in ("undistilled", "teacher"):
            values = [b.scores[metric] for b in baselines if b.kind == name and _is_of(b, line)]
            colour, marker = _MARKS[name]
            right.plot(values, [place] * len(values), marker, color=colour, label=name)
        right.plot(x["other"], place, "o", color="#0072b2", mfc="none", label="text distillation")
        right.plot(x["this"], place, "o", color="#0072b2", label="ULD")
    names = [f"{line.teacher} → {line.student}\n{line.data}, {line.name}" for line in lines]
    left.set_yticks(range(len(lines)), names, fontsize=8)
    left.set_ylim(len(lines) - 0.5, -0.5)
    left.axvline(0, color="#222222", ls="dashed", lw=1)
    left.set_xlabel(f"{metric}: ULD − text distillation, points")
    right.set_xlabel(f"{metric}, percent")
    handles = {}
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        marks, labels = axes.get_legend_handles_labels()
        drawn = zip(labels, marks, strict=True)
        handles |= {label: mark for label, mark in drawn if len(mark.get_xdata())}
    below = {"loc": "outside lower center", "ncols": len(handles)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, **below)
    figure.savefig(path, format="png", dpi=150)


def _is_of(baseline: Baseline, line: Line) -> bool:
    model = line.teacher if baseline.kind == "teacher" else line.student
    return (baseline.model, baseline.data) == (model, line.data)
