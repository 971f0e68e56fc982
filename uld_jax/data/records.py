"""Question-answer records and the readers of the files they come in; no TFDS here."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from uld_jax.data.json_files import (
    check_ids,
    describe,
    json_lines,
    objects_of,
    read_json,
    text_of,
    texts_of,
)
from uld_jax.errors import UserError

SPLITS = ("train", "eval")
GROUPS_PER_EVAL_GROUP = 5
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Example:
    """One item to be answered.

    A completion or a chat keeps its prompt in `question`, has no context and one answer.

    Attributes:
        id: Unique within its source.
        kind: "qa"; "completion" for a bare prompt and its continuation; "chat" for messages and
            the assistant's next one.
        context: The passage the question is about; may be empty.
        question: The question, empty where a summary is asked for; the prompt of a completion;
            the messages of a chat so far, [{"role", "content"}, ...] as JSON.
        answers: Accepted answers, at least one; the first is the one to train on.
        title: Name of the article or document; may be empty.

    Example:
        >>> Example("7", "qa", "Oslo is in Norway.", "Where is Oslo?", ("Norway",), "").kind
        'qa'
    """

    id: str
    kind: Literal["qa", "completion", "chat"]
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
    document = read_json(path, "one SQuAD v1.1 JSON document")
    if not isinstance(document, dict):
        raise UserError(
            f"{path}: expected a JSON object with field 'data', got {describe(document)}"
        )
    examples = list(squad_examples(document, str(path)))
    check_ids((example.id, str(path)) for example in examples)
    return split_by_group((example, example.title) for example in examples)


def squad_examples(document: dict[str, Any], where: str) -> Iterator[Example]:
    """The examples of a SQuAD v1.1 document.

    Args:
        document: {"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}; a question
            without an id gets its place in the document.
        where: Names the document in errors.

    Yields:
        The examples, in their order.

    Raises:
        UserError: An entry lacks a field or has one of a wrong type.
    """
    for a, article in enumerate(objects_of(document, "data", where)):
        at_article = f"{where}: data[{a}]"
        title = text_of(article, "title", at_article)
        for p, paragraph in enumerate(objects_of(article, "paragraphs", at_article)):
            at_paragraph = f"{at_article}.paragraphs[{p}]"
            context = text_of(paragraph, "context", at_paragraph)
            for q, qa in enumerate(objects_of(paragraph, "qas", at_paragraph)):
                at_qa = f"{at_paragraph}.qas[{q}]"
                texts = [
                    text_of(entry, "text", at_qa) for entry in objects_of(qa, "answers", at_qa)
                ]
                if not texts:
                    raise UserError(
                        f"{at_qa}: field 'answers' is empty, expected at least one answer: "
                        "remove the questions that have none (SQuAD v2)"
                    )
                yield Example(
                    id=_identifier(qa, f"{a}-{p}-{q}", at_qa),
                    kind="qa",
                    context=context,
                    question=text_of(qa, "question", at_qa),
                    answers=tuple(texts),
                    title=title,
                )


def read_qa_jsonl(path: Path) -> dict[str, list[Example]]:
    """Read JSON lines (plain or .gz) and split them.

    Each line is {"context", "question", "answer" or "answers"}, {"prompt", "completion"} or
    {"messages": [{"role", "content"}, ...]}, whose last message of the assistant is the answer to
    those before it; "id", "title" and "split" are optional. Where the lines name their split it is
    obeyed; otherwise they are grouped by title, else context, else prompt, and split by group.

    Args:
        path: The file.

    Returns:
        Examples by split name; a split without examples is absent.

    Raises:
        UserError: The file is absent, a line is not JSON, lacks a field or has a wrong type.
    """
    records = list(json_lines(path))
    examples = [(_qa_example(record, where), where) for record, where in records]
    check_ids((example.id, where) for example, where in examples)
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
    title = text_of(record, "title", where) if "title" in record else ""
    if "messages" in record:
        prompt, answer = _prompt_and_answer(record, where)
        return Example(identifier, "chat", "", prompt, (answer,), title)
    if "prompt" in record:
        completion = text_of(record, "completion", where)
        return Example(
            id=identifier,
            kind="completion",
            context="",
            question=text_of(record, "prompt", where),
            answers=(completion,),
            title=title,
        )
    return Example(
        id=identifier,
        kind="qa",
        context=text_of(record, "context", where),
        question=text_of(record, "question", where),
        answers=_answers(record, where),
        title=title,
    )


def _answers(record: dict[str, Any], where: str) -> tuple[str, ...]:
    if "answers" in record:
        return texts_of(record, "answers", where)
    if "answer" not in record:
        raise UserError(f"{where}: field 'answer' (or 'answers') is missing")
    return (text_of(record, "answer", where),)


def _prompt_and_answer(record: dict[str, Any], where: str) -> tuple[str, str]:
    """The messages before the last one of the assistant, as JSON, and its content."""
    messages = [
        {field: text_of(message, field, where) for field in ("role", "content")}
        for message in objects_of(record, "messages", where)
    ]
    roles = [message["role"] for message in messages]
    unknown = sorted(set(roles) - set(ROLES))
    if unknown:
        raise UserError(f"{where}: a message's role must be one of {list(ROLES)}, got {unknown}")
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=0)
    if not last:
        raise UserError(
            f"{where}: field 'messages' must have an assistant's message after another, got the "
            f"roles {roles}"
        )
    return json.dumps(messages[:last], ensure_ascii=False), messages[last]["content"]


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
                    context=text_of(record, "context", where),
                    question=text_of(qa, "question", where),
                    answers=(text_of(qa, "answer", where),),
                    title=text_of(record, "title", where),
                )
                for number, (record, where) in enumerate(json_lines(directory / f"{split}.jsonl"))
                for q, qa in enumerate(objects_of(record, "qas", where))
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


def _split_name(record: dict[str, Any], where: str) -> str | None:
    split = record.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: field 'split' must be one of {list(SPLITS)}, got {split!r}")
    return split


def _identifier(record: dict[str, Any], default: str, where: str) -> str:
    identifier = record.get("id", default)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise UserError(f"{where}: field 'id' must be a string, got {describe(identifier)}")
    return str(identifier)
