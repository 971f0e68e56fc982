"""Whole runs with encoder-decoders: decoder teacher to mT5 student, and T5 teacher to decoder."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from uld_jax import config as configs
from uld_jax import models
from uld_jax.cli import compose, train
from uld_jax.cli.main import main
from uld_jax.testing import tiny_model, tiny_t5
from uld_jax.train import MEASURED

STEPS = 8


def read(path):
    return json.loads(path.read_text())


def rows(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


@pytest.fixture(scope="module")
def arguments(tiny, tmp_path_factory):
    """The command that distils the decoder teacher into a tiny random mT5."""
    directory = tmp_path_factory.mktemp("mt5") / "student"
    models.save_pretrained(tiny_model(tiny_t5(), seed=3), directory)
    return [tiny.config, f"--config.student.source={directory}", "--config.train.epochs=4"]


@pytest.fixture(scope="module")
def straight(arguments, tmp_path_factory):
    """The workdir of a run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    assert main(["train", *arguments, f"--workdir={workdir}"]) == 0
    return workdir


def test_the_loss_falls(straight):
    totals = [row["total"] for row in rows(straight)]
    assert len(totals) == STEPS
    assert np.mean(totals[-2:]) < 0.8 * np.mean(totals[:2])


def test_a_run_that_is_stopped_resumes_as_if_it_had_not_been(
    arguments, straight, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    said = train.say

    def stop(message):
        said(message)
        if message.startswith("step 5/"):
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "say", stop)
    with pytest.raises(KeyboardInterrupt):
        main(["train", *arguments, f"--workdir={workdir}"])
    assert [row["step"] for row in rows(workdir)][-1] < STEPS
    assert not (workdir / "student").exists()
    monkeypatch.setattr(train, "say", said)
    assert main(["train", f"--workdir={workdir}"]) == 0
    assert rows(workdir) == rows(straight)
    for name in ("before.json", "teacher_answers.json", "after.json"):
        assert read(workdir / name) == read(straight / name)
    for path in (straight / "student").iterdir():
        assert (workdir / "student" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_student_opens_in_transformers_with_equal_logits_and_answers(straight):
    ours = models.load(straight / "student")
    assert isinstance(ours.model, models.EncoderDecoder)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(straight / "student").eval()
    assert type(theirs).__name__ == "MT5ForConditionalGeneration"
    ids = [*ours.tokenizer("The mill stands by the river.").input_ids, 2]
    answer = models.generate(ours.model, [ids], max_new_tokens=6, eos_id=2)[0]
    tokens = [0, *answer]
    with torch.no_grad():
        prompt = torch.tensor([ids])
        expected = theirs(prompt, decoder_input_ids=torch.tensor([tokens])).logits.numpy()
        theirs_answer = theirs.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    logits = ours.model(jnp.array([tokens]), encoder_tokens=jnp.array([ids]))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert [i for i in theirs_answer[0, 1:].tolist() if i != 2] == answer


def test_evaluate_and_export_of_the_run(uld, straight, tmp_path):
    scores, output = tmp_path / "scores.json", tmp_path / "exported"
    result = uld("evaluate", f"--workdir={straight}", f"--output={scores}")
    assert (result.status, result.err) == (0, "")
    assert read(scores)["scores"] == pytest.approx(read(straight / "after.json")["scores"])
    assert read(scores)["student"]["tokens"] > read(scores)["student"]["answers"] == 4
    result = uld("export", f"--workdir={straight}", f"--output={output}")
    assert (result.status, result.err) == (0, "")
    for path in (straight / "student").iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_a_t5_teaches_a_decoder(uld, tiny, tmp_path):
    teacher = tmp_path / "teacher"
    # (With a tied head, random weights answer every prompt with its start token: padding.)
    t5 = tiny_t5(family="t5", scaled_head=True, gated=False, activation="relu")
    models.save_pretrained(tiny_model(t5, kind="metaspace", seed=4), teacher)
    flags = [tiny.config, f"--config.teacher.source={teacher}", "--config.train.epochs=4"]
    workdir = tmp_path / "run"
    result = uld("train", *flags, f"--workdir={workdir}")
    assert (result.status, result.err) == (0, "")
    totals = [row["total"] for row in rows(workdir)]
    assert np.mean(totals[-2:]) < 0.8 * np.mean(totals[:2])
    assert any(read(workdir / "teacher_answers.json").values())
    answers = tmp_path / "answers.jsonl"
    assert uld("generate", *flags, f"--output={answers}").status == 0
    made = {row["id"]: row["answer"] for row in map(json.loads, answers.read_text().splitlines())}
    kept = {k: v for k, v in read(workdir / "teacher_answers.json").items() if v}
    assert made == kept
    shutil.rmtree(workdir)


def test_only_an_encoder_decoder_has_a_start_token(tiny):
    config = configs.load(tiny.config.removeprefix("--config="))
    for model, start in ((tiny_model(tiny_t5(start_id=7)), 7), (tiny_model(), None)):
        assert compose.side_of(config.student, model, config.data).start_id == start


def test_a_prompt_counts_towards_max_length(uld, arguments, tmp_path):
    flags = ["--config.student.max_length=20", f"--workdir={tmp_path / 'run'}"]
    result = uld("train", *arguments, *flags)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "student.max_length=20: all 16 training prompts leave no room" in result.err
