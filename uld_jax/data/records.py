"""Question-answer records and the readers of the files they come in; no TFDS here."""

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from uld_jax.errors import UserError

SPLITS = ("train", "eval")
GROUPS_PER_EVAL_GROUP = 5


@dataclasses.dataclass(frozen=True)
class Example:
    """One item to be answered.

    A completion record keeps its prompt in `question`, has no context and one answer.

    Attributes:
        id: Unique within its source.
        kind: "qa", or "completion" for a bare prompt and its continuation.
        context: The passage the question is about; may be empty.
        question: The question, or the prompt of a completion.
        answers: Accepted answers, at least one; the first is the one to train on.
        title: Name of the article or document; may be empty.

    Example:
        >>> Example("7", "qa", "Oslo is in Norway.", "Where is Oslo?", ("Norway",), "").kind
        'qa'
    """

    id: str
    kind: Literal["qa", "completion"]
    context: str
    question: str
    answers: tuple[str, ...]
    title: str


def read_squad_json(path: Path) -> dict[str, list[Example]]:
    """Read a SQuAD v1.1 file (plain or .gz) and split it by article.

    Args:
        path: The file: {"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}.

    Returns:
        Examples by split name; a split without examples is absent.

    Raises:
        UserError: The file is absent, is not JSON, or an entry lacks a field.
    """
    try:
        document = json.loads("".join(_lines(path)))
    except json.JSONDecodeError as error:
        raise _not_json(f"{path}:{error.lineno}", error, "one SQuAD v1.1 JSON document") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object with field 'data', got {_kind(document)}")
    examples = list(_squad_examples(document, str(path)))
    _check_ids((example.id, str(path)) for example in examples)
    return split_by_group((example, example.title) for example in examples)


def _squad_examples(document: dict[str, Any], where: str) -> Iterator[Example]:
    for a, article in enumerate(_objects(document, "data", where)):
        at_article = f"{where}: data[{a}]"
        title = _text(article, "title", at_article)
        for p, paragraph in enumerate(_objects(article, "paragraphs", at_article)):
            at_paragraph = f"{at_article}.paragraphs[{p}]"
            context = _text(paragraph, "context", at_paragraph)
            for q, qa in enumerate(_objects(paragraph, "qas", at_paragraph)):
                at_qa = f"{at_paragraph}.qas[{q}]"
                texts = [_text(entry, "text", at_qa) for entry in _objects(qa, "answers", at_qa)]
                if not texts:
                    raise UserError(
                        f"{at_qa}: field 'answers' is empty, expected at least one answer: "
                        "remove the questions that have none (SQuAD v2)"
                    )
                yield Example(
                    id=_identifier(qa, f"{a}-{p}-{q}", at_qa),
                    kind="qa",
                    context=context,
                    question=_text(qa, "question", at_qa),
                    answers=tuple(texts),
                    title=title,
                )


def read_qa_jsonl(path: Path) -> dict[str, list[Example]]:
    """Read JSON lines (plain or .gz) and split them.

    Each line is {"context", "question", "answer" or "answers"} or {"prompt", "completion"},
    with "id", "title" and "split" optional. Where the lines name their split it is obeyed;
    otherwise they are grouped by title, else context, else prompt, and split by group.

    Args:
        path: The file.

    Returns:
        Examples by split name; a split without examples is absent.

    Raises:
        UserError: The file is absent, a line is not JSON, lacks a field or has a wrong type.
    """
    records = list(_json_lines(path))
    examples = [(_qa_example(record, where), where) for record, where in records]
    _check_ids((example.id, where) for example, where in examples)
    named = [_split_name(record, where) for record, where in records]
    if not any(named):
        return split_by_group(
            (example, example.title or example.context or example.question)
            for example, _ in examples
        )
    if None in named:
        where = records[named.index(None)][1]
        raise UserError(
            f"{where}: field 'split' is missing although other lines have it: "
            "give it to every line or to none"
        )
    return _non_empty(
        {
            split: [
                example for (example, _), name in zip(examples, named, strict=True) if name == split
            ]
            for split in SPLITS
        }
    )


def _qa_example(record: dict[str, Any], where: str) -> Example:
    identifier = _identifier(record, where.rsplit(":", 1)[1], where)
    title = _text(record, "title", where) if "title" in record else ""
    if "prompt" in record:
        completion = _text(record, "completion", where)
        return Example(
            id=identifier,
            kind="completion",
            context="",
            question=_text(record, "prompt", where),
            answers=(completion,),
            title=title,
        )
    return Example(
        id=identifier,
        kind="qa",
        context=_text(record, "context", where),
        question=_text(record, "question", where),
        answers=_answers(record, where),
        title=title,
    )


