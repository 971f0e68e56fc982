"""Tiny real models and data on disk, and the command line called on them."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from uld_jax import models
from uld_jax.cli.main import main
from uld_jax.data import load_examples
from uld_jax.testing import tiny_gemma, tiny_model
from uld_jax.train import MEASURED, read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
# Gloo greets from a thread a device, so that the pieces of its lines come in any order.
GLOO = re.compile(
    r"(\[Gloo\] Rank|is connected to|peer ranks\."
    r"|Expected number of connected peer ranks is :|\d|\s)*"
)
CONFIG = """
from uld_jax.config import *

def get_config():
    return RunConfig(
        student=ModelConfig(source="{root}/student", max_length=256),
        teacher=TeacherConfig(source="{root}/teacher", max_length=256, max_new_tokens=4),
        data=DataConfig(source="jsonl:{root}/qa.jsonl", data_dir="{root}/tfds", batch_size=8),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        train=TrainConfig(epochs=2, checkpoint_every=2),
        loss=LossConfig(chunk_size=8),
        eval=EvalConfig(max_new_tokens=4),
    )
"""


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A folder with student/, teacher/, qa.jsonl (16 + 4 questions) and config.py."""

    root: Path

    @property
    def config(self):
        return f"--config={self.root / 'config.py'}"

    @property
    def student(self):
        return self.root / "student"

    def copy(self, name, directory):
        """Copies "student" or "teacher"."""
        return Path(shutil.copytree(self.root / name, directory))

    @staticmethod
    def record(number, **changes):
        return {
            "id": f"q{number}",
            "context": f"The mill number {number} stands by the river and grinds wheat.",
            "question": f"What does mill {number} grind?",
            "answer": f"wheat {number}",
            "split": "eval" if number % 5 == 0 else "train",
            **changes,
        }

    @staticmethod
    def write(path, records):
        """Writes records as JSON lines; returns the flag that makes them the data."""
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return f"--config.data.source=jsonl:{path}"

    @staticmethod
    def change_weights(directory, change):
        """Rewrites a model directory's weights by a function of the dict of tensors."""
        path = directory / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    models.save_pretrained(tiny_model(seed=1), root / "student")
    teacher = tiny_model(tiny_gemma(kv_heads=2), kind="metaspace", seed=2)
    models.save_pretrained(teacher, root / "teacher")
    Tiny.write(root / "qa.jsonl", [Tiny.record(number) for number in range(20)])
    # Prepared beforehand, so that no command prints the notice of a first use.
    load_examples(f"jsonl:{root / 'qa.jsonl'}", "train", data_dir=root / "tfds")
    (root / "config.py").write_text(CONFIG.format(root=root))
    return Tiny(root)


