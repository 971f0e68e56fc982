"""A teacher's answers to held-out questions, from directories and lines."""

import json

import pytest

from uld_jax.data import Answer, AnswerWriter, Example
from uld_jax.errors import UserError
from uld_jax.evaluation import Prediction, answered, read_teacher_answers

ASKED = [Prediction("?", (f"gold {i}", "other"), f"q{i}", f"Where is {i}?") for i in range(5)]
ABOUT = {"model": "owner/teacher", "shots": 2}


def directory(path, *, split="eval", samples=1):
    """Answers to all five questions but the second and the last."""
    examples = [Example(p.id, "qa", "", p.question, p.references, "") for p in ASKED]
    settings = {"split": split, "samples": samples, "shard_size": 2}
    writer = AnswerWriter(path, ABOUT, examples, **settings)
    reasons = {"q1": "empty_answer", "q4": "long_prompt"}
    for shard in writer.missing_shards():
        writer.write_shard(
            shard,
            [
                Answer(f"gold {e.id[1:]}", 2, dropped=reasons.get(e.id, ""))
                for e in writer.examples_of(shard)
                for _ in range(samples)
            ],
        )
    writer.finish()
    return path


def test_a_directory_says_who_answered_and_what_is_unanswered(tmp_path):
    found = read_teacher_answers(directory(tmp_path / "answers"))
    assert (found.model, found.shots, found.unanswered) == ("owner/teacher", 2, 2)
    predictions = answered(found, ASKED)
    texts = ["gold 0", "", "gold 2", "gold 3", ""]
    assert predictions == [
        Prediction(text, p.references, p.id, p.question)
        for text, p in zip(texts, ASKED, strict=True)
    ]
    moved = [*ASKED[:2], Prediction("?", ("x",), "q2", "Where was 2?")]
    reason = answered(found, [*moved, *ASKED[3:]])
    assert reason == "in it question 'q2' is 'Where is 2?', not 'Where was 2?'"


@pytest.mark.parametrize("settings", [{"split": "train"}, {"samples": 2}])
def test_a_directory_of_something_else_is_refused(tmp_path, settings):
    path = directory(tmp_path / "answers", **settings)
    with pytest.raises(UserError, match=r"expected one answer to each held-out question, got "):
        read_teacher_answers(path)


def test_a_damaged_directory_is_refused(tmp_path):
    path = directory(tmp_path / "answers")
    shard = next(path.glob("*array_record*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 4
    shard.write_bytes(data)
    with pytest.raises(UserError, match="has sha256"):
        read_teacher_answers(path)


def test_lines_of_every_kind_of_example(tmp_path):
    path = tmp_path / "answers.jsonl"
    records = [
        {"id": "q0", "title": "", "context": "c", "question": "Where is 0?", "answer": "a"},
        {"id": "q1", "prompt": "Where is 1?", "completion": "b"},
        {"id": "q2", "messages": [{"role": "user"}, {"role": "assistant", "content": "c"}]},
        {"id": "q3", "references": ["other", "gold 3"], "prediction": "d"},
        {"id": "q4", "answers": {"text": ["gold 4", "other"]}, "prediction_text": "e"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_teacher_answers(path)
    assert (found.model, found.shots, found.unanswered) == ("", None, 0)
    predictions = answered(found, ASKED)
    assert not isinstance(predictions, str)
    assert [p.text for p in predictions] == list("abcde")
    assert [p.references for p in predictions] == [p.references for p in ASKED]
