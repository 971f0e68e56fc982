"""`uld-jax check` on a sound pair and on pairs that are broken on purpose."""

import json
import shutil

import pytest
from flax import nnx

from uld_jax.models import Decoder, LoadedModel, load_tokenizer, save_pretrained
from uld_jax.testing import tiny_gemma, tiny_model


def changed(directory, name, **changes):
    """Rewrites fields of a JSON file of a model; None removes one."""
    path = directory / name
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def found(report):
    return {finding["fault"]: finding["level"] for finding in report["findings"]}


@pytest.fixture
def check(uld, tiny, tmp_path):
    def run(*flags):
        output = tmp_path / "report"
        result = uld("check", tiny.config, f"--output={output}", *flags)
        return result, json.loads((output / "teacher.json").read_text())

    return run


def test_a_sound_pair(check, tiny, tmp_path):
    assert check()[0].status == 0
    result, report = check("--weights")
    assert {"no_eos", "tokens_beyond", "few_tokens", "other_eos"}.isdisjoint(found(report))
    assert report["samples"]["examples"] == 16
    assert report["vocabulary"]["shared"] > 100
    # Random weights: every token is as likely, and no text fluent.
    assert all(bits > 3 for bits in report["bits_per_byte"].values())
    assert found(report)["foreign_text"] == "error"
    assert result.status == 2
    assert result.err == "error: 2 of the findings above are errors: training cannot work so\n"
    student = load_tokenizer(tiny.student).config
    assert report["bytes_per_device"]["optimizer state"] > 4 * student.vocab_size * student.width
    text = (tmp_path / "report" / "teacher.md").read_text()
    assert "![](teacher.png)" in text
    assert (tmp_path / "report" / "teacher.png").stat().st_size > 1000


def test_a_teacher_with_another_models_tokenizer(check, uld, tiny, tmp_path):
    teacher = tmp_path / "teacher"
    save_pretrained(tiny_model(tiny_gemma(kv_heads=2), kind="metaspace"), teacher)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.student / name, teacher / name)
    changed(teacher, "config.json", eos_token_id=5)
    flag = f"--config.teacher.source={teacher}"
    result, report = check(flag)
    assert result.status == 2
    assert found(report) | {"few_tokens": "error", "other_eos": "error"} == found(report)
    assert "take the tokenizer that belongs to the weights" in result.out
    # Training refuses it before anything is written.
    result = uld("train", tiny.config, f"--workdir={tmp_path / 'run'}", flag)
    assert result.status == 2
    assert "the teacher's tokenizer ends texts with" in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_padded_vocabulary(check, tiny, tmp_path):
    teacher = tmp_path / "teacher"
    tokenizer = load_tokenizer(tiny.root / "teacher").tokenizer
    config = tiny_gemma(kv_heads=2, vocab_size=len(tokenizer) + 8)
    save_pretrained(LoadedModel(Decoder(config, rngs=nnx.Rngs(0)), tokenizer, config), teacher)
    result, report = check(f"--config.teacher.source={teacher}")
    assert (result.status, result.err) == (0, "")
    assert found(report)["padded_vocabulary"] == "note"
    assert report["teacher"]["logits"] - report["teacher"]["tokens"] == 8


def test_a_student_without_an_end(check, tiny, tmp_path):
    student = tiny.copy("student", tmp_path / "student")
    changed(student, "tokenizer_config.json", eos_token=None)
    result, report = check(f"--config.student.source={student}")
    assert result.status == 2
    assert found(report)["no_eos"] == "error"
    assert "the student's tokenizer has no end-of-text token" in result.out


def test_samples_of_none_are_one_line(uld, tiny):
    result = uld("check", tiny.config, "--samples=0")
    assert (result.status, result.err) == (2, "error: --samples=0: expected 1 or more\n")


def test_tokens_without_a_row(check, tiny, tmp_path):
    student = tiny.copy("student", tmp_path / "student")
    changed(student, "config.json", vocab_size=200)
    result, report = check(f"--config.student.source={student}")
    assert result.status == 2
    assert found(report)["tokens_beyond"] == "error"
