"""Text distillation beside ULD, the teacher and the student before, as the paper's tables are."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

Metrics = Mapping[str, Mapping[str, float]]

COLUMNS: tuple[str, ...] = (
    "kind",
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
    "shots",
    "score",
    "score_low",
    "score_high",
    "published_score",
    "published_shots",
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

    def published_cell(self, metric: str) -> str:
        """What was published, with its difference; empty where nothing was."""
        if metric not in self.published:
            return ""
        text, uld = self.published[metric]
        return f"{text:.2f} → {uld:.2f} ({uld - text:+.2f})"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A model as it is, on one data set.

    Attributes:
        kind: "teacher", or "undistilled" for a student before training.
        model: Its name.
        data: Name of the data set.
        shots: Worked examples in its prompts; None where that is not known.
        examples: How many examples.
        scores: metric -> percent.
        intervals: metric -> low and high.
        published: metric -> percent; empty where nothing was published.
        published_shots: Of the published one; None where that is not known.
    """

    kind: str
    model: str
    data: str
    shots: int | None
    examples: int
    scores: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]
    published: Mapping[str, float]
    published_shots: int | None = None

    @property
    def name(self) -> str:
        """For a row or a label."""
        return self.kind + _shots(self.shots)

    def published_cell(self, metric: str) -> str:
        """What was published, and with how many shots; empty where nothing was."""
        if metric not in self.published:
            return ""
        return f"{self.published[metric]:.2f}" + _shots(self.published_shots)


@dataclasses.dataclass
class _PaperRow:
    """A row of the first table, and the published one below it, by data set."""

    key: tuple[str, str, str]
    cells: dict[str, str] = dataclasses.field(default_factory=dict)
    published: dict[str, str] = dataclasses.field(default_factory=dict)

    def markdown(self, data: Sequence[str]) -> list[str]:
        parts = [_row(*self.key, *(self.cells.get(name, "") for name in data))]
        if self.published:
            parts.append(
                _row("", "", "published", *(self.published.get(name, "") for name in data))
            )
        return parts


def to_markdown(
    lines: Sequence[Line],
    baselines: Sequence[Baseline] = (),
    *,
    metric: str,
    confidence: float,
) -> str:
    """The paper's layout, a column a data set, and below it every figure.

    Args:
        lines: What was compared.
        baselines: Teachers and students as they are.
        metric: Shown in the first table.
        confidence: Of the intervals.

    Returns:
        Markdown.
    """
    data = list(dict.fromkeys(line.data for line in lines))
    interval = f"{100 * confidence:g} % interval"
    notes = [
        "\nEach example's scores are averaged over seeds; intervals (percentile bootstrap) and p "
        "(two-sided sign-flip permutation test) are over examples. So they say how sure the "
        "difference is for these seeds, not what others would give.\n"
    ]
    return "\n".join(
        [
            f"# Text distillation → ULD: {metric}, percent\n",
            f"In brackets the difference and its {interval}; of a teacher, and of a student before "
            "training, the interval alone.\n",
            *_header("teacher", "student", "", *data),
            *(part for row in _paper_rows(lines, baselines, metric) for part in row.markdown(data)),
            "\n## Every metric\n",
            *_every_metric(lines, interval),
            *(_baseline_table(baselines, interval) if baselines else ()),
            *notes,
        ]
    )


def _paper_rows(
    lines: Sequence[Line], baselines: Sequence[Baseline], metric: str
) -> list[_PaperRow]:
    """Students before training; then each teacher and, below it, its students."""
    rows: list[_PaperRow] = []

    def add(key: tuple[str, str, str], data: str, cell: str, published: str) -> None:
        # What differs in something that its key does not show has a row of its own.
        row = next((row for row in rows if row.key == key and data not in row.cells), None)
        if row is None:
            rows.append(row := _PaperRow(key))
        row.cells[data] = cell
        if published:
            row.published[data] = published

    def add_baseline(b: Baseline) -> None:
        key = (b.model, "", b.name) if b.kind == "teacher" else ("", b.model, b.name)
        low, high = b.intervals[metric]
        cell = f"{b.scores[metric]:.2f} ({low:.2f} to {high:.2f})"
        add(key, b.data, cell, b.published_cell(metric))

    for b in baselines:
        if b.kind != "teacher":
            add_baseline(b)
    for teacher in dict.fromkeys(line.teacher for line in lines):
        for b in baselines:
            if (b.kind, b.model) == ("teacher", teacher):
                add_baseline(b)
        for line in lines:
            if line.teacher == teacher:
                key = (line.teacher, line.student, line.name)
                published = line.published_cell(metric)
                add(key, line.data, _cell(line.metrics[metric]), published)
    return rows


