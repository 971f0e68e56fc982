"""Published figures from a CSV, to stand beside one's own."""

import csv
import dataclasses
import re
from collections.abc import Sequence

from uld_jax.errors import UserError
from uld_jax.evaluation.scores import METRICS
from uld_jax.files import AnyPath

_KEYS = ("kind", "student", "dataset", "teacher", "distil_factor", "data_fraction")


@dataclasses.dataclass(frozen=True)
class Published:
    """The scores of one published student.

    Attributes:
        student: The last part of its name.
        teacher: Likewise.
        dataset: Name of the data set.
        uld_weight: λ; 0 for text distillation.
        fraction: Share of the training data.
        scores: metric -> percent, of `METRICS` those that are given.
    """

    student: str
    teacher: str
    dataset: str
    uld_weight: float
    fraction: float
    scores: dict[str, float]


def read_published(path: AnyPath) -> list[Published]:
    r"""Reads published scores of distilled students.

    Args:
        path: A CSV with the columns kind, student, dataset, teacher, distil_factor, data_fraction
            and one for each metric; rows of another kind than "distilled" are left alone.

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
            if row["kind"] != "distilled":
                continue
            try:
                scores = {name: float(row[name]) for name in METRICS if row.get(name)}
                weight, fraction = float(row["distil_factor"]), float(row["data_fraction"])
            except ValueError as error:
                raise UserError(f"{path}:{reader.line_num}: expected numbers: {error}") from error
            names = row["student"], row["teacher"], row["dataset"]
            found.append(Published(*names, weight, fraction, scores))
    return found


def find_published(
    records: Sequence[Published], *, student: str, teacher: str, source: str, uld_weight: float
) -> Published | None:
    """The record of a pair on all of a data set.

    Args:
        records: See `read_published`.
        student: Its source; the last part of the path counts.
        teacher: Likewise.
        source: The data set, as in the config: a part of its path must be the published name.
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
    parts = {_plain(part.partition(".")[0]) for part in source.partition(":")[2].split("/")}
    found = [
        record
        for record in records
        if (record.uld_weight, record.fraction) == (uld_weight, 1.0)
        and _last(record.student) == _last(student)
        and _last(record.teacher) == _last(teacher)
        and _plain(record.dataset) in parts
    ]
    if len(found) > 1:
        raise UserError(
            f"--published: {found[0].student}, {found[0].teacher}, {found[0].dataset}, λ "
            f"{uld_weight:g} is there {len(found)} times, expected once"
        )
    return found[0] if found else None


def _last(name: str) -> str:
    return _plain(name.rstrip("/").rpartition("/")[2])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
