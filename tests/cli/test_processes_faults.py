"""The fault table of a run on several processes; kills between writes are in test_processes.py."""

import os
import random
import signal
import socket
import sys
import time

import pytest

from uld_jax.data import load_examples
from uld_jax.train import read_metrics

CODE = "from uld_jax.cli import distributed, main; distributed.START = {start}; main.run()"
BAR = "import sys; print('45 %', end='', file=sys.stderr, flush=True); "
RUN = "from uld_jax.cli import main; main.run()"


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def unfinished_write(workdir):
    """The folder of a checkpoint that is being written."""
    return next((workdir / "checkpoints").glob("*tmp*"), None)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_during_a_checkpoint_write(
    pod, two, after_step_two, assert_same_run, tmp_path, victim
):
    workdir, log = after_step_two, tmp_path / "log"
    process = pod.start(2, 4, "train", f"--workdir={workdir}", log=log)
    pid = pod.wait_until(lambda: pod.member(victim, workdir), process, log)
    pod.wait_until(lambda: unfinished_write(workdir), process, log, look=0.0005)
    kill(pid)
    killed = time.monotonic()
    assert process.wait(timeout=90) in pod.lost
    assert time.monotonic() - killed < 3 * pod.heartbeat
    assert pod.has_missed_another(log, 1 - victim)
    assert unfinished_write(workdir)
    assert not (workdir / "checkpoints" / "4").exists()
    pod.run(2, 4, "train", f"--workdir={workdir}", log=log)
    assert "step 3/4" in log.read_text()
    assert "step 2/4" not in log.read_text()
    assert_same_run(workdir, two, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [(0, 1), (1,)], ids=["all", "one"])
def test_disk_full_of_checkpoints(pod, two, after_step_two, assert_same_run, tmp_path, victims):
    workdir, log = after_step_two, tmp_path / "log"
    before = {p: p.read_bytes() for p in (workdir / "checkpoints" / "2").rglob("*") if p.is_file()}
    # A program is larger than the files allowed here: none is added to those compiled.
    uncached = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    process = pod.start(2, 4, "train", f"--workdir={workdir}", log=log, **uncached)
    for victim in victims:
        pod.fill_disk(victim, workdir, process, log, size=8_000)
    assert process.wait(timeout=120) == 2, log.read_text()[-3000:]
    expected = f"{workdir / 'checkpoints'}: a checkpoint could not be written (File too large)"
    for index in (0, 1):
        errors = [line for line in pod.said(log, index) if "error" in line.lower()]
        assert len(errors) == 1, log.read_text()[-3000:]
        assert expected in errors[0]
    assert {p: p.read_bytes() for p in before} == before
    assert not (workdir / "checkpoints" / "4").exists()
    pod.run(2, 4, "train", f"--workdir={workdir}", log=log)
    assert "step 2/4" not in log.read_text()
    assert_same_run(workdir, two, exact=True)


@pytest.fixture
def apart(pod, tiny, tmp_path):
    """Starts a process each in a folder of its own, where its data are found."""
    processes = []

    def start(*folders, workdir, first=RUN):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{sock.getsockname()[1]}"
        flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        for number, folder in enumerate(folders):
            together = [f"--coordinator={address}", f"--processes={len(folders)}"]
            code = RUN if number else first
            command = [sys.executable, "-c", code, "train", tiny.config, *together]
            command += [f"--process={number}", f"--workdir={workdir}", "--heartbeat=10"]
            command += ["--config.data.source=jsonl:qa.jsonl", "--config.data.data_dir=prepared"]
            environment = pod.environment(**flags)
            log = tmp_path / f"{number}.log"
            processes.append(pod.popen(command, log=log, env=environment, cwd=folder))
        ends = [process.wait(timeout=90) for process in processes]
        return ends, [(tmp_path / f"{number}.log").read_text() for number in range(len(folders))]

    yield start
    for process in processes:
        process.kill()


