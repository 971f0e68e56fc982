"""The built-in question-answer passages, checked as they ship in the package."""

import json
import re
from collections import Counter
from importlib.resources import files

import pytest

PASSAGES = {"train": 56, "eval": 16}
MIN_QUESTIONS = {"train": 224, "eval": 64}
SPLITS = tuple(PASSAGES)
SHARED_WORDS = 8


def _raw(split):
    return (files("uld_jax.data") / "builtin_qa" / f"{split}.jsonl").read_bytes()


def _load(split):
    return [json.loads(line) for line in _raw(split).decode("utf-8").splitlines()]


@pytest.fixture(scope="module")
def passages():
    return {split: _load(split) for split in SPLITS}


@pytest.fixture(scope="module")
def everything(passages):
    return [passage for split in SPLITS for passage in passages[split]]


def _questions(rows):
    return [(row, qa["question"], qa["answer"]) for row in rows for qa in row["qas"]]


def _repeated(items):
    return [item for item, count in Counter(items).items() if count > 1]


def _normal(text):
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


@pytest.mark.parametrize("split", SPLITS)
def test_passage_count(passages, split):
    assert len(passages[split]) == PASSAGES[split]


@pytest.mark.parametrize("split", SPLITS)
def test_enough_questions(passages, split):
    assert len(_questions(passages[split])) >= MIN_QUESTIONS[split]


def test_each_passage_has_four_or_five_questions(everything):
    wrong = {row["title"]: len(row["qas"]) for row in everything if len(row["qas"]) not in (4, 5)}
    assert wrong == {}


@pytest.mark.parametrize("split", SPLITS)
def test_json_shape(passages, split):
    for row in passages[split]:
        assert list(row) == ["title", "context", "qas"]
        assert isinstance(row["qas"], list)
        assert all(list(qa) == ["question", "answer"] for qa in row["qas"])
        texts = [row["title"], row["context"], *(text for qa in row["qas"] for text in qa.values())]
        assert all(isinstance(text, str) and text and text == text.strip() for text in texts)


@pytest.mark.parametrize("split", SPLITS)
def test_one_passage_a_line(split):
    raw = _raw(split)
    assert raw.endswith(b"\n")
    assert all(line.startswith(b'{"title": ') for line in raw.removesuffix(b"\n").split(b"\n"))


@pytest.mark.parametrize("split", SPLITS)
def test_printable_ascii(passages, split):
    assert _raw(split).isascii()
    for row in passages[split]:
        texts = [row["title"], row["context"], *(text for qa in row["qas"] for text in qa.values())]
        unprintable = [text for text in texts if not (text.isascii() and text.isprintable())]
        assert unprintable == []


@pytest.mark.parametrize("key", ["title", "context"])
def test_passages_are_distinct_and_splits_disjoint(passages, everything, key):
    train, evaluation = ({_normal(row[key]) for row in passages[split]} for split in SPLITS)
    assert train & evaluation == set()
    assert _repeated(_normal(row[key]) for row in everything) == []


def test_context_length(everything):
    lengths = {row["title"]: len(row["context"].split()) for row in everything}
    assert {title: words for title, words in lengths.items() if not 45 <= words <= 75} == {}


def test_answer_is_found_exactly_once(everything):
    wrong = [
        (question, answer)
        for row, question, answer in _questions(everything)
        if row["context"].count(answer) != 1
    ]
    assert wrong == []


def test_answer_is_made_of_whole_words(everything):
    wrong = [
        (question, answer)
        for row, question, answer in _questions(everything)
        if not re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", row["context"])
    ]
    assert wrong == []


def test_answer_length(everything):
    answers = [answer for _, _, answer in _questions(everything)]
    assert [answer for answer in answers if not 1 <= len(answer.split()) <= 6] == []


def test_question_form(everything):
    questions = [question for _, question, _ in _questions(everything)]
    wrong = [q for q in questions if not (q.endswith("?") and 6 <= len(q.split()) <= 16)]
    assert wrong == []


def test_question_does_not_give_its_answer_away(everything):
    told = [
        (question, answer)
        for _, question, answer in _questions(everything)
        if f" {_normal(answer)} " in f" {_normal(question)} "
    ]
    assert told == []


def test_questions_are_unique(everything):
    assert _repeated(_normal(question) for _, question, _ in _questions(everything)) == []


def test_no_two_passages_share_a_long_word_sequence(everything):
    seen = Counter()
    for row in everything:
        words = _normal(row["context"]).split()
        starts = range(len(words) - SHARED_WORDS + 1)
        seen.update({" ".join(words[i : i + SHARED_WORDS]) for i in starts})
    assert [sequence for sequence, count in seen.items() if count > 1] == []
