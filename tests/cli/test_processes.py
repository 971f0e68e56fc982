"""Training as several processes: the same run, checkpoints of any layout, and what ends one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from uld_jax.train import MEASURED, read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "launch" / "local_multiprocess.py"
STEPS = 4
# Seconds until a process that is gone is missed.
HEARTBEAT = 10


def start(processes, devices, *arguments, log):
    """Starts the launcher; all output goes to the log."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONPATH": str(REPOSITORY),
    }
    layout = [f"--processes={processes}", f"--devices={devices}", "--grace=60", "--"]
    command = [sys.executable, LAUNCHER, *layout, *arguments, f"--heartbeat={HEARTBEAT}"]
    with log.open("w") as file:
        return subprocess.Popen(
            [*map(str, command)], env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def run(processes, devices, *arguments, log):
    status = start(processes, devices, *arguments, log=log).wait(timeout=300)
    assert status == 0, log.read_text()[-3000:]


def rows_of(workdir):
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in read_metrics(workdir)
    ]


def assert_same_run(workdir, trained):
    """Losses of every step to 1e-6, the same answers before, and a student like the other's."""
    found, expected = rows_of(workdir), rows_of(trained)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-6), (row["step"], name)
    for name in ("before.json", "teacher_answers.json"):
        assert (workdir / name).read_bytes() == (trained / name).read_bytes()
    assert {path.name for path in workdir.iterdir()} == {path.name for path in trained.iterdir()}


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """The workdir of a run on two processes of four devices."""
    root = tmp_path_factory.mktemp("two")
    run(2, 4, "train", tiny.config, f"--workdir={root / 'run'}", log=root / "log")
    return root / "run"


def after_step_two(workdir, copy):
    """A run as it was when only its first checkpoint had been written."""
    shutil.copytree(workdir, copy)
    for left in ("student", f"checkpoints/{STEPS}"):
        shutil.rmtree(copy / left)
    for left in ("after.json", "loss.png"):
        (copy / left).unlink()
    return copy


def test_two_processes_have_the_losses_of_one(two, trained):
    assert_same_run(two, trained)


def test_only_the_first_process_speaks(two):
    lines = (two.parent / "log").read_text().splitlines()
    said = [line for line in lines if "Gloo" not in line]
    assert [line for line in said if line.startswith("[0] step 4/4: loss")]
    assert [line for line in said if line.startswith("[1]")] == []


def test_four_go_on_from_a_checkpoint_of_two_and_one_from_theirs(two, trained, uld, tmp_path):
    four = after_step_two(two, tmp_path / "four")
    run(4, 2, "train", f"--workdir={four}", log=tmp_path / "log")
    assert_same_run(four, trained)
    one = after_step_two(four, tmp_path / "one")
    assert uld("train", f"--workdir={one}").status == 0
    assert_same_run(one, trained)


def wait_for_step(workdir, step, log, process):
    while not any(row["step"] >= step for row in read_metrics(workdir)):
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.02)


def process_number(index, workdir):
    """The pid of one of the launcher's processes."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().split("\0")
        except OSError:
            continue
        if f"--workdir={workdir}" in words and f"--process={index}" in words:
            return int(entry.parent.name)
    raise AssertionError(f"no process {index}")


def test_sigterm_saves_the_step_under_way_and_the_run_goes_on(tiny, trained, uld, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    process = start(2, 4, "train", tiny.config, f"--workdir={workdir}", log=log)
    wait_for_step(workdir, 2, log, process)
    process.send_signal(signal.SIGTERM)
    status = process.wait(timeout=60)
    if status == 0:
        pytest.skip("the run had ended before the signal came")
    assert status == 75, log.read_text()[-3000:]
    said = re.findall(
        r"\[(\d)\] stopped on request after step (\d), which is saved: run the same command again",
        log.read_text(),
    )
    assert {index for index, _ in said} == {"0", "1"}
    (step,) = {int(step) for _, step in said}
    assert (workdir / "checkpoints" / str(step)).is_dir()
    assert read_metrics(workdir)[-1]["step"] == step
    assert uld("train", f"--workdir={workdir}").status == 0
    shutil.rmtree(workdir / "checkpoints")
    shutil.copytree(trained / "checkpoints", workdir / "checkpoints")
    assert_same_run(workdir, trained)


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_process_is_killed_the_others_stop(tiny, tmp_path, victim):
    workdir, log = tmp_path / "run", tmp_path / "log"
    arguments = ("train", tiny.config, f"--workdir={workdir}", "--config.train.epochs=50")
    process = start(2, 4, *arguments, log=log)
    wait_for_step(workdir, 2, log, process)
    os.kill(process_number(victim, workdir), signal.SIGKILL)
    killed = time.monotonic()
    status = process.wait(timeout=90)
    assert status == 128 + signal.SIGKILL
    # Not by the launcher's patience, which is longer.
    assert time.monotonic() - killed < 3 * HEARTBEAT
    other = [line for line in log.read_text().splitlines() if line.startswith(f"[{1 - victim}] ")]
    assert any("another process is gone" in line or "another task died" in line for line in other)
    assert json.loads((workdir / "config.json").read_text())["train"]["epochs"] == 50


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--processes=2"], "--coordinator (or JAX_COORDINATOR_ADDRESS), --process"),
        (["--processes=2", "--process=2", "--coordinator=h:1"], "--process: expected 0 to 1"),
        (["--processes=two", "--process=0", "--coordinator=h:1"], "--processes: expected a number"),
        (["--processes=2", "--process=0", "--coordinator=h"], "--coordinator: expected HOST:PORT"),
    ],
)
def test_flags_that_have_no_sense(tiny, uld, tmp_path, flags, expected):
    result = uld("train", tiny.config, f"--workdir={tmp_path / 'run'}", *flags)
    assert result.status == 2
    assert result.err.startswith(f"error: {expected}")
    assert not (tmp_path / "run").exists()