def folder_of_data(tiny, folder, count=20):
    folder.mkdir()
    tiny.write(folder / "qa.jsonl", [tiny.record(number) for number in range(count)])
    # Prepared beforehand, so that the command prints nothing of its own.
    load_examples(f"jsonl:{folder / 'qa.jsonl'}", "train", data_dir=folder / "prepared")
    return folder


def errors_in(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_data_missing_on_one_host(apart, tiny, tmp_path):
    whole, workdir = folder_of_data(tiny, tmp_path / "whole"), tmp_path / "run"
    bare = tmp_path / "bare"
    bare.mkdir()
    start = time.monotonic()
    # A progress bar has the line on which the first reports what the other says.
    ends, said = apart(whole, bare, workdir=workdir, first=BAR + RUN)
    assert time.monotonic() - start < 60
    assert ends == [2, 2], said
    [[other], [own]] = map(errors_in, said)
    assert "qa.jsonl" in own
    assert other == own.replace("error: ", "error: process 1: ")
    assert not workdir.exists()


def test_other_data_on_one_host(apart, tiny, tmp_path):
    folders = [folder_of_data(tiny, tmp_path / str(count), count) for count in (20, 22)]
    workdir = tmp_path / "run"
    ends, said = apart(*folders, workdir=workdir)
    assert ends == [2, 2], said
    for text in said:
        [error] = errors_in(text)
        assert "jsonl:qa.jsonl, split train: process 1 of 2 has other examples" in error
    assert not workdir.exists()


def test_nobody_answers_at_the_address_of_the_coordinator(pod, tiny, tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    together = [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--process=1"]
    command = [sys.executable, "-c", CODE.format(start=3), "train", tiny.config, *together]
    log, start = tmp_path / "log", time.monotonic()
    process = pod.popen([*command, f"--workdir={tmp_path / 'run'}"], log=log, env=pod.environment())
    assert process.wait(timeout=60) == 2, log.read_text()
    assert time.monotonic() - start < 60
    [error] = log.read_text().splitlines()
    assert error.startswith("error: the processes did not find each other within 3 s")
    assert not (tmp_path / "run").exists()


def last_step(workdir):
    return max((row["step"] for row in read_metrics(workdir)), default=0)


@pytest.mark.slow
def test_killed_twenty_times(pod, tiny, assert_same_run, tmp_path):
    seed = int(os.environ.get("ULD_JAX_KILL_SEED", time.time_ns() % 10_000))
    rng, kills, survived = random.Random(seed), 20, 0
    # 100 steps, of two processes that have a half of all parameters each.
    arguments = ["train", tiny.config, "--config.train.epochs=50", "--config.mesh.fsdp=2"]
    straight, workdir, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "log"
    begin = time.monotonic()
    process = pod.start(2, 1, *arguments, f"--workdir={straight}", log=log)
    pod.wait_for_step(straight, 1, process, log)
    until_training = time.monotonic() - begin
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    # Half of them at any time before the first step, half after so many more steps.
    for early in rng.sample([True, False] * (kills // 2), kills):
        # Others that still wait for the one killed to come are ended after the grace.
        command = [*arguments, f"--workdir={workdir}"]
        process = pod.start(2, 1, *command, log=log, grace=2 * pod.heartbeat)
        victim = rng.randrange(2)
        pid = pod.wait_until(lambda v=victim: pod.member(v, workdir), process, log)
        steps = last_step(workdir) + (1 if early else rng.randint(1, 3))
        latest = time.monotonic() + (rng.uniform(0, until_training) if early else float("inf"))

        def due(steps=steps, latest=latest):
            return time.monotonic() > latest or last_step(workdir) >= steps

        pod.wait_until(due, process, log)
        time.sleep(rng.uniform(0, 0.2))
        kill(pid)
        assert process.wait(timeout=120) in pod.lost, log.read_text()[-3000:]
        survived += 1
        done = last_step(workdir)
        print(f"seed {seed}: process {victim} killed after step {done}: {survived} / {kills}")
    pod.run(2, 1, *arguments, f"--workdir={workdir}", log=log)
    assert_same_run(workdir, straight, exact=True)
    print(f"survived {survived} / {kills}")
