"""Commands in a process of their own, for libtpu stays loaded in the process that has used it.

Run as a script, this file calls `uld-jax` with each list of arguments that it is given as JSON, and
prints what came of each.
"""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from uld_jax.cli.main import main
from uld_jax.models import Policy
from uld_jax.models.families import by_model_type
from uld_jax.models.flash import choose_backend
from uld_jax.plan import get_slice
from uld_jax.sharding import make_mesh, platform
from uld_jax.testing import tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]
STUDENT = tiny_config(vocab_size=512, width=128, head_dim=32, mlp_width=256, layers=3)


def write_config(config, directory):
    """A model that is nothing but a config.json."""
    by_model_type(config.family, "").config_to_hf(config).save_pretrained(directory)


def run_commands(commands):
    """Name to status, output and errors, of commands given by name; skips without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is absent: pip install 'uld-jax[plan]'")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "COLUMNS": "400"}
    command = [sys.executable, __file__, json.dumps(commands)]
    found = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


def call(arguments):
    """Status, output and errors of one command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def attention_on_tpu():
    """What "auto" takes where the mesh is of TPUs, and where there is none."""
    mesh = make_mesh(1, 2, 2, devices=get_slice("v5e:2x2").devices)
    with jax.set_mesh(mesh):
        there = platform(), choose_backend(STUDENT, Policy(), 128)
    return [there, (platform(), choose_backend(STUDENT, Policy(), 128))]


if __name__ == "__main__":
    results = {name: call(arguments) for name, arguments in json.loads(sys.argv[1]).items()}
    print(json.dumps(results | {"attention": attention_on_tpu()}))
