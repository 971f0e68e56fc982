"""What prompts are made of by the config: task, titles, and shots on no evaluated text."""

import dataclasses
import json

import pytest

from uld_jax.cli import compose
from uld_jax.cli.examples import load_split, shot_pool_of
from uld_jax.cli.generate import _line
from uld_jax.config import DataConfig, ModelConfig, RunConfig, TeacherConfig
from uld_jax.data import AnswerWriter, load_examples, task_of
from uld_jax.data.answers import Answer
from uld_jax.data.records import Example
from uld_jax.testing import tiny_model


def question(number, split, context=None):
    context = f"Context {context or number}."
    return {"context": context, "question": f"Q{number}?", "answer": "a", "split": split}


def config_of(tmp_path, name, *records, shots=1, **data):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"source": f"jsonl:{path}", "data_dir": str(tmp_path / "tfds")}
    return RunConfig(
        student=ModelConfig(source="s"),
        teacher=TeacherConfig(source="t", shots=shots),
        data=DataConfig(**source | data),
    )


TRAIN = [question(n, "train") for n in range(1, 5)]


def contexts(config):
    pool = shot_pool_of(config, load_split(config, "train"))
    return [example.context for example in pool]


def test_an_evaluated_text_is_never_drawn(tmp_path):
    # The evaluation set is cut to one question, the pool is free of all of them.
    held_out = [question(8, "eval", context=2), question(9, "eval", context=3)]
    config = config_of(tmp_path, "d", *TRAIN, *held_out, eval_examples=1)
    assert contexts(config) == ["Context 1.", "Context 4."]


def test_nor_one_of_another_evaluation_set(tmp_path):
    other = config_of(tmp_path, "o", question(1, "train"), question(9, "eval", context=4))
    config = config_of(tmp_path, "d", *TRAIN, question(8, "eval"))
    data = dataclasses.replace(config.data, eval_source=other.data.source)
    assert len(contexts(config)) == 4
    assert len(contexts(dataclasses.replace(config, data=data))) == 3


def test_without_shots_or_an_evaluation_set_nothing_is_left_out(tmp_path):
    held_out = question(8, "eval", context=2)
    assert len(contexts(config_of(tmp_path, "a", *TRAIN, held_out, shots=0))) == 4
    assert len(contexts(config_of(tmp_path, "b", *TRAIN))) == 4


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(
    ("source", "task", "expected"),
    [
        ("builtin", "auto", "qa"),
        ("squad", "auto", "qa"),
        ("qed", "auto", "qa_generative"),
        ("fairytaleqa", "auto", "qa_generative"),
        ("pubmedqa", "auto", "qa_medical"),
        ("dialogsum", "auto", "summary_dialogue"),
        ("hf:knkarthick/samsum", "auto", "qa"),
        ("hf:knkarthick/samsum", "summary_dialogue", "summary_dialogue"),
        ("dialogsum", "qa", "qa"),
    ],
)
def test_the_task_is_the_data_sets_or_the_configs(model, source, task, expected):
    data = DataConfig(source=source, task=task)
    for side in (ModelConfig(source="s"), TeacherConfig(source="t")):
        assert compose.side_of(side, model, data).task == expected


@pytest.mark.parametrize(
    ("titles", "student", "teacher"),
    [("none", False, False), ("teacher", False, True), ("both", True, True)],
)
def test_whose_prompts_tell_titles(model, titles, student, teacher):
    data = DataConfig(titles=titles)
    assert compose.side_of(ModelConfig(source="s"), model, data).titles == student
    assert compose.side_of(TeacherConfig(source="t"), model, data).titles == teacher


def test_answers_keep_the_task_that_they_were_asked_in(tmp_path):
    for task in ("qa_medical", None):
        directory = tmp_path / str(task)
        provenance = {"model": "m"} | ({"task": task} if task else {})
        examples = [Example("1", "qa", "", "Why?", ("?",), "")]
        settings = {"split": "train", "samples": 1, "shard_size": 1}
        writer = AnswerWriter(directory, provenance, examples, **settings)
        writer.write_shard(0, [Answer("So.", 2)])
        writer.finish()
        assert task_of(f"generated:{directory}") == (task or "qa")


def test_answers_to_chats_are_chats_as_lines(tmp_path):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(_line(Example("7", "chat", "", json.dumps(said), ("Ha.",), "")))
    (read,) = load_examples(f"jsonl:{path}", "train", data_dir=tmp_path)
    assert (read.id, read.kind, read.answers) == ("7", "chat", ("Ha.",))
    assert json.loads(read.question) == said
