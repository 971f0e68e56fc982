"""Training from stored signals: no teacher in memory, the same run as with it, within the bound."""

import json
import re
import shutil

import pytest

from uld_jax import models
from uld_jax.cli.main import main

# Epsilon so small that nothing is left out, and online with the exact method too.
EXACT = ("--config.loss.method=sort", "--config.teacher.cache_epsilon=0.0001")


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def from_cache(directory):
    return ("--config.teacher.mode=cache", f"--config.teacher.cache={directory}")


@pytest.fixture(scope="module", params=["gold", "teacher"])
def runs(request, tiny, tmp_path_factory):
    """The flags, a cache, and the workdirs of the run with the teacher and of that without."""
    root = tmp_path_factory.mktemp(request.param)
    flags = (tiny.config, *EXACT, f"--config.data.answers={request.param}")
    cache, online, offline = root / "cache", root / "online", root / "offline"
    assert main(["cache", *flags, f"--output={cache}"]) == 0
    assert main(["train", *flags, f"--workdir={online}"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        loaded = []
        load = models.load
        patch.setattr(
            models, "load", lambda source, **more: loaded.append(source) or load(source, **more)
        )
        assert main(["train", *flags, *from_cache(cache), f"--workdir={offline}"]) == 0
    return flags, cache, online, offline, loaded


def test_the_teacher_is_not_loaded(runs, tiny):
    assert runs[-1] == [str(tiny.root / "student")]


def test_every_step_is_as_with_the_teacher_within_the_certified_error(runs):
    _, _, online, offline, _ = runs
    pairs = [*zip(rows_of(online), rows_of(offline), strict=True)]
    assert len(pairs) == 4
    for with_teacher, without in pairs:
        # The first step has the same student; later ones drift apart by what each step adds.
        assert without["uld_error"] < 2e-3
        allowed = without["uld_error"] * (1 if with_teacher["step"] == 1 else 20)
        assert abs(with_teacher["uld"] - without["uld"]) <= allowed
        assert with_teacher["cross_entropy"] == pytest.approx(without["cross_entropy"], abs=0.01)


def test_metrics_say_what_was_read_and_whose_the_work_was(runs):
    _, _, online, offline, _ = runs
    for asked, cached in zip(rows_of(online), rows_of(offline), strict=True):
        assert asked["student_tokens"] == cached["student_tokens"] > 0
        assert asked["teacher_tokens"] > 0 == cached["teacher_tokens"]
        assert asked["teacher_share"] > 0 == cached["teacher_share"]
        # Values are float32, as many as the longest signal of the batch, and two more.
        width = cached["signal_bytes"] * cached["uld_positions"] / 4
        assert width == pytest.approx(round(width), rel=1e-6)
        assert width > 2
        assert "signal_bytes" not in asked
        for row in (asked, cached):
            parts = sum(row[f"{part}_seconds"] for part in ("input", "host", "device"))
            assert parts == pytest.approx(row["seconds"], abs=2e-4)
            tokens = row["student_tokens"] + row["teacher_tokens"]
            assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"], abs=0.1)


def test_a_resumed_run_ends_the_same(runs, uld, tmp_path):
    *_, offline, _ = runs
    again = tmp_path / "again"
    shutil.copytree(offline, again)
    for left in ("student", "checkpoints/4"):
        shutil.rmtree(again / left)
    (again / "after.json").unlink()
    assert uld("train", f"--workdir={again}").status == 0
    name = "student/model.safetensors"
    assert (again / name).read_bytes() == (offline / name).read_bytes()


def changed_byte(cache):
    path = sorted(cache.glob("*.array_record"))[0]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def cut_short(cache):
    path = sorted(cache.glob("*.array_record"))[0]
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"), [(changed_byte, "has sha256"), (cut_short, "bytes, expected")]
)
def test_a_damaged_cache_is_refused_at_once(runs, uld, tmp_path, damage, message):
    flags, cache, *_ = runs
    shutil.copytree(cache, tmp_path / "cache")
    damage(tmp_path / "cache")
    result = uld("train", *flags, *from_cache(tmp_path / "cache"), f"--workdir={tmp_path / 'run'}")
    assert result.status == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.loss.teacher_temperature=2", "loss.teacher_temperature is 1.0, expected 2.0"),
        ("--config.teacher.shots=1", "teacher.shots is 0, expected 1"),
        ("--config.teacher.source={student}", "tokenizer is "),
        ("--config.data.train_examples=7", "data is "),
        ("--config.teacher.dtype=bfloat16", "teacher.dtype is 'float32', expected 'bfloat16'"),
    ],
)
def test_a_cache_of_something_else_is_refused(runs, tiny, uld, tmp_path, flag, message):
    flags, cache, *_ = runs
    flag = flag.format(student=tiny.root / "student")
    result = uld("train", *flags, *from_cache(cache), flag, f"--workdir={tmp_path / 'run'}")
    assert result.status == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_two_teachers_one_of_them_cached(runs, tiny, uld, tmp_path):
    flags, cache, online, *_ = runs
    extra = (
        f"--config.extra_teachers.0.source={tiny.root / 'teacher'}",
        "--config.extra_teachers.0.max_length=256",
        "--config.extra_teachers.0.mode=cache",
        f"--config.extra_teachers.0.cache={cache}",
        "--config.train.max_steps=1",
    )
    assert uld("train", *flags, *extra, f"--workdir={tmp_path / 'run'}").status == 0
    (row,) = rows_of(tmp_path / "run")
    expected = rows_of(online)[0]
    assert row["uld_0"] == pytest.approx(expected["uld"], rel=1e-5)
    assert row["uld_1"] == pytest.approx(expected["uld"], abs=2 * row["uld_error"])
    assert row["uld"] == pytest.approx((row["uld_0"] + row["uld_1"]) / 2, rel=1e-5)


