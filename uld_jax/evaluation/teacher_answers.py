"""A teacher's answers to held-out questions, from `uld-jax generate`'s output or predictions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from uld_jax.data import load_examples, verify_answers
from uld_jax.errors import UserError
from uld_jax.evaluation.predictions import Prediction, json_rows, prediction_of
from uld_jax.files import AnyPath


@dataclasses.dataclass(frozen=True)
class TeacherAnswers:
    """Answers by example id, and whose they are where that is known.

    Attributes:
        predictions: By id. One without an answer is the empty text; question and references are
            empty where the file has none.
        model: The teacher's source; empty where the file does not say.
        shots: Worked examples in its prompts; None where the file does not say.
    """

    predictions: dict[str, Prediction]
    model: str = ""
    shots: int | None = None

    @property
    def unanswered(self) -> int:
        """How many questions have no answer."""
        return sum(not p.text for p in self.predictions.values())


def read_teacher_answers(path: AnyPath) -> TeacherAnswers:
    """Reads what a teacher answers to held-out questions.

    Args:
        path: A directory or a file of JSON lines that `uld-jax generate` has written with
            generate.split=eval, or predictions with ids (see `read_predictions`).

    Returns:
        The answers.

    Raises:
        UserError: There is none, it is damaged, or of training questions; a line is not as
            expected.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "answers.jsonl"
        >>> _ = path.write_text(json.dumps({"id": "7", "question": "Where?", "answer": "Oslo"}))
        >>> read_teacher_answers(path).predictions["7"].text
        'Oslo'
    """
    if path.is_dir():
        return _of_directory(path)
    found: dict[str, Prediction] = {}
    for record, where in json_rows(path):
        p = _of_line(record, where)
        if p.id in found:
            raise UserError(f"{where}: id {p.id!r} is there twice, expected each id once")
        found[p.id] = p
    if not found:
        raise UserError(f"{path}: expected at least one answer, found none")
    return TeacherAnswers(found)


def answered(answers: TeacherAnswers, asked: Sequence[Prediction]) -> list[Prediction] | str:
    """A teacher's answers to the questions that a student was asked, with their references.

    Args:
        answers: The teacher's.
        asked: The student's answers.

    Returns:
        The predictions, in the order of `asked`; or why they are not of these questions.

    Example:
        >>> student = [Prediction("a", ("x",), "1", "Where?")]
        >>> [p.references for p in answered(TeacherAnswers({"1": Prediction("b", ())}), student)]
        [('x',)]
        >>> answered(TeacherAnswers({"2": Prediction("b", ())}), student)
        "1 of 1 questions are not in it, the first '1'"
    """
    known = answers.predictions
    if missing := [p.id for p in asked if p.id not in known]:
        return f"{len(missing)} of {len(asked)} questions are not in it, the first {missing[0]!r}"
    ids = {p.id for p in asked}
    if more := [id_ for id_ in known if id_ not in ids]:
        return f"it has {len(more)} more questions, the first {more[0]!r}"
    for p in asked:
        other = known[p.id]
        if other.question and p.question and other.question != p.question:
            return f"in it question {p.id!r} is {other.question!r}, not {p.question!r}"
        if other.references and set(other.references) != set(p.references):
            return f"in it question {p.id!r} has other references, such as {other.references[0]!r}"
    return [dataclasses.replace(p, text=known[p.id].text) for p in asked]


def _of_directory(path: AnyPath) -> TeacherAnswers:
    manifest = verify_answers(path)
    if manifest["split"] != "eval" or manifest["samples"] != 1:
        raise UserError(
            f"{path}: expected one answer to each held-out question, got {manifest['samples']} to "
            f"each of the split {manifest['split']}: `uld-jax generate --config.generate.split=eval"
            " --config.generate.samples=1`"
        )
    reasons = [shard["dropped"] for shard in manifest["shards"]]
    found = {
        id_: Prediction("", (), id_)
        for dropped in reasons
        for ids in dropped.values()
        for id_ in ids
    }
    for e in load_examples(f"generated:{path}", "eval"):
        found[e.id] = Prediction(e.answers[0], (), e.id, e.question)
    provenance = manifest["provenance"]
    return TeacherAnswers(found, provenance["model"], provenance["shots"])


def _of_line(record: Any, where: str) -> Prediction:
    """A line of `uld-jax generate` or of a predictions file."""
    if not isinstance(record, dict) or not record.keys() & {"answer", "completion", "messages"}:
        p = prediction_of(record, where)
    else:
        question = record.get("question", record.get("prompt", ""))
        p = Prediction(_answer_of(record, where), (), str(record.get("id", "")), question)
    if not p.id:
        raise UserError(f"{where}: field 'id' is missing, expected that of the question")
    return p


def _answer_of(record: dict[str, Any], where: str) -> str:
    answer = record.get("answer", record.get("completion"))
    if answer is None:
        messages = record["messages"]
        last = messages[-1] if isinstance(messages, list) and messages else None
        answer = last.get("content") if isinstance(last, dict) else None
    if not isinstance(answer, str):
        raise UserError(
            f"{where}: expected the answer as a string in 'answer', 'completion' or the last of "
            f"'messages', got {type(answer).__name__}"
        )
    return answer
