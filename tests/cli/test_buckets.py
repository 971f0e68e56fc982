"""Runs, caches and data sets in buckets: a server of each kind of store in its own process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stores import SERVERS, free_port
from tests.teacher.conftest import Fake, Teacher
from uld_jax import models
from uld_jax.cli.main import main
from uld_jax.data import SignalStore, load_examples
from uld_jax.files import UNFINISHED, copy_file, files_below, locate, sha256_of, write_text
from uld_jax.mirror import PUSH_EVERY, Mirror
from uld_jax.train import MEASURED
from uld_jax.train.checkpoint import DIGESTS

REPOSITORY = Path(__file__).resolve().parents[2]
in_both = pytest.mark.parametrize(
    "store", ["gs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(scope="module", params=sorted(SERVERS))
def store(request):
    """A kind of store, whose packages are installed; no server of it yet."""
    server = SERVERS[request.param]
    server.skip_if_absent()
    return server


@pytest.fixture(scope="module")
def emulator(store, tmp_path_factory):
    """The environment of a client of a server with one bucket."""
    with store.served(tmp_path_factory.mktemp("emulator") / "log") as environment:
        yield environment


@pytest.fixture(scope="module")
def bucket(store, emulator):
    return store.bucket


@pytest.fixture(autouse=True)
def _copies(tmp_path_factory, monkeypatch):
    """No copy of a bucket's files outlives a test, and none goes to the user's cache."""
    monkeypatch.setenv("ULD_JAX_CACHE", str(tmp_path_factory.mktemp("copies")))


def content(directory):
    """Name to bytes of all files below."""
    place = locate(directory)
    below = files_below(place) if place.is_dir() else []
    return {str(path.relative_to(place)): path.read_bytes() for path in below}


def rows_of(workdir):
    lines = (locate(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{name: row[name] for name in row if name not in MEASURED} for row in rows]


@pytest.fixture(scope="module")
def killed(store, emulator, tiny, tmp_path_factory):
    """A workdir in the bucket, of a run that was killed after its first checkpoint."""
    workdir = f"{store.bucket}/runs/killed"
    # The last of its files.
    last = {"gs": "commit_success.txt", "s3": DIGESTS}[store.scheme]
    commit = locate(workdir) / "checkpoints" / "2" / last
    home = tmp_path_factory.mktemp("home")
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "uld_jax.cli.main", "train", tiny.config),
                *(f"--workdir={workdir}", "--config.train.profile_from=1"),
                "--config.train.profile_steps=1",
            ],
            env=os.environ
            | emulator
            | {"PYTHONPATH": os.pathsep.join((str(REPOSITORY), *sys.path))},
            cwd=home,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    while not commit.exists():
        assert process.poll() is None, (home / "log").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [path.name for path in home.iterdir()] == ["log"]
    return workdir


@pytest.fixture(scope="module")
def resumed(killed):
    """The same workdir when the run has gone on to its end, and what the kill left in it."""
    left = content(killed)
    assert main(["train", f"--workdir={killed}"]) == 0
    return killed, left


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_as_one_on_a_disk_that_was_never_stopped(resumed, trained):
    workdir, left = resumed
    assert "after.json" not in left
    assert any(name.startswith("profile/") for name in left)
    assert rows_of(workdir) == rows_of(trained)
    for name in ("before.json", "after.json", "teacher_answers.json"):
        assert (locate(workdir) / name).read_bytes() == (trained / name).read_bytes()
    assert content(f"{workdir}/student") == content(trained / "student")
    kinds = [
        {name.split("/")[0] for name in content(directory)} - {"profile"}
        for directory in (workdir, trained)
    ]
    assert kinds[0] == kinds[1]
    # One file of events a start, none lost.
    starts = [name for name in content(workdir) if name.startswith("tensorboard/")]
    assert len(starts) == 1 + len([n for n in left if n.startswith("tensorboard/")]) + 1


@pytest.mark.slow
def test_a_run_in_a_bucket_is_evaluated_and_exported(resumed, trained, uld, tmp_path, bucket):
    workdir, output = resumed[0], f"{bucket}/export"
    scores, expected = f"{bucket}/scores.json", tmp_path / "scores.json"
    assert uld("evaluate", f"--workdir={workdir}", f"--output={scores}").status == 0
    assert uld("evaluate", f"--workdir={trained}", f"--output={expected}").status == 0
    assert locate(scores).read_bytes() == expected.read_bytes()
    # What an upload that was killed leaves is taken for nothing.
    write_text(locate(output) / UNFINISHED, "")
    write_text(locate(output) / "config.json", "{")
    assert uld("export", f"--workdir={workdir}", f"--output={output}").status == 0
    assert content(output) == content(trained / "student")
    result = uld("export", f"--workdir={workdir}", f"--output={output}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"{output}: exists and is not an empty directory; choose another" in result.err


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket_is_not_used(resumed, uld, caplog, bucket):
    copy = locate(f"{bucket}/runs/damaged")
    for name, data in content(resumed[0]).items():
        if name.startswith(("config.json", "checkpoints/")):
            (copy / name).write_bytes(data)
    checkpoints = copy / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"2", "4"}
    assert (checkpoints / "4" / DIGESTS).is_file()
    largest = max(files_below(checkpoints / "4" / "params"), key=lambda path: path.stat().length)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))
    assert uld("export", f"--workdir={copy}", f"--output={bucket}/older").status == 0
    assert (
        f"checkpoint {checkpoints / '4'} is damaged or not complete: trying step 2" in caplog.text
    )
    student = "model.safetensors"
    assert content(f"{bucket}/older")[student] != content(f"{resumed[0]}/student")[student]


@pytest.mark.slow
def test_a_cache_in_a_bucket_holds_and_teaches_what_one_on_a_disk_does(bucket, tiny, uld, tmp_path):
    flags = (tiny.config, "--config.teacher.cache_shard_size=6")
    place = f"{bucket}/cache"
    for output in (place, tmp_path / "cache"):
        assert uld("cache", *flags, f"--output={output}").status == 0
    assert content(place) == content(tmp_path / "cache")
    assert uld("cache", *flags, f"--output={place}").status == 0  # there is nothing to do
    for cache in (place, tmp_path / "cache"):
        result = uld(
            *("train", tiny.config, "--config.teacher.mode=cache", "--config.train.max_steps=1"),
            *(f"--config.teacher.cache={cache}", f"--workdir={tmp_path / str(cache is place)}"),
        )
        assert result.status == 0, result.err
    assert rows_of(tmp_path / "True") == rows_of(tmp_path / "False")


@in_both
def test_a_damaged_shard_in_a_bucket_is_named(bucket, tiny, uld):
    place = locate(f"{bucket}/damaged")
    assert uld("cache", tiny.config, f"--output={place}").status == 0
    shard = place / "signals-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    result = uld(
        *("train", tiny.config, "--config.teacher.mode=cache", f"--workdir={bucket}/none"),
        f"--config.teacher.cache={place}",
    )
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"error: {shard}: has sha256 ")
    assert not locate(f"{bucket}/none").exists()


@in_both
def test_answers_in_a_bucket_are_those_on_a_disk(bucket, tiny, uld, tmp_path):
    flags = (tiny.config, "--config.generate.shard_size=6")
    place, directory = f"{bucket}/answers", tmp_path / "answers"
    for output in (place, directory, f"{place}.jsonl", f"{directory}.jsonl"):
        assert uld("generate", *flags, f"--output={output}").status == 0
    assert load_examples(f"generated:{place}", "train") == load_examples(
        f"generated:{directory}", "train"
    )
    ours, theirs = content(place), content(directory)
    assert ours.keys() == theirs.keys()
    assert ours["manifest.json"] == theirs["manifest.json"]
    assert locate(f"{place}.jsonl").read_bytes() == Path(f"{directory}.jsonl").read_bytes()
    assert not locate(f"{place}.jsonl.shards").exists()


def texts_asked(fake):
    return sum(request["echo"] and isinstance(request["prompt"], list) for request in fake.requests)


@in_both
def test_what_a_server_has_said_is_kept_in_the_bucket_until_all_is_there(
    bucket, tiny, uld, tmp_path, monkeypatch
):
    teacher, directory = Teacher(), tmp_path / "teacher"
    models.save_pretrained(teacher.loaded, directory)
    fake, place = Fake(teacher), f"{bucket}/served"
    flags = (
        *(tiny.config, "--config.data.answers=gold", f"--config.teacher.source={directory}"),
        *("--config.teacher.max_length=250", "--config.teacher.server_model=tiny"),
        *("--config.teacher.server_top_k=40", f"--config.teacher.server={fake.url}"),
    )
    fake.shift = 1
    with monkeypatch.context() as patch:  # after the last answer and before the first shard
        patch.setattr("uld_jax.teacher.build_served._signal", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            uld("cache", *flags, f"--output={place}")
    assert [*content(f"{place}/.served")] == ["served.jsonl"]
    first = texts_asked(fake)
    result = uld("cache", *flags, f"--output={place}")
    assert result.status == 0, result.err
    # The self-check is made again; no signal is asked for again.
    assert texts_asked(fake) - first == first - 16
    fake.close()
    assert len(SignalStore(place)) == 16
    assert content(f"{place}/.served") == {}


def test_growing_files_are_uploaded_whole_and_not_too_often(bucket, monkeypatch):
    place, now = locate(f"{bucket}/logs"), time.monotonic()
    uploads = []
    monkeypatch.setattr(
        "uld_jax.mirror.copy_file", lambda path, to: uploads.append(to.name) or copy_file(path, to)
    )
    with Mirror(place) as mirror:
        (mirror.local / "a").write_text("1\n")
        (mirror.local / "b").write_text("1\n")
        mirror.push_when_due()
        assert uploads == []
        monkeypatch.setattr("time.monotonic", lambda: now + PUSH_EVERY + 1)
        mirror.push_when_due()
        with (mirror.local / "b").open("a") as file:
            file.write("2\n")
        mirror.push_when_due()
        assert uploads == ["a", "b"]
    assert uploads == ["a", "b", "b"]
    assert content(place) == {"a": b"1\n", "b": b"1\n2\n"}
    assert not mirror.local.exists()
    with Mirror(place) as again:
        again.pull("b")
        assert (again.local / "b").read_text() == "1\n2\n"
    assert sha256_of(place / "b") == sha256_of(_local(b"1\n2\n"))


def _local(data):
    path = Path(os.environ["ULD_JAX_CACHE"]) / "data"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("command", ["train", "export", "evaluate"])
def test_missing_bucket(store, emulator, tiny, uld, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    absent = f"{store.scheme}://absent"
    output = () if command == "train" else (f"--output={tmp_path / 'output'}",)
    result = uld(command, tiny.config, f"--workdir={absent}/run", *output)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"error: --workdir={absent}/run: there is no bucket {absent}")
    assert [*tmp_path.iterdir()] == []
    assert not locate(absent).exists()


@pytest.mark.parametrize("readable", [False, True])
def test_a_bucket_that_may_not_be_used(store, tiny, uld, tmp_path, monkeypatch, readable):
    monkeypatch.chdir(tmp_path)
    workdir = f"{store.bucket}/run"
    with store.refusing(readable=readable):
        result = uld("train", tiny.config, f"--workdir={workdir}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    said = "cannot write there" if readable else "the bucket does not answer"
    assert result.err.startswith(f"error: --workdir={workdir}: {said} (")
    assert "caller has no right to objects" in result.err
    assert [*tmp_path.iterdir()] == []


def test_a_bucket_without_credentials(tiny, uld, tmp_path, monkeypatch):
    store = SERVERS["s3"]
    store.skip_if_absent()
    monkeypatch.chdir(tmp_path)
    with store.led_to(free_port()):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        result = uld("train", tiny.config, "--workdir=s3://bucket/run")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "s3://bucket/run: the bucket does not answer (Unable to locate cred" in result.err
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or aws configure" in result.err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow  # gcsfs tries six times, in half a minute
def test_a_store_that_is_not_reached(store, tiny, uld, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with store.led_to(free_port()):
        result = uld("train", tiny.config, f"--workdir={store.bucket}/run")
    assert (result.status, result.err.count("\n")) == (2, 1)
    said = {"gs": "Cannot connect to host", "s3": "Could not connect to the endpoint"}
    expected = f"/run: the bucket does not answer ({said[store.scheme]}"
    assert f"error: --workdir={store.bucket}{expected}" in result.err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/run", "needs gcsfs: pip install 'uld-jax[gcs]'"),
        ("s3://bucket/run", "needs s3fs: pip install 'uld-jax[s3]'"),
        ("ftp://host/run", "a path of this machine or gs://BUCKET/PATH or s3://BUCKET/PATH"),
        ("gs://", "expected gs://BUCKET/PATH, found no bucket in it"),
    ],
)
@pytest.mark.parametrize("flag", ["workdir", "output"])
def test_an_address_that_is_not_understood(uld, tmp_path, monkeypatch, flag, address, message):
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    given = {"workdir": tmp_path / "run", "output": tmp_path / "out", flag: address}
    result = uld("export", *(f"--{name}={value}" for name, value in given.items()))
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"error: --{flag}={address}: ")
    assert message in result.err
    assert [*tmp_path.iterdir()] == []
