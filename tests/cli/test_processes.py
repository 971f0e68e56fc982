"""Training as several processes: the same run, checkpoints of any layout, and what ends one."""

import json
import os
import re
import shutil
import signal
import time

import pytest

from uld_jax.train import read_metrics


def test_two_processes_have_the_losses_of_one(two, trained, assert_same_run):
    assert_same_run(two, trained)


def test_only_the_first_process_speaks(two, pod):
    log = two.parent / "log"
    assert any(line.startswith("step 4/4: loss") for line in pod.said(log, 0))
    assert pod.said(log, 1) == []


def test_four_go_on_from_a_checkpoint_of_two_and_one_from_theirs(
    pod, trained, after_step_two, assert_same_run, uld, tmp_path
):
    workdir = after_step_two
    pod.run(4, 2, "train", f"--workdir={workdir}", log=tmp_path / "log")
    assert_same_run(workdir, trained)
    for left in ("student", "checkpoints/4"):
        shutil.rmtree(workdir / left)
    (workdir / "after.json").unlink()
    assert uld("train", f"--workdir={workdir}").status == 0
    assert_same_run(workdir, trained)


def test_sigterm_saves_the_step_under_way_and_the_run_goes_on(
    pod, tiny, trained, assert_same_run, uld, tmp_path
):
    workdir, log = tmp_path / "run", tmp_path / "log"
    process = pod.start(2, 4, "train", tiny.config, f"--workdir={workdir}", log=log)
    pod.wait_for_step(workdir, 2, process, log)
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


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_where_one_process_is_killed_the_others_stop(pod, tiny, tmp_path, victim):
    workdir, log = tmp_path / "run", tmp_path / "log"
    arguments = ("train", tiny.config, f"--workdir={workdir}", "--config.train.epochs=50")
    process = pod.start(2, 4, *arguments, log=log)
    pod.wait_for_step(workdir, 2, process, log)
    os.kill(pod.member(victim, workdir), signal.SIGKILL)
    killed = time.monotonic()
    status = process.wait(timeout=90)
    assert status in pod.lost
    # Not by the launcher's patience, which is longer.
    assert time.monotonic() - killed < 3 * pod.heartbeat
    assert pod.has_missed_another(log, 1 - victim)
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
