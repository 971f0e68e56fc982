"""Damaged checkpoints and full disks: said in one line, and the run's result stays the same."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from uld_jax import models
from uld_jax.testing import tiny_config, tiny_gemma, tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]


def largest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_same_result(workdir, expected):
    for name in ("student/model.safetensors", "before.json", "after.json"):
        assert (workdir / name).read_bytes() == (expected / name).read_bytes(), name
    assert sorted(path.name for path in workdir.iterdir()) == sorted(
        path.name for path in expected.iterdir()
    )


@pytest.mark.parametrize("damage", [cut, flip_one_bit, Path.unlink])
def test_damaged_newest_checkpoint(uld, trained, unfinished, caplog, damage):
    newest = unfinished / "checkpoints" / "4"
    damage(largest_file(newest))
    result = uld("train", f"--workdir={unfinished}")
    assert (result.status, result.err) == (0, "")
    (message,) = [
        record.getMessage()
        for record in caplog.records
        if record.name == "uld_jax.train.checkpoint"
    ]
    assert message == f"checkpoint {newest} is damaged or not complete: trying step 2"
    assert "step 3/4" in result.out
    assert "step 1/4" not in result.out
    assert_same_result(unfinished, trained)


def test_all_checkpoints_damaged(uld, trained, unfinished, caplog):
    for step in (2, 4):
        cut(largest_file(unfinished / "checkpoints" / str(step)))
    result = uld("train", f"--workdir={unfinished}")
    assert result.status == 0
    messages = [record.getMessage() for record in caplog.records]
    assert "no whole checkpoint is left: starting again from the beginning" in messages
    assert "step 1/4" in result.out
    assert_same_result(unfinished, trained)


def test_what_a_kill_left_half_written_is_removed(uld, trained, unfinished):
    (unfinished / ".after.json.4711").write_text("{")
    (unfinished / ".student-x1y2").mkdir()
    (unfinished / ".student-x1y2" / "config.json").write_text("{}")
    result = uld("train", f"--workdir={unfinished}")
    assert (result.status, result.err) == (0, "")
    assert_same_result(unfinished, trained)


def test_evaluating_removes_no_checkpoint(uld, unfinished):
    cut(largest_file(unfinished / "checkpoints" / "4"))
    before = sorted((unfinished / "checkpoints").rglob("*"))
    assert uld("evaluate", f"--workdir={unfinished}").status == 0
    assert sorted((unfinished / "checkpoints").rglob("*")) == before


@pytest.mark.parametrize("family", ["wider", "gemma"])
def test_checkpoint_of_another_model(uld, tiny, unfinished, tmp_path, other_students, family):
    config = unfinished / "config.json"
    config.write_text(config.read_text().replace(str(tiny.student), str(other_students[family])))
    result = uld("train", f"--workdir={unfinished}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"checkpoint {unfinished / 'checkpoints' / '4'} is of another model" in result.err
    assert "give student.source the model that the run began with" in result.err
    assert sorted(path.name for path in (unfinished / "checkpoints").iterdir()) == ["2", "4"]


@pytest.fixture(scope="module")
def other_students(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    models.save_pretrained(tiny_model(tiny_config(width=64)), root / "wider")
    models.save_pretrained(tiny_model(tiny_gemma(kv_heads=2)), root / "gemma")
    return {name: root / name for name in ("wider", "gemma")}


def uld_process(*arguments, largest=resource.RLIM_INFINITY):
    """Runs a command in a process of its own, where no file may grow over a size."""
    code = (
        "import resource, sys; from uld_jax.cli.main import run; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, {largest})); run()"
    )
    environment = os.environ | {
        # What this process has compiled for its eight devices need not be compiled again. Nothing
        # is added: a program is larger than the files allowed here, and JAX warns of that.
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
        "PYTHONPATH": str(REPOSITORY),
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_disk_full_of_answers(tiny, trained, tmp_path):
    workdir = tmp_path / "full"
    result = uld_process("train", tiny.config, f"--workdir={workdir}", largest=30_000)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {workdir}/")
    assert "a shard could not be written (File too large); make room there" in line
    assert result.returncode == 2
    result = uld_process("train", f"--workdir={workdir}")
    assert (result.returncode, result.stderr) == (0, "")
    assert_same_result(workdir, trained)


def test_disk_full_of_checkpoints(tiny, trained, tmp_path):
    workdir = tmp_path / "full"
    workdir.mkdir()
    # Answers are in larger files than checkpoints of tiny models: they would fail before.
    shutil.copy(trained / "teacher_answers.json", workdir)
    # So small that several pieces of one array fail: one line tells of all of them.
    result = uld_process("train", tiny.config, f"--workdir={workdir}", largest=4_000)
    (line,) = result.stderr.splitlines()
    expected = f"{workdir / 'checkpoints'}: a checkpoint could not be written (File too large)"
    assert line.startswith(f"error: {expected}; make room there")
    assert result.returncode == 2
    result = uld_process("train", f"--workdir={workdir}")
    assert (result.returncode, result.stderr) == (0, "")
    assert_same_result(workdir, trained)


def test_disk_too_full_for_the_export(unfinished, tmp_path):
    newest = unfinished / "checkpoints" / "4"
    cut(largest_file(newest))
    output = tmp_path / "exports" / "student"
    result = uld_process("export", f"--workdir={unfinished}", f"--output={output}", largest=90_000)
    assert result.returncode == 2
    warning, error = result.stderr.splitlines()
    assert warning == f"WARNING: checkpoint {newest} is damaged or not complete: trying step 2"
    assert error.startswith(f"error: {output}: the model could not be written: ")
    assert list(output.parent.iterdir()) == []
