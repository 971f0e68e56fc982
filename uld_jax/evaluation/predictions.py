"""Predictions in files: this package's own, and those in the form that the paper published."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from uld_jax.errors import UserError
from uld_jax.files import AnyPath

# The student's answers in the workdir of `uld-jax train`: before training and after it.
STAGES = {"before": "before.json", "after": "after.json"}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An answer and what it is compared with.

    Attributes:
        text: The answer.
        references: Accepted answers, at least one.
        id: Of the example; empty where the file has none.
        question: The question; empty where the file has none.
    """

    text: str
    references: tuple[str, ...]
    id: str = ""
    question: str = ""


def read_predictions(path: AnyPath, *, stage: str = "after") -> list[Prediction]:
    """Reads predictions from JSON lines or from the workdir of a run.

    A line is {"id", "question", "references", "prediction"}, of which `uld-jax evaluate` writes
    one an example, or {"answers", "prediction_text"}, where "answers" is a text, a list of texts
    or {"text": [...]}. Other fields are left alone.

    Args:
        path: Of the file, or of the workdir.
        stage: Which answers of a workdir, those "before" or "after" training.

    Returns:
        The predictions, in the order of the file.

    Raises:
        UserError: There is no such file, or a line is not as expected.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "predictions.jsonl"
        >>> _ = path.write_text(json.dumps({"answers": "Oslo", "prediction_text": "In Oslo"}))
        >>> read_predictions(path)
        [Prediction(text='In Oslo', references=('Oslo',), id='', question='')]
    """
    rows = _workdir_rows(path, stage) if path.is_dir() else json_rows(path)
    found = [prediction_of(record, where) for record, where in rows]
    if not found:
        raise UserError(f"{path}: expected at least one prediction, found none")
    seen: set[str] = set()
    for prediction in found:
        if prediction.id and prediction.id in seen:
            raise UserError(f"{path}: id {prediction.id!r} is there twice, expected each id once")
        seen.add(prediction.id)
    return found


def pair_predictions(
    these: Sequence[Prediction], others: Sequence[Prediction], *, names: tuple[str, str]
) -> list[tuple[Prediction, Prediction]]:
    """Puts two sets of answers to the same questions side by side.

    They are matched by id where all have one, else line by line.

    Args:
        these: The one set.
        others: The other.
        names: Of both, for people.

    Returns:
        The pairs, in the order of `these`.

    Raises:
        UserError: They are not about the same examples.

    Example:
        >>> a, b = Prediction("x", ("x",), "1"), Prediction("y", ("x",), "1")
        >>> [(one.text, other.text) for one, other in pair_predictions([a], [b], names=("a", "b"))]
        [('x', 'y')]
    """
    if all(p.id for p in (*these, *others)):
        by_id = {p.id: p for p in others}
        only = [p.id for p in these if p.id not in by_id]
        other_only = sorted(by_id.keys() - {p.id for p in these})
        for ids, name, absent in ((only, *names), (other_only, *names[::-1])):
            if ids:
                raise UserError(
                    f"{absent}: expected the same examples as {name}, which has {len(ids)} more, "
                    f"the first {ids[0]!r}: evaluate both on the same data"
                )
        pairs = [(p, by_id[p.id]) for p in these]
    elif len(these) != len(others):
        raise UserError(
            f"{names[1]}: expected the {len(these)} examples of {names[0]}, got {len(others)}: "
            "evaluate both on the same data"
        )
    else:
        pairs = list(zip(these, others, strict=True))
    for number, (p, other) in enumerate(pairs, start=1):
        if set(p.references) != set(other.references):
            which = repr(p.id) if p.id and other.id else f"number {number}"
            raise UserError(
                f"{names[1]}: example {which} has other references than in {names[0]}, "
                f"{other.references[0]!r} and {p.references[0]!r}: evaluate both on the same data"
            )
    return pairs


def json_rows(path: AnyPath) -> Iterator[tuple[Any, str]]:
    """Reads a file of predictions, a JSON value a line; blank lines are passed over.

    Args:
        path: Of the file.

    Yields:
        A value, and where it stands: path:line.

    Raises:
        UserError: There is no such file, or a line is not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected predictions as JSON lines: check the path")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield json.loads(line), where
            except ValueError as error:
                raise UserError(
                    f"{where}: not JSON, expected one prediction a line: {error}"
                ) from error


def _workdir_rows(path: AnyPath, stage: str) -> Iterator[tuple[Any, str]]:
    file = path / STAGES[stage]
    if not file.is_file():
        raise UserError(
            f"{file}: no such file, expected the answers {stage} training: let `uld-jax train "
            f"--workdir={path}` end, or give a predictions file"
        )
    try:
        answers = json.loads(file.read_bytes())["answers"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected JSON with the field 'answers': {error}") from error
    for number, record in enumerate(answers):
        yield record, f"{file}: answers[{number}]"


def prediction_of(record: Any, where: str) -> Prediction:
    """A line of a predictions file, see `read_predictions`.

    Args:
        record: The line's value.
        where: It stands, for errors.

    Returns:
        The prediction.

    Raises:
        UserError: It is not as expected.

    Example:
        >>> prediction_of({"prediction": "Oslo", "references": ["In Oslo"]}, "a.jsonl:1").text
        'Oslo'
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
    published = "prediction_text" in record
    text, references = ("prediction_text", "answers") if published else ("prediction", "references")
    for name in (text, references):
        if name not in record:
            raise UserError(
                f"{where}: field {name!r} is missing, found {sorted(record)}: expected "
                "'prediction' and 'references', or 'prediction_text' and 'answers'"
            )
    if not isinstance(record[text], str):
        raise UserError(
            f"{where}: field {text!r} must be a string, got {type(record[text]).__name__}"
        )
    golds = record[references]
    golds = golds.get("text") if isinstance(golds, dict) else golds
    golds = [golds] if isinstance(golds, str) else golds
    if not isinstance(golds, list) or not golds or not all(isinstance(g, str) for g in golds):
        raise UserError(
            f"{where}: field {references!r} must be a string, a list of at least one string or "
            f"{{'text': such a list}}, got {json.dumps(record[references])[:60]}"
        )
    identifier, question = (str(record.get(name, "")) for name in ("id", "question"))
    return Prediction(record[text], tuple(golds), identifier, question)
