"""`uld-jax cache` from a server that runs the teacher, and training from what it gave."""

import json

import numpy as np
import pytest

from tests.teacher.conftest import Fake, Teacher
from uld_jax import models
from uld_jax.data import SignalStore

TOP_K = 40


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    teacher = Teacher()
    directory = tmp_path_factory.mktemp("served") / "teacher"
    models.save_pretrained(teacher.loaded, directory)
    return teacher, directory


@pytest.fixture
def server(teacher):
    fake = Fake(teacher[0])
    yield fake
    fake.close()


def is_text(request):
    """Whether a request is about a whole text in ids, which is how signals are asked for."""
    return request["echo"] and isinstance(request["prompt"], list)


def from_cache(directory):
    return ("--config.teacher.mode=cache", f"--config.teacher.cache={directory}")


def flags_of(tiny, directory, fake):
    return (
        tiny.config,
        "--config.data.answers=gold",
        f"--config.teacher.source={directory}",
        "--config.teacher.max_length=250",
        "--config.teacher.cache_shard_size=4",
        "--config.teacher.server_model=tiny",
        f"--config.teacher.server_top_k={TOP_K}",
        f"--config.teacher.server={fake.url}",
    )


def test_a_servers_signals_are_those_of_its_model(tiny, teacher, server, uld, tmp_path):
    server.shift = 1
    flags, cache = flags_of(tiny, teacher[1], server), tmp_path / "cache"
    result = uld("cache", *flags, f"--output={cache}")
    assert result.status == 0, result.err
    assert "entries shifted by +1, corrected" in result.out
    store = SignalStore(cache)
    assert len(store) == 16
    asked = [request["prompt"] for request in server.requests if is_text(request)]
    assert len(asked) == 16
    signals = [store[f"q{n}"] for n in range(20) if n % 5]
    # Each stored position is the model's own distribution somewhere in a text that was sent.
    known = np.concatenate(
        [-np.sort(-np.exp(teacher[0].log_probs(ids)), axis=1)[:, :TOP_K] for ids in asked]
    )
    for signal in signals:
        for position in range(len(signal)):
            probs = signal.position(position)
            assert abs(known[:, : len(probs)] - probs).sum(1).min() <= signal.error[position]
    run = tmp_path / "run"
    trained = uld(
        "train",
        *flags,
        *from_cache(cache),
        f"--workdir={run}",
    )
    assert trained.status == 0, trained.err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["uld_error"] < 1 for row in rows)


def test_what_was_answered_is_not_asked_again_and_what_failed_is_left_out(
    tiny, teacher, server, uld, tmp_path
):
    flags, cache = flags_of(tiny, teacher[1], server), tmp_path / "cache"
    quick = ("--config.teacher.server_concurrency=1",)
    answered = []

    def down_after_a_while(number, body):
        if is_text(body):
            answered.append(tuple(body["prompt"]))
            if len(set(answered)) > 6:
                return 401, b'{"error": {"message": "the key has expired"}}', {}
        return None

    server.fault = down_after_a_while
    result = uld("cache", *flags, *quick, f"--output={cache}")
    assert result.status == 2
    assert "the key has expired" in result.err
    assert not (cache / "manifest.json").exists()
    first, refused = set(answered[:-1]), answered[-1]
    answered.clear()

    def never_for_one(number, body):
        if is_text(body):
            answered.append(tuple(body["prompt"]))
            if tuple(body["prompt"]) == refused:
                return 500, b'{"error": {"message": "out of memory"}}', {}
        return None

    server.fault = never_for_one
    tolerant = ("--config.teacher.server_max_failed=0.1", "--config.teacher.server_retries=0")
    result = uld("cache", *flags, *quick, *tolerant, f"--output={cache}")
    assert result.status == 0, result.err
    assert not first & set(answered)
    assert len(SignalStore(cache)) == 15
    assert result.out.count("no signal for") == 1
    assert not (cache / ".served").exists()
    one_step = ("--config.train.max_steps=1", f"--workdir={tmp_path / 'run'}")
    run = uld("train", *flags, *from_cache(cache), *one_step)
    assert "1 without a signal in a teacher's cache" in run.out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.data.answers=teacher",
            "data.answers: expected gold where teacher.server",
        ),
        ("--config.teacher.server_model=", "teacher.server_model: expected the name"),
        ("--config.loss.teacher_temperature=2", "loss.teacher_temperature: expected 1 where"),
    ],
)
def test_what_a_server_cannot_do_is_refused(tiny, teacher, server, uld, tmp_path, flag, message):
    flags = flags_of(tiny, teacher[1], server)
    result = uld("cache", *flags, flag, f"--output={tmp_path / 'cache'}")
    assert (result.status, server.requests) == (2, [])
    assert message in result.err
    assert not (tmp_path / "cache").exists()
