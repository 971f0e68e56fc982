"""Whole runs of every command on tiny real models."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

from uld_jax import config as configs
from uld_jax import models


def read(path):
    return json.loads(path.read_text())


def student_bytes(workdir):
    return (workdir / "student" / "model.safetensors").read_bytes()


def test_train_leaves_everything(trained):
    left = {path.name for path in trained.iterdir()}
    assert left == {
        "after.json",
        "before.json",
        "checkpoints",
        "config.json",
        "heartbeat.json",
        "loss.png",
        "metrics.jsonl",
        "student",
        "teacher_answers.json",
        "tensorboard",
    }
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        total = row["cross_entropy"] + 1.5 * row["uld"]
        assert row["total"] == pytest.approx(total, rel=1e-5)
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["2", "4"]
    assert len(read(trained / "teacher_answers.json")) == 16
    for name in ("before", "after"):
        assert len(read(trained / f"{name}.json")["answers"]) == 4


def test_saved_config_is_the_whole_config(tiny, trained):
    given = configs.load(str(tiny.root / "config.py"))
    assert configs.from_dict(read(trained / "config.json")) == given


def test_student_has_changed(tiny, trained):
    assert student_bytes(trained) != (tiny.student / "model.safetensors").read_bytes()
    assert read(trained / "after.json")["answers"] != read(trained / "before.json")["answers"]


def test_student_opens_in_transformers_with_equal_logits(trained):
    ours = models.load(trained / "student")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained / "student").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "student")
    ids = tokenizer("The mill stands by the river.", return_tensors="np").input_ids
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(ours.model(jax.numpy.asarray(ids)), expected, rtol=1e-4, atol=1e-5)


def test_train_again_does_nothing_again(uld, trained, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(trained, workdir)
    result = uld("train", f"--workdir={workdir}")
    assert (result.status, result.err) == (0, "")
    for name in ("metrics.jsonl", "before.json", "after.json", "student/model.safetensors"):
        assert (workdir / name).read_bytes() == (trained / name).read_bytes()


def assert_scores(output, expected):
    """The files of `evaluate` say what `train` measured."""
    assert read(output)["scores"] == pytest.approx(expected["scores"], abs=1e-12)
    assert read(output)["too_long"] == expected["too_long"]
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in expected["answers"][0]} for row in rows] == expected[
        "answers"
    ]


def test_evaluate_reproduces_the_scores(uld, trained, tmp_path):
    output = tmp_path / "scores.json"
    result = uld("evaluate", f"--workdir={trained}", f"--output={output}")
    assert (result.status, result.err) == (0, "")
    assert_scores(output, read(trained / "after.json"))


def test_evaluate_the_untrained_student(uld, tiny, trained, tmp_path):
    output = tmp_path / "scores.json"
    result = uld("evaluate", tiny.config, f"--output={output}")
    assert (result.status, result.err) == (0, "")
    assert_scores(output, read(trained / "before.json"))


def test_export_equals_the_student(uld, trained, tmp_path):
    output = tmp_path / "exported"
    result = uld("export", f"--workdir={trained}", f"--output={output}")
    assert (result.status, result.err) == (0, "")
    names = sorted(path.name for path in (trained / "student").iterdir())
    assert sorted(path.name for path in output.iterdir()) == names
    for name in names:
        assert (output / name).read_bytes() == (trained / "student" / name).read_bytes()


def test_generate_makes_data_that_trains(uld, tiny, trained, tmp_path):
    answers = tmp_path / "answers.jsonl"
    assert uld("generate", tiny.config, f"--output={answers}").status == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {row["id"]: row["answer"] for row in rows} == read(trained / "teacher_answers.json")
    workdir = tmp_path / "run"
    flags = [f"--config.data.source=jsonl:{answers}", "--config.data.answers=gold"]
    result = uld("train", tiny.config, f"--workdir={workdir}", *flags)
    assert result.status == 0
    assert "12 training and 4 held-out questions" in result.out
    assert not (workdir / "teacher_answers.json").exists()


def test_official_convention_is_another_loss(uld, tiny, trained, tmp_path):
    workdir = tmp_path / "run"
    result = uld("train", tiny.config, f"--workdir={workdir}", "--config.loss.convention=official")
    assert (result.status, result.err) == (0, "")
    first, other = (
        json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        for run in (workdir, trained)
    )
    assert first["total"] != other["total"]
    assert student_bytes(workdir) != student_bytes(trained)


def test_training_compares_where_both_go_on_from_the_same_text(uld, tiny, tmp_path):
    given = ["--config.data.answers=gold", "--config.train.max_steps=1"]
    rows = {}
    for alignment in ("positional", "span"):
        workdir = tmp_path / alignment
        flags = [*given, f"--config.loss.alignment={alignment}", f"--workdir={workdir}"]
        assert uld("train", tiny.config, *flags).status == 0
        rows[alignment] = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    # "wheat " is two tokens of the teacher and five of the student, and so one group; each digit
    # is another. By position, the teacher's tokens are those compared: one more in each of 8 rows.
    compared = {alignment: row["uld_positions"] for alignment, row in rows.items()}
    assert compared["span"] == compared["positional"] - 8 >= 2 * 8
    assert rows["span"]["cross_entropy"] == rows["positional"]["cross_entropy"]
    assert rows["span"]["uld"] != rows["positional"]["uld"]


def test_max_steps_ends_the_run(uld, tiny, tmp_path):
    workdir = tmp_path / "run"
    result = uld("train", tiny.config, f"--workdir={workdir}", "--config.train.max_steps=1")
    assert (result.status, result.err) == (0, "")
    assert "distilling: 1 steps" in result.out
    assert "step 1/1" in result.out
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["1"]


def test_left_out_examples_are_counted_and_change_nothing(uld, tiny, tmp_path):
    good = [tiny.record(number) for number in range(20)]
    bad = [
        tiny.record(101, context="The river " * 300),
        tiny.record(102, answer="wheat " * 200),
        tiny.record(103, answer="  "),
    ]
    gold = ["--config.data.answers=gold", "--config.teacher.max_length=4000"]
    results = {}
    for name, records in (("all", good + bad), ("good", good)):
        source = tiny.write(tmp_path / f"{name}.jsonl", records)
        workdir = f"--workdir={tmp_path / name}"
        results[name] = uld("train", tiny.config, workdir, source, *gold)
        assert results[name].status == 0
    left_out = "left out: 1 with an empty answer, 2 over student.max_length=256"
    assert left_out in results["all"].out
    assert "left out" not in results["good"].out
    assert student_bytes(tmp_path / "all") == student_bytes(tmp_path / "good")


def test_question_too_long_to_evaluate_is_counted(uld, tiny, tmp_path):
    records = [tiny.record(number) for number in range(20)]
    source = tiny.write(
        tmp_path / "qa.jsonl", [*records, tiny.record(105, context="The river " * 300)]
    )
    output = tmp_path / "scores.json"
    result = uld("evaluate", tiny.config, source, f"--output={output}")
    assert result.status == 0
    assert read(output)["too_long"] == 1
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert rows[-1]["prediction"] == ""
    assert rows[-1]["student"] == {"left_out": "too_long_student"}
    assert "not read by the student, 1 over student.max_length" in result.out
    assert "1 of 5 prompts are over student.max_length=256" in result.out


def test_gradients_that_are_not_finite_end_the_run(uld, tiny, tmp_path):
    directory = tiny.copy("student", tmp_path / "student")

    def overflow(tensors):
        tensors["model.norm.weight"][:] = np.inf

    tiny.change_weights(directory, overflow)
    workdir = tmp_path / "run"
    flags = [f"--config.student.source={directory}", "--config.train.max_nonfinite_steps=2"]
    result = uld("train", tiny.config, f"--workdir={workdir}", *flags)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "step 3: loss or gradients were not finite in more than 2 steps in a row" in result.err
    assert "lower optimizer.learning_rate" in result.err
    assert not (workdir / "student").exists()
