"""Whole runs of `uld-jax cache` on tiny real models, killed ones too."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from uld_jax import config as configs
from uld_jax import models
from uld_jax.cli import compose
from uld_jax.cli.examples import load_split
from uld_jax.cli.main import main
from uld_jax.data import SignalStore
from uld_jax.teacher import open_cache, provenance, read_answers, teacher_texts

SMALL = ["--config.teacher.cache_shard_size=3", "--config.teacher.batch_size=2"]


def contents(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


@pytest.fixture(scope="module")
def cached(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("cached") / "cache"
    assert main(["cache", tiny.config, f"--output={output}", *SMALL]) == 0
    return output


def expected_by_training(tiny, cached, **overrides):
    """What a run without the teacher's weights knows."""
    config, errors = configs.apply_overrides(configs.load(str(tiny.root / "config.py")), overrides)
    assert not errors
    m = models.load_tokenizer(config.teacher.source)
    side, examples = (
        compose.side_of(config.teacher, m, config.data),
        load_split(config, "train"),
    )
    answers = read_answers(cached, config, m, side, examples)
    texts = teacher_texts(examples, answers, side, pool=examples, seed=config.data.seed)
    return provenance(config, m, side, examples, answers, texts)


def test_it_leaves_signals_answers_and_a_manifest(tiny, trained, cached):
    assert sorted(contents(cached)) == [
        "answers.json",
        "manifest.json",
        *(f"signals-0000{shard}.array_record" for shard in range(6)),
    ]
    store = open_cache(cached, expected_by_training(tiny, cached))
    answers = json.loads((cached / "answers.json").read_text())["answers"]
    assert answers == json.loads((trained / "teacher_answers.json").read_text())
    assert {id_ for id_, answer in answers.items() if answer} == {
        id_ for id_ in answers if id_ in store
    }
    assert store.manifest["over_bound"] == 0
    assert store.manifest["positions"] == sum(len(store[id_]) for id_ in answers if id_ in store)


def test_it_says_what_it_costs(uld, tiny, tmp_path):
    flags = [*SMALL, "--config.data.answers=gold", "--config.teacher.cache_cap=7"]
    result = uld("cache", tiny.config, f"--output={tmp_path / 'new'}", *flags)
    assert (result.status, result.err) == (0, "")
    for part in (" tokens/s", "16 examples, ", " bytes each, ", "which teacher.cache_cap=7 cuts"):
        assert part in result.out
    assert not (tmp_path / "new" / "answers.json").exists()


def test_again_it_loads_no_weights_and_changes_nothing(uld, tiny, cached, monkeypatch):
    before = contents(cached)
    monkeypatch.setattr(models, "load", None)
    result = uld("cache", tiny.config, f"--output={cached}", *SMALL)
    assert (result.status, result.err) == (0, "")
    assert contents(cached) == before


def test_a_run_with_another_config_is_refused(uld, tiny, cached, tmp_path):
    before = contents(cached)
    for flag, message in (
        (
            "--config.teacher.shots=1",
            "teacher.shots is 0, expected 1: set --config.teacher.shots=0",
        ),
        ("--config.teacher.cache_epsilon=0.1", "epsilon is 0.01, expected 0.1"),
        ("--config.teacher.batch_size=4", "provenance.recorded.batch_size is 2, expected 4"),
        ("--config.data.answers=gold", "provenance.answers is "),
    ):
        result = uld("cache", tiny.config, f"--output={cached}", *SMALL, flag)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert message in result.err
    (tmp_path / "thesis.tex").write_text("years of work")
    result = uld("cache", tiny.config, f"--output={tmp_path}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "found something else; choose another directory" in result.err
    assert contents(cached) == before


def test_the_weights_are_recorded_and_not_expected(tiny, cached):
    expected = expected_by_training(tiny, cached)
    assert not any(name.startswith("recorded.") for name in expected)
    recorded = SignalStore(cached).manifest["provenance"]["recorded.weights"]
    assert recorded == models.weights_fingerprint(tiny.root / "teacher")


def test_nothing_to_cache(uld, tiny, tmp_path):
    source = tiny.write(tmp_path / "qa.jsonl", [tiny.record(n, answer=" ") for n in range(10)])
    flags = ["--config.data.answers=gold", source]
    result = uld("cache", tiny.config, f"--output={tmp_path / 'new'}", *flags)
    assert result.status == 2
    assert "none of 8 examples is left; left out: 8 with an empty answer" in result.err
    assert not (tmp_path / "new").exists()


def test_a_cache_mode_needs_a_cache(uld, tiny, tmp_path):
    result = uld("train", tiny.config, f"--workdir={tmp_path}", "--config.teacher.mode=cache")
    assert result.status == 2
    assert "set --config.teacher.cache=DIR" in result.err


def start(tiny, output, source):
    """The real command; one device, since eight start threads for nothing."""
    command = [sys.executable, "-m", "uld_jax.cli.main", "cache", tiny.config, source]
    flags = [f"--output={output}", "--config.data.answers=gold", *SMALL]
    programs = {
        "JAX_COMPILATION_CACHE_DIR": str(output.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    environment = {**os.environ, "XLA_FLAGS": ""} | programs
    return subprocess.Popen(
        [*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )


def finish(child):
    error = child.communicate()[1].decode()
    assert child.returncode == 0, error


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_cache_is_the_same(tiny, tmp_path):
    """Each kill comes a random while after the command has written a random number of shards."""
    source = tiny.write(tmp_path / "qa.jsonl", [tiny.record(number) for number in range(200)])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(tiny, whole, source))
    assert len(SignalStore(whole)) == 160
    rng, states = random.Random(0), []
    for _ in range(10):
        child = start(tiny, killed, source)
        shards = len(list(killed.glob("signals-*.json"))) + rng.randrange(6)
        while child.poll() is None and len(list(killed.glob("signals-*.json"))) < shards:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert not (killed / "manifest.json").exists()
        states.append(len(list(killed.glob("signals-*.array_record"))))
    assert states == sorted(states)
    assert len(set(states)) > 4
    finish(start(tiny, killed, source))
    assert contents(killed) == contents(whole)