def _every_metric(lines: Sequence[Line], interval: str) -> list[str]:
    parts = _header(
        *("teacher", "student", "data", "loss", "seeds", "metric", "text → ULD"),
        *("difference", interval, "p", "published"),
    )
    for line in lines:
        for name, x in line.metrics.items():
            parts.append(
                _row(
                    *(line.teacher, line.student, line.data, line.name, str(line.seeds), name),
                    f"{x['other']:.2f} → {x['this']:.2f}",
                    f"{x['difference']:+.2f}",
                    f"{x['low']:+.2f} to {x['high']:+.2f}",
                    f"{x['p']:.4f}",
                    line.published_cell(name),
                )
            )
    return parts


def _baseline_table(baselines: Sequence[Baseline], interval: str) -> list[str]:
    parts = [
        "\n## Teachers, and students before training\n",
        *_header("model", "", "data", "examples", "metric", "score", interval, "published"),
    ]
    for b in baselines:
        for name, value in b.scores.items():
            low, high = b.intervals[name]
            parts.append(
                _row(
                    *(b.model, b.name, b.data, str(b.examples), name, f"{value:.2f}"),
                    f"{low:.2f} to {high:.2f}",
                    b.published_cell(name),
                )
            )
    return parts


def to_csv(lines: Sequence[Line], baselines: Sequence[Baseline] = ()) -> str:
    """Every figure, a row a metric.

    Args:
        lines: What was compared.
        baselines: Teachers and students as they are.

    Returns:
        CSV with the columns `COLUMNS`, of which those that a row of its kind ("distilled",
        "undistilled", "teacher") does not have are empty; numbers in full.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerows(_csv_row(line, name) for name in line.metrics)
    for baseline in baselines:
        writer.writerows(_baseline_csv_row(baseline, name) for name in baseline.scores)
    return text.getvalue()


def _csv_row(line: Line, metric: str) -> dict[str, Any]:
    x = line.metrics[metric]
    names = ("teacher", "student", "data", "uld_weight", "other_settings", "seeds", "examples")
    row = {name: getattr(line, name) for name in names}
    row |= {name: x[name] for name in ("difference", "low", "high", "p")}
    row |= {
        "kind": "distilled",
        "metric": metric,
        "text_distillation": x["other"],
        "uld": x["this"],
        "differences_by_seed": " ".join(f"{value:.6g}" for value in line.by_seed[metric]),
    }
    if metric in line.published:
        published, uld = line.published[metric]
        row |= {
            "published_text_distillation": published,
            "published_uld": uld,
            "published_difference": uld - published,
        }
    return row


def _baseline_csv_row(b: Baseline, metric: str) -> dict[str, Any]:
    row = {name: getattr(b, name) for name in ("kind", "data", "shots", "examples")}
    row |= {
        "teacher" if b.kind == "teacher" else "student": b.model,
        "metric": metric,
        "score": b.scores[metric],
    }
    row["score_low"], row["score_high"] = b.intervals[metric]
    if metric in b.published:
        row |= {"published_score": b.published[metric], "published_shots": b.published_shots}
    return row


def _shots(count: int | None) -> str:
    if count is None:
        return ""
    return f", {count} shot{'' if count == 1 else 's'}"


def _cell(x: Mapping[str, float]) -> str:
    ends = f"{x['low']:+.2f} to {x['high']:+.2f}"
    return f"{x['other']:.2f} → {x['this']:.2f} ({x['difference']:+.2f}, {ends})"


def _header(*cells: str) -> list[str]:
    return [_row(*cells), _row(*("---" for _ in cells))]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