def test_bench_compares_steps_with_and_without_the_teacher(runs, uld, tmp_path):
    flags, cache, online, *_ = runs
    result = uld(
        "bench", "cache", *flags, *from_cache(cache), "--batches=2", f"--output={tmp_path / 'out'}"
    )
    assert result.status == 0, result.err
    (case,) = json.loads((tmp_path / "out" / "cache.json").read_text())["cases"]
    first, second = case["batches"]
    assert first["uld"] == pytest.approx(rows_of(online)[0]["uld"], rel=1e-5)
    for row in (first, second):
        assert row["error"] == pytest.approx(1.5 * abs(row["uld"] - row["uld_cache"]))
        assert row["error"] <= row["bound"] < 3e-3
        assert 0.999 < row["cosine"] < 1.000001
        assert row["tokens"]["online"] > row["tokens"]["cache"] > 0
    ratios = [row["seconds"]["online"] / row["seconds"]["cache"] for row in (first, second)]
    assert case["ratio"] == pytest.approx(sum(ratios) / 2)
    assert "steps with the teacher and from its cache" in result.out
    refused = uld("bench", "cache", *flags)
    assert refused.status == 2
    assert "teacher.mode: expected cache, got 'online'" in refused.err
    jsd = ("--config.loss.distance=jsd", "--config.teacher.cache_ids=8")
    other = uld("bench", "cache", *flags, *from_cache(cache), *jsd)
    assert (other.status, other.out) == (2, "")
    assert "loss.distance=jsd: expected uld, whose error from a cache is known" in other.err
    many = uld("bench", "cache", *flags, *from_cache(cache), "--batches=99")
    assert "--batches: expected at most the run's 4 steps, got 99" in many.err


@pytest.mark.slow
def test_a_divergence_from_stored_tokens_is_that_from_the_teacher(tiny, uld, tmp_path):
    """Of all tokens, which are stored in half precision."""
    flags = (tiny.config, "--config.data.answers=gold", "--config.loss.distance=jsd")
    flags = (*flags, "--config.train.max_steps=1", "--config.data.eval_examples=1")
    ids = "--config.teacher.cache_ids=512"  # of 500
    assert uld("cache", *flags, ids, f"--output={tmp_path / 'cache'}").status == 0
    found = []
    for name, more in (("online", ()), ("cached", (ids, *from_cache(tmp_path / "cache")))):
        result = uld("train", *flags, *more, f"--workdir={tmp_path / name}")
        assert result.status == 0, result.err
        assert re.search(r"jsd: \d+ tokens are in both vocabularies", result.out)
        found.append(rows_of(tmp_path / name)[0])
    online, cached = found
    assert cached["jsd"] == pytest.approx(online["jsd"], rel=2e-3)
    assert 0.01 < cached["jsd"] < 0.7
    assert "uld_error" not in cached


def test_a_cache_without_tokens_is_refused_where_they_are_needed(runs, uld, tmp_path):
    flags, cache, *_ = runs
    more = ("--config.loss.distance=kl", "--config.teacher.cache_ids=8", *from_cache(cache))
    result = uld("train", *flags, *more, f"--workdir={tmp_path / 'run'}")
    assert result.status == 2
    assert "this teacher cache keeps no tokens by id, which loss.distance=kl is about" in result.err
    assert not (tmp_path / "run").exists()
