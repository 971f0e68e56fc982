"""`uld-jax train` with a teacher on devices of its own: whole runs, one killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from uld_jax.train import MEASURED

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = (
    "--config.teacher.mode=stream",
    "--config.teacher.devices=4",
    "--config.teacher.tensor=2",
    "--config.teacher.stream_depth=2",
    "--config.mesh.data=4",
    "--config.train.epochs=4",
)


def rows_of(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


@pytest.fixture(scope="module")
def streamed(tiny, tmp_path_factory):
    from uld_jax.cli.main import main

    workdir = tmp_path_factory.mktemp("stream") / "run"
    assert main(["train", tiny.config, f"--workdir={workdir}", *FLAGS]) == 0
    return workdir


def test_the_run_has_the_losses_of_an_online_one(tiny, streamed, uld, tmp_path):
    online = tmp_path / "online"
    assert uld("train", tiny.config, f"--workdir={online}", "--config.train.epochs=4").status == 0
    answers = "teacher_answers.json"
    assert (streamed / answers).read_bytes() == (online / answers).read_bytes()
    rows = rows_of(streamed)
    assert len(rows) == 8
    for found, expected in zip(rows, rows_of(online), strict=True):
        for name in ("total", "cross_entropy", "uld"):
            assert found[name] == pytest.approx(expected[name], abs=1e-5, rel=0)
        assert found["uld_error"] == pytest.approx(4e-6)


def test_its_student_is_evaluated_on_its_own_devices(streamed, uld, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(streamed, workdir)
    assert uld("evaluate", f"--workdir={workdir}").status == 0


def test_killed_and_resumed(tiny, streamed, tmp_path):
    workdir, log = tmp_path / "killed", tmp_path / "log"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "32",
        "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "uld_jax_xla"),
        "PYTHONPATH": str(REPOSITORY),
    }

    def start(*arguments):
        with log.open("a") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "uld_jax.cli.main", "train", *arguments],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    process = start(tiny.config, f"--workdir={workdir}", *FLAGS)
    while len(rows_of(workdir)) < 3:
        assert process.poll() is None, log.read_text()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start(f"--workdir={workdir}").wait() == 0, log.read_text()
    assert rows_of(workdir) == rows_of(streamed)
    name = "student/model.safetensors"
    assert (workdir / name).read_bytes() == (streamed / name).read_bytes()


def test_too_many_devices_are_one_line(tiny, uld, tmp_path):
    flags = "--config.teacher.mode=stream", "--config.teacher.devices=8"
    result = uld("train", tiny.config, f"--workdir={tmp_path / 'run'}", *flags)
    assert result.status == 2
    assert "teacher.devices: expected less than the 8 devices of a process" in result.err
    assert not (tmp_path / "run").exists()
