"""A run that is killed, however often, ends as if it had never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from uld_jax import models
from uld_jax.testing import tiny_gemma, tiny_model
from uld_jax.train import MEASURED

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 14
CONFIG = """
from uld_jax.config import *

def get_config():
    return RunConfig(
        student=ModelConfig(source="{root}/student", max_length=256),
        teacher=TeacherConfig(source="{root}/teacher", max_length=256, max_new_tokens=4),
        data=DataConfig(source="jsonl:{root}/qa.jsonl", data_dir="{root}/tfds", batch_size=4),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        train=TrainConfig(epochs=2, checkpoint_every=2),
        loss=LossConfig(chunk_size=8),
        eval=EvalConfig(max_new_tokens=4),
    )
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two tiny models, 28 + 4 questions and a config: 7 batches an epoch, 2 epochs."""
    root = tmp_path_factory.mktemp("resume")
    models.save_pretrained(tiny_model(seed=1), root / "student")
    teacher = tiny_model(tiny_gemma(kv_heads=2), kind="metaspace", seed=2)
    models.save_pretrained(teacher, root / "teacher")
    records = [
        {
            "context": f"Mill {number} stands by the river and grinds {number} sacks of wheat.",
            "question": f"What does mill {number} grind?",
            "answer": "wheat",
            "split": "eval" if number < 4 else "train",
        }
        for number in range(32)
    ]
    (root / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "config.py").write_text(CONFIG.format(root=root))
    return root


def start(*arguments, log):
    """Starts `uld-jax train` on one device; its output goes to the log."""
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "uld_jax_xla_one_device"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONPATH": str(REPOSITORY),
    }
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "uld_jax.cli.main", "train", *arguments],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def kill_when(process, condition, log):
    """Sends SIGKILL at the moment when the condition holds."""
    while not condition():
        assert process.poll() is None, log.read_text()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def finish(process, log):
    assert process.wait() == 0, log.read_text()


def last_step(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def metrics(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def arrays(item):
    with ocp.PyTreeCheckpointer() as reader:
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        tree = reader.metadata(item).item_metadata.tree
        how = jax.tree.map(lambda _: as_numpy, tree)
        return reader.restore(item, args=ocp.args.PyTreeRestore(restore_args=how))


def checkpoints(workdir):
    """What each checkpoint holds; orbax's file names and times differ from run to run."""
    return {
        folder.name: (
            [arrays(folder / item) for item in ("params", "optimizer")],
            (folder / "data" / "metadata").read_text(),
        )
        for folder in (workdir / "checkpoints").iterdir()
    }


@pytest.fixture(scope="module")
def straight(root):
    """The workdir of the run that nothing disturbs."""
    workdir, log = root / "straight", root / "straight.log"
    finish(start(f"--config={root / 'config.py'}", f"--workdir={workdir}", log=log), log)
    assert last_step(workdir) == STEPS
    return workdir


def assert_same(workdir, expected):
    for name in ("config.json", "before.json", "teacher_answers.json", "after.json"):
        assert (workdir / name).read_bytes() == (expected / name).read_bytes(), name
    assert metrics(workdir) == metrics(expected)
    for path in (expected / "student").iterdir():
        assert (workdir / "student" / path.name).read_bytes() == path.read_bytes(), path.name
    names = [sorted(path.name for path in run.iterdir()) for run in (workdir, expected)]
    assert names[0] == names[1]
    left = checkpoints(workdir)
    assert left.keys() == {str(STEPS - 2), str(STEPS)}
    jax.tree.map(np.testing.assert_array_equal, left, checkpoints(expected))


def test_killed_again_and_again(root, straight):
    seed = int(os.environ.get("ULD_JAX_KILL_SEED", time.time_ns() % 10_000))
    print(f"ULD_JAX_KILL_SEED={seed}")
    rng = random.Random(seed)
    first = rng.randint(1, STEPS - 5)
    second = rng.randint(first + 2, STEPS - 3)
    workdir, log = root / "killed", root / "killed.log"

    process = start(f"--config={root / 'config.py'}", f"--workdir={workdir}", log=log)
    # In the first stage: the config is there, and nothing else.
    kill_when(process, (workdir / "config.json").is_file, log)
    assert not (workdir / "checkpoints").exists()
    for step in (first, second):
        process = start(f"--workdir={workdir}", log=log)
        kill_when(process, lambda step=step: last_step(workdir) >= step, log)
    finish(start(f"--workdir={workdir}", log=log), log)
    assert_same(workdir, straight)
