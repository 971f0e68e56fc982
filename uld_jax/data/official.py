"""Readers of the files that the paper's five data sets are published as; no TFDS here.

Each takes paths by part (a split, or "all" where one file holds every split) and returns examples
by split, in the order of the files.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uld_jax.data.json_files import (
    check_ids,
    describe,
    json_lines,
    read_json,
    read_lines,
    text_of,
    texts_of,
)
from uld_jax.data.records import Example, squad_examples
from uld_jax.errors import UserError

Files = Mapping[str, Sequence[Path]]
Splits = dict[str, list[Example]]

# Of the paper's 500 test questions of PQA-L, which `datasets` drew with this seed.
PUBMEDQA_SEED = 42


def read_squad(files: Files) -> Splits:
    """SQuAD v1.1: its JSON documents, or JSON lines with an article each.

    Args:
        files: Of "train" and "validation".

    Returns:
        Examples by split.

    Raises:
        UserError: A file is malformed.
    """
    return {split: _checked(split, files, _squad_file) for split in files}


def _squad_file(path: Path) -> Iterator[tuple[Example, str]]:
    articles = _articles(path)
    for example in squad_examples(articles, str(path)):
        yield example, str(path)


def _articles(path: Path) -> dict[str, Any]:
    first = next(read_lines(path), "")
    try:
        by_line = "paragraphs" in json.loads(first)
    except json.JSONDecodeError:
        by_line = False  # a document over many lines
    if by_line:
        return {"data": [article for article, _ in json_lines(path)]}
    document = read_json(path, "one SQuAD v1.1 JSON document, or an article a line")
    if not isinstance(document, dict):
        raise UserError(
            f"{path}: expected a JSON object with field 'data', got {describe(document)}"
        )
    return document


def read_qed(files: Files) -> Splits:
    """QED: a question of Natural Questions and its paragraph a line.

    Its answer is the first string of `original_nq_answers`, as in the paper's evaluation, or of
    `answer_text`, which the first release has in its place.

    Args:
        files: Of "train" and "validation".

    Returns:
        Examples by split.

    Raises:
        UserError: A file is malformed.
    """
    return {split: _checked(split, files, _qed_file) for split in files}


def _qed_file(path: Path) -> Iterator[tuple[Example, str]]:
    for record, where in json_lines(path):
        if "original_nq_answers" in record:
            answer = _first_nq_answer(record["original_nq_answers"], where)
        else:
            answer = texts_of(record, "answer_text", where)[0]
        example = Example(
            id=str(record.get("example_id", where)),
            kind="qa",
            context=text_of(record, "paragraph_text", where),
            question=text_of(record, "question_text", where),
            answers=(answer,),
            title=text_of(record, "title_text", where),
        )
        yield example, where


def _first_nq_answer(answers: Any, where: str) -> str:
    """Of a list of answers, each a list of spans {"start", "end", "string"}."""
    try:
        return text_of(answers[0][0], "string", where)
    except (IndexError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: field 'original_nq_answers' must be a list of lists of spans, got "
            f"{describe(answers)}"
        ) from error


def read_fairytaleqa(files: Files) -> Splits:
    """FairytaleQA: the repository's CSV files by story, or JSON lines with a question each.

    A question about several sections of its story has them all as its context. Its answer is the
    first annotator's first one, as in the paper's evaluation.

    Args:
        files: Of "train", "validation" and "test"; of the CSV files `*-questions.csv` in
            questions/ are read, and from section-stories/ beside it `*-story.csv`.

    Returns:
        Examples by split.

    Raises:
        UserError: A file is malformed, or a story is missing.
    """
    asked = {
        split: [p for p in paths if p.suffix != ".csv" or p.name.endswith("-questions.csv")]
        for split, paths in files.items()
    }
    return {split: _checked(split, asked, _fairytale_file) for split in asked}


def _fairytale_file(path: Path) -> Iterator[tuple[Example, str]]:
    if path.suffix != ".csv":
        for record, where in json_lines(path):
            story, number = (
                text_of(record, field, where) for field in ("story_name", "question_id")
            )
            context, question = (text_of(record, f, where) for f in ("context", "question"))
            answers = texts_of(record, "answers", where)[:1]
            yield Example(f"{story}-{number}", "qa", context, question, answers, story), where
        return
    story = path.name.removesuffix("-questions.csv")
    sections = _sections(
        path.parents[2] / "section-stories" / path.parent.name / f"{story}-story.csv"
    )
    for row, where in _csv_rows(path):
        number, asked, question, answer = (
            text_of(row, field, where)
            for field in ("question_id", "cor_section", "question", "answer1")
        )
        numbers = [section.strip() for section in asked.split(",")]
        unknown = [section for section in numbers if section not in sections]
        if unknown:
            raise UserError(
                f"{where}: sections {unknown} of {story} are asked about, expected some of "
                f"{sorted(sections)}, which its story file has"
            )
        context = "\n".join(sections[section] for section in numbers)
        yield Example(f"{story}-{number}", "qa", context, question, (answer,), story), where


def _sections(path: Path) -> dict[str, str]:
    return {
        text_of(row, "section", where): text_of(row, "text", where)
        for row, where in _csv_rows(path)
    }


def _csv_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    # Some of the files begin with a byte order mark, which the reader would take for text.
    lines = (line.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}") for line in read_lines(path))
    reader = csv.DictReader(lines)
    for row in reader:
        yield row, f"{path}:{reader.line_num}"


def read_pubmedqa(files: Files) -> Splits:
    """PubMedQA's labelled questions (PQA-L), whose answer is the abstract's conclusion.

    The split is the one of the paper's score files: half of the questions by
    `datasets.Dataset.train_test_split(test_size=0.5, seed=42)`, in its order. PubMedQA's own test
    set, which no result of the paper is on, is another half.

    Args:
        files: "all": the one file {PMID: {"QUESTION", "CONTEXTS", "LONG_ANSWER"}}.

    Returns:
        Examples by split, "train" and "test".

    Raises:
        UserError: The file is malformed.
    """
    (path,) = files["all"]
    document = read_json(path, "one JSON object of PubMedQA's questions by their PMID")
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object by PMID, got {describe(document)}")
    examples = [
        _pubmed_example(record, pmid, f"{path}: {pmid}") for pmid, record in document.items()
    ]
    order = np.random.default_rng(PUBMEDQA_SEED).permutation(len(examples)).tolist()
    tested = (len(examples) + 1) // 2
    return {
        "train": [examples[i] for i in order[tested:]],
        "test": [examples[i] for i in order[:tested]],
    }


def _pubmed_example(record: Any, pmid: str, where: str) -> Example:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {describe(record)}")
    return Example(
        id=pmid,
        kind="qa",
        context=" ".join(texts_of(record, "CONTEXTS", where)),
        question=text_of(record, "QUESTION", where),
        answers=(text_of(record, "LONG_ANSWER", where),),
        title="",
    )


def read_dialogsum(files: Files) -> Splits:
    """DIALOGSum: a dialogue and its summary a line, of the test set three.

    Args:
        files: Of "train", "validation" and "test".

    Returns:
        Examples by split: the dialogue as context, and no question.

    Raises:
        UserError: A file is malformed.
    """
    return {split: _checked(split, files, _dialogsum_file) for split in files}


def _dialogsum_file(path: Path) -> Iterator[tuple[Example, str]]:
    for record, where in json_lines(path):
        fields = [f"summary{n}" for n in (1, 2, 3)] if "summary1" in record else ["summary"]
        example = Example(
            id=text_of(record, "fname", where),
            kind="qa",
            context=text_of(record, "dialogue", where),
            question="",
            answers=tuple(text_of(record, field, where) for field in fields),
            title="",
        )
        yield example, where


def _checked(split: str, files: Files, read: Any) -> list[Example]:
    """A split's examples; one whose id an earlier one of its file has is told apart by a number.

    Ids that two files share are refused: the same file would be there twice.
    """
    found, places = [], []
    for path in files[split]:
        seen: Counter[str] = Counter()
        for example, where in read(path):
            seen[example.id] += 1
            again = seen[example.id]
            number = example.id if again == 1 else f"{example.id}#{again}"
            found.append(Example(**{**vars(example), "id": number}))
            places.append((number, where))
    check_ids(places)
    return found
