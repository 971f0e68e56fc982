"""Published figures from a CSV, to stand beside one's own."""

import csv
import dataclasses
import re
from collections.abc import Mapping, Sequence

from uld_jax.errors import UserError
from uld_jax.evaluation.scores import METRICS
from uld_jax.files import AnyPath

_KEYS = ("kind", "student", "dataset", "teacher", "distil_factor", "data_fraction")
# Metric to column.
_COLUMNS = {**{name: name for name in METRICS}, "bertscore": "f1_bert"}


@dataclasses.dataclass(frozen=True)
class Published:
    """The scores of one published model.

    Attributes:
        student: The last part of its name.
        teacher: Likewise; empty for a model as it is, of which no student was made.
        dataset: Name of the data set.
        uld_weight: λ; 0 for text distillation, and without a teacher.
        fraction: Share of the training data; 0 without a teacher.
        scores: metric -> percent, of `METRICS` and "bertscore" those that are given.
        shots: Worked examples in its prompts; None where the file does not say.
    """

    student: str
    teacher: str
    dataset: str
    uld_weight: float
    fraction: float
    scores: dict[str, float]
    shots: int | None = None


def read_published(path: AnyPath) -> list[Published]:
    r"""Reads published scores of distilled students, and of models that are not.

    Args:
        path: A CSV with the columns kind, student, dataset, teacher, distil_factor, data_fraction
            and one for each metric, f1_bert for BERTScore; few_shot may be there. A row of kind
            "original" is of a teacher, or of a student before it is distilled, named as student.
            Rows of another kind than that or "distilled" are left alone.

    Returns:
        A record a row.

    Raises:
        UserError: There is no such file, a column is missing, or a number is none.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "scores.csv"
        >>> head = "kind,student,dataset,teacher,distil_factor,data_fraction,f1"
        >>> _ = path.write_text(f"{head}\ndistilled,s,squad,t,1.5,1.0,70.5\n")
        >>> read_published(path)[0].scores
        {'f1': 70.5}
    """
    if not path.is_file():
        raise UserError(f"--published={path}: no such file, expected a CSV of scores")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _KEYS if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(
                f"{path}:1: columns {', '.join(missing)} are missing, expected {', '.join(_KEYS)} "
                f"and metrics such as {METRICS[0]}"
            )
        found = []
        for row in reader:
            if row["kind"] not in ("distilled", "original"):
                continue
            try:
                found.append(_record(row))
            except ValueError as error:
                raise UserError(f"{path}:{reader.line_num}: expected numbers: {error}") from error
    return found


def _record(row: Mapping[str, str]) -> Published:
    scores = {name: float(row[key]) for name, key in _COLUMNS.items() if row.get(key)}
    shots = int(row["few_shot"]) if row.get("few_shot") else None
    teacher, weight, fraction = "", 0.0, 0.0
    if row["kind"] == "distilled":
        teacher = row["teacher"]
        weight, fraction = float(row["distil_factor"]), float(row["data_fraction"])
    return Published(row["student"], teacher, row["dataset"], weight, fraction, scores, shots)


def find_published(
    records: Sequence[Published],
    *,
    student: str,
    source: str,
    teacher: str = "",
    uld_weight: float = 0.0,
) -> Published | None:
    """The record of a pair that had all of a data set, or of one model as it is.

    Args:
        records: See `read_published`.
        student: Its source; the last part of the path counts.
        source: The data set, as in the config: its name, or a part of its path, must be the
            published name.
        teacher: As student; empty for a model as it is.
        uld_weight: λ.

    Returns:
        The record, or None where nothing was published.

    Raises:
        UserError: There are several.

    Example:
        >>> record = Published("opt-350m", "Llama-2-7b-chat-hf", "pubmed_qa", 1.5, 1.0, {})
        >>> found = find_published(
        ...     [record], student="facebook/opt-350m", teacher="meta-llama/Llama-2-7b-chat-hf",
        ...     source="tfds:pubmed_qa", uld_weight=1.5)
        >>> found is record
        True
    """
    # A data set of the paper is named by itself, as in "squad"; others follow a scheme.
    scheme, _, path = source.partition(":")
    parts = {_plain(part.partition(".")[0]) for part in (path or scheme).split("/")}
    fraction = 1.0 if teacher else 0.0
    found = [
        record
        for record in records
        if (record.uld_weight, record.fraction) == (uld_weight, fraction)
        and _last(record.student) == _last(student)
        and _last(record.teacher) == _last(teacher)
        and _plain(record.dataset) in parts
    ]
    if len(found) > 1:
        of = f"{found[0].teacher}, λ {uld_weight:g}" if teacher else "original"
        raise UserError(
            f"--published: {found[0].student}, {found[0].dataset}, {of} is there {len(found)} "
            "times, expected once"
        )
    return found[0] if found else None


def _last(name: str) -> str:
    return _plain(name.rstrip("/").rpartition("/")[2])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
