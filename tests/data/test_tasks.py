import gzip
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from uld_jax.data import builders, records, tasks
from uld_jax.data.records import Example, split_by_group
from uld_jax.data.tasks import load_examples
from uld_jax.errors import UserError


def article(number, questions=2):
    return {
        "title": f"Article {number}",
        "paragraphs": [
            {
                "context": f"Paragraph of article {number}, with a café.",
                "qas": [
                    {
                        "id": f"{number}-{q}",
                        "question": f"Question {q} on {number}?",
                        "answers": [{"text": "café", "answer_start": 3}, {"text": "a café"}],
                    }
                    for q in range(questions)
                ],
            }
        ],
    }


def write(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_squad(path, articles):
    return write(path, json.dumps({"version": "1.1", "data": articles}))


def write_lines(path, *lines):
    return write(path, "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")


def qa(number, **more):
    return {
        "context": f"Context {number}.",
        "question": f"Question {number}?",
        "answer": f"answer {number}",
        **more,
    }


@pytest.mark.parametrize("name", ["small.json", "small.json.gz"])
def test_squad_json_keeps_every_field_and_splits_by_title(tmp_path, name):
    path = write_squad(tmp_path / name, [article(n) for n in range(10)])
    found = {
        split: load_examples(f"squad_json:{path}", split, data_dir=tmp_path / "tfds")
        for split in ("train", "eval")
    }
    assert {split: len(examples) for split, examples in found.items()} == {"train": 16, "eval": 4}
    assert not {x.title for x in found["train"]} & {x.title for x in found["eval"]}
    first = next(x for examples in found.values() for x in examples if x.id == "3-1")
    assert first == Example(
        id="3-1",
        kind="qa",
        context="Paragraph of article 3, with a café.",
        question="Question 1 on 3?",
        answers=("café", "a café"),
        title="Article 3",
    )


def test_real_squad_dev(shared, tmp_path):
    source = f"squad_json:{shared / 'data/squad/dev-v1.1.json.gz'}"
    train = load_examples(source, "train", data_dir=tmp_path)
    evaluation = load_examples(source, "eval", data_dir=tmp_path)
    assert len(train) + len(evaluation) == 10_570
    assert not {x.title for x in train} & {x.title for x in evaluation}
    assert len({x.title for x in evaluation}) == 10
    assert len({x.id for x in train + evaluation}) == 10_570
    assert all(x.answers and x.answers[0] in x.context for x in train + evaluation)


def test_builtin_is_read_from_the_shipped_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "BUILTIN_DIRECTORY", tmp_path)
    for split, count in (("train", 3), ("eval", 1)):
        write_lines(
            tmp_path / f"{split}.jsonl",
            *(
                {
                    "title": f"{split} {n}",
                    "context": "The sea is blue.",
                    "qas": [{"question": "What is blue?", "answer": "the sea"}] * 2,
                }
                for n in range(count)
            ),
        )
    assert len(load_examples("builtin", "train", data_dir=tmp_path / "tfds")) == 6
    assert load_examples("builtin", "eval", data_dir=tmp_path / "tfds")[1] == Example(
        "eval-0-1", "qa", "The sea is blue.", "What is blue?", ("the sea",), "eval 0"
    )


def test_jsonl_takes_questions_and_completions(tmp_path):
    path = write_lines(
        tmp_path / "mixed.jsonl.gz",
        qa(0, split="train", id=17, title="T"),
        "",
        {"prompt": "Write:", "completion": " yes", "split": "train"},
        {"context": "", "question": "Q?", "answers": ["a", "b"], "split": "eval"},
    )
    train = load_examples(f"jsonl:{path}", "train", data_dir=tmp_path)
    assert train == [
        Example("17", "qa", "Context 0.", "Question 0?", ("answer 0",), "T"),
        Example("3", "completion", "", "Write:", (" yes",), ""),
    ]
    assert load_examples(f"jsonl:{path}", "eval", data_dir=tmp_path) == [
        Example("4", "qa", "", "Q?", ("a", "b"), "")
    ]


