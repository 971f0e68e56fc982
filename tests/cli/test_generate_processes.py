"""`uld-jax generate` as real processes: killed at random moments, and two of them together."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from uld_jax.data import load_examples

REPOSITORY = Path(__file__).resolve().parents[2]
# Two samples of each of 16 questions, a shard a question.
FLAGS = [
    "--config.generate.temperature=1.5",
    "--config.generate.samples=2",
    "--config.generate.shard_size=1",
]


def start(command, log):
    """Starts Python on one device; its output goes to the log."""
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "uld_jax_xla_one_device"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONPATH": str(REPOSITORY),
    }
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def generate(tiny, directory):
    arguments = [tiny.config, f"--output={directory}", *FLAGS]
    return start(["-m", "uld_jax.cli.main", "generate", *arguments], directory.with_suffix(".log"))


def contents(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def ids_in(directory):
    return [example.id for example in load_examples(f"generated:{directory}", "train")]


def dropped_from(directory):
    shards = json.loads((directory / "manifest.json").read_text())["shards"]
    return [id_ for shard in shards for ids in shard["dropped"].values() for id_ in ids]


def finish(process, log):
    assert process.wait() == 0, log.read_text()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """What a command that nothing disturbs leaves."""
    directory = tmp_path_factory.mktemp("whole") / "answers"
    finish(generate(tiny, directory), directory.with_suffix(".log"))
    return directory


def shards_done(directory):
    return len(list(directory.glob("answers-*.json")))


@pytest.mark.slow
def test_killed_ten_times_the_answers_are_the_same(tiny, whole, tmp_path):
    seed = int(os.environ.get("ULD_JAX_KILL_SEED", time.time_ns() % 10_000))
    print(f"ULD_JAX_KILL_SEED={seed}")
    rng = random.Random(seed)
    directory, log = tmp_path / "answers", tmp_path / "answers.log"
    # Some before it has begun, the others so many shards later, and one at the very end.
    steps = [0, 0, 0, 0, *(rng.randint(1, 3) for _ in range(5))]
    rng.shuffle(steps)
    done = [shards_done(directory)]
    for step in [*steps, None]:
        process = generate(tiny, directory)
        if step == 0:
            time.sleep(rng.uniform(0, 2))
        else:
            while process.poll() is None and not (
                (directory / "features.json").exists()
                if step is None
                else shards_done(directory) >= done[-1] + step
            ):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
        if step is not None:
            assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGKILL)
        assert process.wait() in ((-signal.SIGKILL,) if step is not None else (-signal.SIGKILL, 0))
        done.append(shards_done(directory))
    finish(generate(tiny, directory), log)
    assert len(set(done)) > 4
    assert contents(directory) == contents(whole)
    asked = [f"q{n}#{sample}" for n in range(20) if n % 5 for sample in (0, 1)]
    assert sorted(ids_in(directory) + dropped_from(directory)) == sorted(asked)


def test_two_processes_share_the_shards(tiny, whole, tmp_path):
    directory = tmp_path / "answers"
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    arguments = ["generate", tiny.config, f"--output={directory}", *FLAGS]
    together = [f"--coordinator={address}", "--processes=2"]
    processes = [
        start(["-m", "uld_jax.cli.main", *arguments, *together, f"--process={number}"], log)
        for number, log in enumerate(logs)
    ]
    for process, log in zip(processes, logs, strict=True):
        finish(process, log)
    assert contents(directory) == contents(whole)
    said = [log.read_text() for log in logs]
    # Only the first one finishes, and speaks.
    assert ["answers of" in text for text in said] == [True, False]
    assert "16/16" in said[0]  # half of the 32 answers
    assert "tokens/s" not in said[1]
