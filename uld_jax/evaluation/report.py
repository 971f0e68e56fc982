"""Tables and a plot that show what a run has changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from uld_jax.evaluation.calibration import Reliability
from uld_jax.evaluation.scores import METRICS

# Key in a line of metrics, name in the legend, colour (told apart by colour-blind readers), style.
_CURVES = (
    ("total", "total loss", "#222222", "solid"),
    ("cross_entropy", "cross-entropy", "#0072b2", "dashed"),
)
_DISTANCE = ("#d55e00", "solid")
_DOTS_PER_INCH = 150
_FEW_POINTS = 40


def comparison_table(
    before: Mapping[str, float], after: Mapping[str, float], *, names: Sequence[str] = METRICS
) -> Table:
    """Show scores before and after training side by side.

    Args:
        before: metric -> percent, as `score` returns them.
        after: the same metrics.
        names: the metrics to show, in this order.

    Returns:
        A table with a row a metric: its name, before, after, and the change in points.

    Example:
        >>> table = comparison_table({"f1": 11.0}, {"f1": 28.5}, names=("f1",))
        >>> [str(next(column.cells)) for column in table.columns]
        ['f1', '11.00', '28.50', '+17.50']
    """
    table = Table("metric", box=box.SIMPLE)
    for header in ("before", "after", "change"):
        table.add_column(header, justify="right")
    for name in names:
        change = after[name] - before[name]
        table.add_row(Text(name), f"{before[name]:.2f}", f"{after[name]:.2f}", f"{change:+.2f}")
    return table


def sample_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Show answers before and after training beside the question and its reference.

    Args:
        rows: each with the keys question, reference, before and after.

    Returns:
        A table with a row an example; the texts are shown as they are, rich markup included.

    Example:
        >>> row = {"question": "2 + 2?", "reference": "4", "before": "22", "after": "4"}
        >>> sample_table([row]).row_count
        1
    """
    columns = ("question", "reference", "before", "after")
    table = Table(box=box.SIMPLE, show_lines=True)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[name]) for name in columns))
    return table


def plot_losses(
    metrics: Sequence[Mapping[str, float]], path: Path, *, distance: str = "uld"
) -> None:
    """Draw total loss, cross-entropy and distance against the step, as a PNG 1200 pixels wide.

    Args:
        metrics: lines of metrics; those with the keys step, total, cross_entropy and `distance`
            count.
        path: where to write.
        distance: the key of the distance from the teacher.

    Raises:
        ValueError: no line has these keys.

    Example:
        >>> import tempfile
        >>> line = {"step": 1, "total": 3.5, "cross_entropy": 2.0, "uld": 1.0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_losses([line], Path(folder) / "losses.png")
    """
    # Imported here: it looks through the system's fonts and writes a cache of them.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = (*_CURVES, (distance, f"{distance.upper()} distance", *_DISTANCE))
    keys = {"step", *(key for key, *_ in curves)}
    lines = [line for line in metrics if line.keys() >= keys]
    if not lines:
        raise ValueError(f"expected lines of metrics with {', '.join(sorted(keys))}, got none")
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(1200 / _DOTS_PER_INCH, 720 / _DOTS_PER_INCH), layout="constrained")
    axes = figure.add_subplot()
    for key, label, colour, style in curves:
        marker = "o" if len(lines) <= _FEW_POINTS else ""
        values = [line[key] for line in lines]
        axes.plot(steps, values, label=label, color=colour, ls=style, lw=1.6, marker=marker, ms=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH)


def plot_reliability(models: Mapping[str, Reliability], path: Path) -> None:
    """Draw how often models are right against how sure they are, as a PNG, a panel a model.

    Args:
        models: name -> its bins.
        path: where to write.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from uld_jax.evaluation import reliability
        >>> bins = reliability(np.array([0.2, 0.9]), np.array([False, True]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_reliability({"student": bins}, Path(folder) / "reliability.png")
    """
    # Imported here: see `plot_losses`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(models), 4.4), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, (name, bins) in zip(panels, models.items(), strict=True):
        width, used = 1 / len(bins.count), bins.count > 0
        centres = (width * (0.5 + i) for i in range(len(bins.count)))
        places = [x for x, there in zip(centres, used, strict=True) if there]
        axes.bar(places, bins.accuracy[used], width=width, color="#0072b2", ec="white", lw=0.5)
        axes.plot(bins.confidence[used], bins.accuracy[used], "o", color="#d55e00", ms=3)
        axes.plot([0, 1], [0, 1], color="#222222", ls="dashed", lw=1)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        tokens = f"{bins.count.sum():,} tokens"
        axes.set_title(f"{name}: ECE {100 * bins.expected_error:.2f} %, {tokens}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH)