def say(*said):
    return [{"role": role, "content": content} for role, content in said]


def test_jsonl_takes_chats_up_to_the_last_answer(tmp_path):
    messages = say(
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hi."),
        ("user", "And?"),
        ("assistant", "So é."),
        ("user", "Bye"),
    )
    path = write_lines(
        tmp_path / "chats.jsonl",
        {"messages": messages, "split": "train"},
        {"id": "x", "messages": say(("user", "A"), ("assistant", "B")), "split": "eval"},
    )
    (train,) = load_examples(f"jsonl:{path}", "train", data_dir=tmp_path)
    assert (train.kind, train.context, train.answers) == ("chat", "", ("So é.",))
    assert json.loads(train.question) == messages[:4]
    (evaluation,) = load_examples(f"jsonl:{path}", "eval", data_dir=tmp_path)
    assert evaluation.id == "x"
    assert json.loads(evaluation.question) == say(("user", "A"))


def test_an_absent_split_may_be_allowed(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", qa(0))
    options = {"data_dir": tmp_path, "may_be_absent": True}
    assert load_examples(f"jsonl:{path}", "eval", **options) == []
    assert len(load_examples(f"jsonl:{path}", "train", **options)) == 1


@pytest.mark.parametrize(
    ("make", "group"),
    [
        (lambda n: qa(n, title=f"title {n // 3}"), lambda x: x.title),
        (lambda n: {**qa(n), "context": f"context {n // 3}"}, lambda x: x.context),
        (lambda n: {"prompt": f"prompt {n // 3}", "completion": str(n)}, lambda x: x.question),
    ],
    ids=["title", "context", "prompt"],
)
def test_jsonl_split_never_leaks_a_group(tmp_path, make, group):
    path = write_lines(tmp_path / "d.jsonl", *(make(n) for n in range(30)))
    train = load_examples(f"jsonl:{path}", "train", data_dir=tmp_path)
    evaluation = load_examples(f"jsonl:{path}", "eval", data_dir=tmp_path)
    assert (len(train), len(evaluation)) == (24, 6)
    assert not {group(x) for x in train} & {group(x) for x in evaluation}


def test_split_depends_on_group_text_alone():
    examples = [Example(str(n), "qa", "", "q", ("a",), f"t{n}") for n in range(20)]
    forward = split_by_group((x, x.title) for x in examples)
    backward = split_by_group((x, x.title) for x in reversed(examples))
    assert {x.id for x in forward["eval"]} == {x.id for x in backward["eval"]}
    assert [x.id for x in forward["eval"]] == [x.id for x in backward["eval"]][::-1]
    assert list(split_by_group([(examples[0], "only")] * 3)) == ["train"]


def test_one_copy_per_content(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", qa(0), qa(1))
    cache = tmp_path / "tfds"
    before = load_examples(f"jsonl:{path}", "train", data_dir=cache)
    stamps = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    assert load_examples(f"jsonl:{path}", "train", data_dir=cache) == before
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()} == stamps
    write_lines(path, qa(2), qa(3))
    assert load_examples(f"jsonl:{path}", "train", data_dir=cache) != before
    assert len(list(cache.glob("*/qa_jsonl/1.0.0"))) == 2


DYING_PROCESS = """
import os, signal, sys
from uld_jax.data import builders
from uld_jax.data.tasks import load_examples

read = builders.read_qa_jsonl

def dying(examples):
    yield from examples
    os.kill(os.getpid(), signal.SIGKILL)

builders.read_qa_jsonl = lambda path: {s: dying(found) for s, found in read(path).items()}
load_examples(sys.argv[1], "train", data_dir=sys.argv[2])
"""


def test_a_killed_preparation_is_done_again(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", *(qa(n) for n in range(10)))
    cache = tmp_path / "tfds"
    command = [sys.executable, "-c", DYING_PROCESS, f"jsonl:{path}", str(cache)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert list(cache.glob("*/qa_jsonl/incomplete*"))
    assert not list(cache.glob("*/qa_jsonl/1.0.0"))
    assert len(load_examples(f"jsonl:{path}", "train", data_dir=cache)) == 8


def test_a_second_process_may_finish_first(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "d.jsonl", qa(0), qa(1))
    source = f"jsonl:{path}"
    honest = records.read_qa_jsonl

    def overtaken(path):
        monkeypatch.setattr(builders, "read_qa_jsonl", honest)
        load_examples(source, "train", data_dir=tmp_path / "tfds")
        return honest(path)

    monkeypatch.setattr(builders, "read_qa_jsonl", overtaken)
    assert len(load_examples(source, "train", data_dir=tmp_path / "tfds")) == 1


def test_default_directory_follows_the_environment(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "d.jsonl", qa(0), qa(1))
    monkeypatch.setenv("ULD_JAX_CACHE", str(tmp_path / "cache"))
    load_examples(f"jsonl:{path}", "train")
    assert list((tmp_path / "cache" / "tfds").glob("*/qa_jsonl/1.0.0"))


class SquadLike(tfds.core.GeneratorBasedBuilder):
    """A registered data set with SQuAD's features."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def _info(self):
        text = tfds.features.Text()
        answers = tfds.features.Sequence(
            {"text": text, "answer_start": tfds.features.Scalar(np.int32)}
        )
        features = {"id": text, "context": text, "question": text, "answers": answers}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {s: self._generate_examples(s) for s in ("train", "validation")}

    def _generate_examples(self, split):
        answers = {"text": ["é", "f"], "answer_start": [0, 1]}
        yield split, {"id": split, "context": "ef", "question": "e?", "answers": answers}


class NotQa(SquadLike):
    """A registered data set without answers."""

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self, split):
        yield split, {"text": split}


def test_registered_tfds_data_set(tmp_path):
    expected = Example("validation", "qa", "ef", "e?", ("é", "f"), "")
    assert load_examples("tfds:squad_like", "eval", data_dir=tmp_path) == [expected]
    assert load_examples("tfds:squad_like", "train", data_dir=tmp_path)[0].id == "train"
    with pytest.raises(UserError, match=r"tfds:not_qa: feature 'id' is missing, found \['text'\]"):
        load_examples("tfds:not_qa", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        (
            "csv:x",
            "train",
            "'csv:x': expected one of .*squad_json:PATH.*jsonl:PATH.*tfds:NAME.*hf:ID",
        ),
        ("jsonl:", "train", "expected one of"),
        ("builtin", "test", r"split 'test' of builtin: expected one of \['train', 'eval'\]"),
        ("jsonl:/no/such.jsonl", "train", "no such file, expected /no/such.jsonl"),
        ("squad_json:/no/such.json", "train", "no such file"),
        ("tfds:no_such_set_anywhere", "train", "TFDS has no data set of this name"),
    ],
)
def test_bad_source(tmp_path, source, split, message):
    with pytest.raises(UserError, match=message):
        load_examples(source, split, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"d.jsonl:2: not JSON \(.*column 2\)"),
        ('["a"]', r"d.jsonl:2: expected a JSON object, got list"),
        ({"context": "c", "answer": "a"}, "d.jsonl:2: field 'question' is missing"),
        ({"context": "c", "question": "q"}, r"d.jsonl:2: field 'answer' \(or 'answers'\)"),
        ({"question": "q", "answer": "a"}, "d.jsonl:2: field 'context' is missing"),
        ({"prompt": "p"}, "d.jsonl:2: field 'completion' is missing"),
        (qa(1, answer=3), "d.jsonl:2: field 'answer' must be a string, got int 3"),
        (qa(1, answers="x"), "d.jsonl:2: field 'answers' must be a non-empty list of strings"),
        (qa(1, answers=[]), "d.jsonl:2: field 'answers' must be a non-empty list of strings"),
        (qa(1, answers=["x", None]), "d.jsonl:2: field 'answers' must hold strings only"),
        ({"messages": "hi"}, "d.jsonl:2: field 'messages' must be a list of objects"),
        ({"messages": [{"role": "user"}]}, "d.jsonl:2: field 'content' is missing"),
        (
            {"messages": say(("user", "a"), ("tool", "b"), ("assistant", "c"))},
            r"d.jsonl:2: a message's role must be one of .*, got \['tool'\]",
        ),
        (
            {"messages": say(("user", "a"))},
            r"d.jsonl:2: field 'messages' must have an assistant's message after another, got the "
            r"roles \['user'\]",
        ),
        (
            {"messages": say(("assistant", "a"), ("user", "b"))},
            "d.jsonl:2: field 'messages' must have an assistant's message after another",
        ),
        (qa(1, id=1.5), "d.jsonl:2: field 'id' must be a string, got float 1.5"),
        (qa(1, id="1"), r"d.jsonl:2: id '1' is used twice \(first in .*d.jsonl:1\)"),
        (qa(1, split="dev"), r"d.jsonl:2: field 'split' must be one of .*, got 'dev'"),
        (qa(1, split="eval"), "d.jsonl:1: field 'split' is missing although other lines have it"),
    ],
)
def test_bad_jsonl_line(tmp_path, line, message):
    path = write_lines(tmp_path / "d.jsonl", qa(0), line)
    with pytest.raises(UserError, match=message) as caught:
        load_examples(f"jsonl:{path}", "train", data_dir=tmp_path / "tfds")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "tfds").glob("*/qa_jsonl/*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data":\n [,]}', r"s.json:2: not JSON"),
        ("[]", r"s.json: expected a JSON object with field 'data', got list"),
        ("{}", "s.json: field 'data' is missing"),
        ('{"data": {}}', "field 'data' must be a list of objects, got dict"),
        ('{"data": [{"title": "t"}]}', r"data\[0\]: field 'paragraphs' is missing"),
        ('{"data": [{"paragraphs": []}]}', r"data\[0\]: field 'title' is missing"),
        (
            '{"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": '
            '[{"question": "q", "answers": []}]}]}]}',
            r"data\[0\].paragraphs\[0\].qas\[0\]: field 'answers' is empty",
        ),
        (
            '{"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": '
            '[{"question": "q", "answers": [{"text": 5}]}]}]}]}',
            r"qas\[0\]: field 'text' must be a string, got int 5",
        ),
    ],
)
def test_bad_squad_json(tmp_path, text, message):
    path = write(tmp_path / "s.json", text)
    with pytest.raises(UserError, match=message):
        load_examples(f"squad_json:{path}", "train", data_dir=tmp_path / "tfds")


def test_twice_used_squad_id(tmp_path):
    path = write_squad(tmp_path / "s.json", [article(1), article(1)])
    with pytest.raises(UserError, match="id '1-0' is used twice"):
        load_examples(f"squad_json:{path}", "train", data_dir=tmp_path)


def test_empty_split(tmp_path):
    path = write_squad(tmp_path / "s.json", [article(1)])
    with pytest.raises(UserError, match=r"split 'eval' is empty.*it has {'train': 2}"):
        load_examples(f"squad_json:{path}", "eval", data_dir=tmp_path)
    path = write_lines(tmp_path / "d.jsonl", "")
    with pytest.raises(UserError, match=r"split 'train' is empty"):
        load_examples(f"jsonl:{path}", "train", data_dir=tmp_path)


def test_files_that_are_not_text(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(UserError, match="not a whole gzip file"):
        load_examples(f"jsonl:{tmp_path / 'a.jsonl.gz'}", "train", data_dir=tmp_path / "t")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_examples(f"jsonl:{tmp_path / 'b.jsonl'}", "train", data_dir=tmp_path / "t")


def test_unusable_cache_directory(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", qa(0), qa(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be prepared in"):
        load_examples(f"jsonl:{path}", "train", data_dir=tmp_path / "file" / "tfds")