def _answers(record: dict[str, Any], where: str) -> tuple[str, ...]:
    if "answers" not in record:
        if "answer" not in record:
            raise UserError(f"{where}: field 'answer' (or 'answers') is missing")
        return (_text(record, "answer", where),)
    answers = record["answers"]
    if not isinstance(answers, list) or not answers:
        raise UserError(
            f"{where}: field 'answers' must be a non-empty list of strings, got {_kind(answers)}"
        )
    for answer in answers:
        if not isinstance(answer, str):
            raise UserError(
                f"{where}: field 'answers' must hold strings only, got {_kind(answer)} in it"
            )
    return tuple(answers)


def read_builtin(directory: Path) -> dict[str, list[Example]]:
    """Read the questions shipped with the package.

    Args:
        directory: Holds train.jsonl and eval.jsonl, each line
            {"title", "context", "qas": [{"question", "answer"}]}.

    Returns:
        Examples by split name.

    Raises:
        UserError: A file is absent or a line is malformed.
    """
    return _non_empty(
        {
            split: [
                Example(
                    id=f"{split}-{number}-{q}",
                    kind="qa",
                    context=_text(record, "context", where),
                    question=_text(qa, "question", where),
                    answers=(_text(qa, "answer", where),),
                    title=_text(record, "title", where),
                )
                for number, (record, where) in enumerate(_json_lines(directory / f"{split}.jsonl"))
                for q, qa in enumerate(_objects(record, "qas", where))
            ]
            for split in SPLITS
        }
    )


def split_by_group(grouped: Iterable[tuple[Example, str]]) -> dict[str, list[Example]]:
    """Split examples so that no group is in both splits.

    The groups are ordered by the sha256 of their text and every fifth one, from the first on,
    is for evaluation. The split of a file therefore never depends on a seed or on line order.
    A single group is all for training.

    Args:
        grouped: (example, text of its group) pairs.

    Returns:
        Examples by split name, in their given order; a split without examples is absent.

    Example:
        >>> grouped = [(Example(str(i), "qa", "", "q", ("a",), ""), f"g{i}") for i in range(10)]
        >>> {split: len(examples) for split, examples in split_by_group(grouped).items()}
        {'train': 8, 'eval': 2}
    """
    pairs = list(grouped)
    groups = sorted({group for _, group in pairs}, key=_sha256)
    evaluation = set(groups[::GROUPS_PER_EVAL_GROUP]) if len(groups) > 1 else set()
    return _non_empty(
        {
            "train": [example for example, group in pairs if group not in evaluation],
            "eval": [example for example, group in pairs if group in evaluation],
        }
    )


def _sha256(text: str) -> str:
    # A lone surrogate is legal in JSON escapes and must not stop the split.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _non_empty(splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
    return {split: examples for split, examples in splits.items() if examples}


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a JSON file: check the path")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise _not_json(where, error, "one JSON object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, got {_kind(record)}")
        yield record, where


def _not_json(where: str, error: json.JSONDecodeError, expected: str) -> UserError:
    return UserError(f"{where}: not JSON ({error.msg}, column {error.colno}), expected {expected}")


def _check_ids(identifiers: Iterable[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for identifier, where in identifiers:
        if identifier in seen:
            raise UserError(
                f"{where}: id {identifier!r} is used twice (first in {seen[identifier]})"
            )
        seen[identifier] = where


def _split_name(record: dict[str, Any], where: str) -> str | None:
    split = record.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: field 'split' must be one of {list(SPLITS)}, got {split!r}")
    return split


def _identifier(record: dict[str, Any], default: str, where: str) -> str:
    identifier = record.get("id", default)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise UserError(f"{where}: field 'id' must be a string, got {_kind(identifier)}")
    return str(identifier)


def _text(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise UserError(f"{where}: field {field!r} is missing, found {sorted(record)}")
    if not isinstance(record[field], str):
        raise UserError(f"{where}: field {field!r} must be a string, got {_kind(record[field])}")
    return record[field]


def _objects(record: dict[str, Any], field: str, where: str) -> list[dict[str, Any]]:
    if field not in record:
        raise UserError(f"{where}: field {field!r} is missing, found {sorted(record)}")
    value = record[field]
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"{where}: field {field!r} must be a list of objects, got {_kind(value)}")
    return value


def _kind(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
