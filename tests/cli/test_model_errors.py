"""Broken models by the command itself: a process that exits with 2 and says one line."""

import json
import os
import subprocess
import sys

import pytest

WEIGHTS = "model.safetensors"


@pytest.fixture
def command(tiny, tmp_path):
    """Runs `uld-jax train` in a process; returns its status and both streams."""

    def run(directory):
        flags = [
            tiny.config,
            f"--workdir={tmp_path / 'run'}",
            f"--config.teacher.source={directory}",
        ]
        code = "from uld_jax.cli.main import run; run()"
        return subprocess.run(
            [sys.executable, "-c", code, "train", *flags],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

    return run


def unsupported_fields(directory):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expert_count": 8, "made_up": 3}))
    return f"{path}: model_type 'gemma3_text': unsupported: expert_count=8, made_up=3; use a model"


def index_of_elsewhere(directory):
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": "../x.safetensors"}}))
    return f"{path}: model.norm.weight should be in a .safetensors file of this directory,"


def pickled(directory):
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")
    return f"{directory / WEIGHTS}: no such weights file, only ['pytorch_model.bin'], and pickle"


@pytest.mark.parametrize("spoil", [unsupported_fields, index_of_elsewhere, pickled])
def test_one_line_and_status_two(command, tiny, tmp_path, spoil):
    directory = tiny.copy("teacher", tmp_path / "model")
    said = spoil(directory)
    result = command(directory)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
