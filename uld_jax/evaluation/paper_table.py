"""Text distillation beside ULD, as the paper's tables have it."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from uld_jax.evaluation.scores import METRICS

Metrics = Mapping[str, Mapping[str, float]]

COLUMNS = (
    "teacher",
    "student",
    "data",
    "uld_weight",
    "other_settings",
    "seeds",
    "examples",
    "metric",
    "text_distillation",
    "uld",
    "difference",
    "low",
    "high",
    "p",
    "differences_by_seed",
    "published_text_distillation",
    "published_uld",
    "published_difference",
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One pair on one data set: runs without ULD and runs with it, of the same seeds.

    Attributes:
        teacher: Its name.
        student: Its name.
        data: Name of the data set.
        uld_weight: λ of the runs with ULD.
        other_settings: In what else their loss is not the default, "" for nothing.
        seeds: How many seeds each mean is over.
        examples: How many examples.
        metrics: What `compare` says of the means over seeds, ULD against text distillation.
        by_seed: metric -> difference for each seed.
        published: metric -> text distillation and ULD; empty where nothing was published.
    """

    teacher: str
    student: str
    data: str
    uld_weight: float
    other_settings: str
    seeds: int
    examples: int
    metrics: Metrics
    by_seed: Mapping[str, Sequence[float]]
    published: Mapping[str, tuple[float, float]]

    @property
    def name(self) -> str:
        """Of the runs with ULD, for a row or a label."""
        return f"λ {self.uld_weight:g}" + (
            f", {self.other_settings}" if self.other_settings else ""
        )


def to_markdown(lines: Sequence[Line], *, metric: str, confidence: float) -> str:
    """The paper's layout, a column a data set, and below it every figure.

    Args:
        lines: What was compared.
        metric: Shown in the first table.
        confidence: Of the intervals.

    Returns:
        Markdown.
    """
    data = list(dict.fromkeys(line.data for line in lines))
    own: dict[tuple[str, str, str], dict[str, str]] = {}
    published: dict[tuple[str, str, str], dict[str, str]] = {}
    for line in lines:
        key = (line.teacher, line.student, line.name)
        own.setdefault(key, {})[line.data] = _cell(line.metrics[metric])
        if metric in line.published:
            text, uld = line.published[metric]
            published.setdefault(key, {})[line.data] = f"{text:.2f} → {uld:.2f} ({uld - text:+.2f})"
    interval = f"{100 * confidence:g} % interval"
    parts = [
        f"# Text distillation → ULD: {metric}, percent\n",
        f"In brackets the difference and its {interval}.\n",
        _row("teacher", "student", "", *data),
        _row(*("---" for _ in range(3 + len(data)))),
    ]
    for key, cells in own.items():
        parts.append(_row(*key, *(cells.get(name, "") for name in data)))
        if key in published:
            parts.append(_row("", "", "published", *(published[key].get(n, "") for n in data)))
    parts += [
        "\n## Every metric\n",
        _row(
            *("teacher", "student", "data", "loss", "seeds", "metric", "text → ULD"),
            *("difference", interval, "p", "published"),
        ),
        _row(*("---" for _ in range(11))),
    ]
    for line in lines:
        for name, x in line.metrics.items():
            text, uld = line.published.get(name, (None, None))
            parts.append(
                _row(
                    *(line.teacher, line.student, line.data, line.name, str(line.seeds), name),
                    f"{x['other']:.2f} → {x['this']:.2f}",
                    f"{x['difference']:+.2f}",
                    f"{x['low']:+.2f} to {x['high']:+.2f}",
                    f"{x['p']:.4f}",
                    "" if text is None or uld is None else f"{text:.2f} → {uld:.2f}",
                )
            )
    parts.append(
        "\nEach example's scores are averaged over seeds; intervals (percentile bootstrap) and p "
        "(two-sided sign-flip permutation test) are over examples. So they say how sure the "
        "difference is for these seeds, not what others would give.\n"
    )
    return "\n".join(parts)


def to_csv(lines: Sequence[Line]) -> str:
    """Every figure, a row a metric.

    Args:
        lines: What was compared.

    Returns:
        CSV with the columns `COLUMNS`; numbers in full, published ones empty where there are none.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in lines:
        for name, x in line.metrics.items():
            by_seed = " ".join(f"{value:.6g}" for value in line.by_seed[name])
            published = line.published.get(name)
            beside = (
                ("", "", "") if published is None else (*published, published[1] - published[0])
            )
            writer.writerow(
                [
                    *(line.teacher, line.student, line.data, line.uld_weight, line.other_settings),
                    *(line.seeds, line.examples, name, x["other"], x["this"]),
                    *(x[key] for key in ("difference", "low", "high", "p")),
                    by_seed,
                    *beside,
                ]
            )
    return text.getvalue()


def plot_differences(lines: Sequence[Line], path: Path, *, metric: str = METRICS[0]) -> None:
    """Draw each difference with its interval, and the published one, as a PNG.

    Args:
        lines: What was compared.
        path: where to write.
        metric: Which.
    """
    # Imported here: see `plot_losses`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    for place, line in enumerate(lines):
        x = line.metrics[metric]
        axes.plot([x["low"], x["high"]], [place, place], color="#0072b2", lw=2)
        axes.plot(x["difference"], place, "o", color="#0072b2", label="here" if not place else None)
        if metric in line.published:
            text, uld = line.published[metric]
            axes.plot(uld - text, place, "D", color="#d55e00", mfc="none", label="published")
    names = [f"{line.teacher} → {line.student}\n{line.data}, {line.name}" for line in lines]
    axes.set_yticks(range(len(lines)), names, fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.axvline(0, color="#222222", ls="dashed", lw=1)
    axes.set_xlabel(f"{metric}: ULD − text distillation, points")
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def _cell(x: Mapping[str, float]) -> str:
    ends = f"{x['low']:+.2f} to {x['high']:+.2f}"
    return f"{x['other']:.2f} → {x['this']:.2f} ({x['difference']:+.2f}, {ends})"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
