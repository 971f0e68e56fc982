"""Tiny real models and data on disk, and the command line called on them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from uld_jax import models
from uld_jax.cli.main import main
from uld_jax.data import load_examples
from uld_jax.testing import tiny_gemma, tiny_model

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