@pytest.fixture(scope="session")
def silent_teacher(tiny):
    """A teacher whose every token is padding, so that all its answers are empty."""
    directory = tiny.copy("teacher", tiny.root / "silent_teacher")

    def silence(tensors):
        # Gemma scales by 1 + weight: no scale, no logits, and the first of equals is padding.
        tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], -1.0)

    tiny.change_weights(directory, silence)
    return directory


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command has left on the terminal; `out` without line breaks."""

    status: int
    out: str
    err: str


@pytest.fixture
def uld(capsys):
    """Runs one command in this process."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, " ".join(captured.out.split()), captured.err)

    return run


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """The workdir of a whole run; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", tiny.config, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def unfinished(trained, tmp_path):
    """A copy of that run as a kill after the last checkpoint leaves it."""
    workdir = tmp_path / "unfinished"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "student")
    (workdir / "after.json").unlink()
    return workdir


class Pod:
    """Several processes of one command on this machine, as launch/local_multiprocess.py has them.

    Attributes:
        heartbeat: Seconds until a process that is gone is missed.
    """

    heartbeat = 10
    # What the launcher ends with where one process is killed and the other misses it: where both
    # have gone when it looks, it cannot tell which was the first.
    lost = (128 + signal.SIGKILL, 75)

    def environment(self, **changes):
        """What this process has compiled for its eight devices need not be compiled again."""
        return os.environ | {
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            "PYTHONPATH": str(REPOSITORY),
            **changes,
        }

    def start(self, processes, devices, *arguments, log, grace=60, **changes):
        """Starts the launcher; all output goes to the log."""
        layout = [f"--processes={processes}", f"--devices={devices}", f"--grace={grace}", "--"]
        launcher = REPOSITORY / "launch" / "local_multiprocess.py"
        command = [sys.executable, launcher, *layout, *arguments, f"--heartbeat={self.heartbeat}"]
        return self.popen(command, log=log, env=self.environment(**changes))

    def popen(self, command, *, log, **options):
        with log.open("w") as file:
            return subprocess.Popen(
                [*map(str, command)], stdout=file, stderr=subprocess.STDOUT, **options
            )

    def run(self, processes, devices, *arguments, log):
        """Lets it run to its end."""
        process = self.start(processes, devices, *arguments, log=log)
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]

    def member(self, index, workdir):
        """The pid of one of the launcher's processes; None where there is none yet."""
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().decode().split("\0")
            except OSError:
                continue
            if f"--workdir={workdir}" in words and f"--process={index}" in words:
                return int(entry.parent.name)
        return None

    def wait_until(self, condition, process, log, *, look=0.02):
        """Returns what the condition does once that is true; the processes still run then."""
        while not (found := condition()):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(look)
        return found

    def wait_for_step(self, workdir, step, process, log):
        def reached():
            return any(row["step"] >= step for row in read_metrics(workdir))

        self.wait_until(reached, process, log)

    def fill_disk(self, index, workdir, process, log, *, size):
        """From now on one process cannot write a file larger than that."""
        pid = self.wait_until(lambda: self.member(index, workdir), process, log)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))

    def said(self, log, index):
        """The lines of one process, without those of Gloo."""
        start = f"[{index}] "
        lines = [line for line in log.read_text().splitlines() if line.startswith(start)]
        said = [line.removeprefix(start) for line in lines]
        return [line for line in said if not GLOO.fullmatch(line)]

    def has_missed_another(self, log, index):
        """Whether a process has said that another is gone, in our words or in those of jax."""
        signs = ("another process is gone", "another task died")
        return any(sign in line for line in self.said(log, index) for sign in signs)


@pytest.fixture(scope="session")
def pod():
    return Pod()


@pytest.fixture(scope="session")
def two(pod, tiny, tmp_path_factory):
    """The workdir of a run on two processes of four devices; copy it before changing it."""
    root = tmp_path_factory.mktemp("two")
    pod.run(2, 4, "train", tiny.config, f"--workdir={root / 'run'}", log=root / "log")
    return root / "run"


def rows_of(workdir):
    """The metrics, without what no two runs share."""
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in read_metrics(workdir)
    ]


@pytest.fixture(scope="session")
def assert_same_run():
    """Losses of every step to 1e-6, the same answers before, and a student like the other's."""

    def check(workdir, trained, *, exact=False):
        found, expected = rows_of(workdir), rows_of(trained)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for row, other in zip(found, expected, strict=True):
            assert row.keys() == other.keys()
            for name, value in other.items():
                near = pytest.approx(value, rel=1e-6, abs=1e-6)
                assert row[name] == (value if exact else near), (row["step"], name)
        names = ["before.json", "teacher_answers.json"]
        if exact:
            names += ["after.json", *(f"student/{p.name}" for p in (trained / "student").iterdir())]
        for name in names:
            assert (workdir / name).read_bytes() == (trained / name).read_bytes(), name
        for folder in ("", "student", "checkpoints"):
            names = [sorted(p.name for p in (run / folder).iterdir()) for run in (workdir, trained)]
            assert names[0] == names[1]

    return check


@pytest.fixture
def after_step_two(two, tmp_path):
    """A copy of that run as it was when only its first checkpoint had been written."""
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    for left in ("student", "checkpoints/4"):
        shutil.rmtree(workdir / left)
    for left in ("after.json", "loss.png"):
        (workdir / left).unlink()
    return workdir
