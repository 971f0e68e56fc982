"""Runs, caches and data sets in a bucket: an emulator of Cloud Storage in a process of its own."""

import http.server
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from etils.epath import backend

from tests.teacher.conftest import Fake, Teacher
from uld_jax import models
from uld_jax.cli.main import main
from uld_jax.data import SignalStore, load_examples
from uld_jax.files import UNFINISHED, files_below, locate, sha256_of, upload, write_text
from uld_jax.mirror import PUSH_EVERY, Mirror
from uld_jax.train import MEASURED
from uld_jax.train.checkpoint import DIGESTS

REPOSITORY = Path(__file__).resolve().parents[2]
BUCKET = "gs://bucket"
EMULATOR = REPOSITORY / "tests" / "gcs_emulator.py"
needs_emulator = pytest.mark.skipif(
    not (importlib.util.find_spec("gcsfs") and importlib.util.find_spec("gcp_storage_emulator")),
    reason="gcsfs or gcp-storage-emulator is absent: pip install -e '.[test]'",
)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def answers(port):
    with socket.socket() as tried:
        return tried.connect_ex(("localhost", port)) == 0


def client_environment(port):
    """What leads gcsfs, google-cloud-storage and tensorstore to a server without credentials."""
    return {
        "STORAGE_EMULATOR_HOST": f"http://localhost:{port}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{port}",
        "GCE_METADATA_ROOT": "localhost:1",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "FSSPEC_GCS_TOKEN": "anon",
    }


def forget_clients():
    """An open file system keeps the address that it was opened with."""
    backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.get_filesystem_class("gcs").clear_instance_cache()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The environment of a client of an emulator with one bucket."""
    port, log = free_port(), tmp_path_factory.mktemp("emulator") / "log"
    command = [sys.executable, EMULATOR, "start", f"--port={port}"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--host=localhost", "--in-memory", "--default-bucket=bucket", "-q"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 60
    while not answers(port):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    environment = client_environment(port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        forget_clients()
        yield environment
    forget_clients()
    server.kill()
    server.wait()


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
def killed(emulator, tiny, tmp_path_factory):
    """A workdir in the bucket, of a run that was killed after its first checkpoint."""
    workdir = f"{BUCKET}/runs/killed"
    commit = locate(workdir) / "checkpoints" / "2" / "commit_success.txt"
    home = tmp_path_factory.mktemp("home")
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "uld_jax.cli.main", "train", tiny.config),
                *(f"--workdir={workdir}", "--config.train.profile_from=1"),
                "--config.train.profile_steps=1",
            ],
            env=os.environ | emulator | {"PYTHONPATH": str(REPOSITORY)},
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


@needs_emulator
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


@needs_emulator
@pytest.mark.slow
def test_a_run_in_a_bucket_is_evaluated_and_exported(resumed, trained, uld, tmp_path):
    workdir, output = resumed[0], f"{BUCKET}/export"
    scores, expected = f"{BUCKET}/scores.json", tmp_path / "scores.json"
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


@needs_emulator
@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket_is_not_used(resumed, uld, caplog):
    copy = locate(f"{BUCKET}/runs/damaged")
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
    assert uld("export", f"--workdir={copy}", f"--output={BUCKET}/older").status == 0
    assert (
        f"checkpoint {checkpoints / '4'} is damaged or not complete: trying step 2" in caplog.text
    )
    student = "model.safetensors"
    assert content(f"{BUCKET}/older")[student] != content(f"{resumed[0]}/student")[student]


@needs_emulator
@pytest.mark.slow
def test_a_cache_in_a_bucket_holds_and_teaches_what_one_on_a_disk_does(
    emulator, tiny, uld, tmp_path
):
    flags = (tiny.config, "--config.teacher.cache_shard_size=6")
    place = f"{BUCKET}/cache"
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


@needs_emulator
def test_a_damaged_shard_in_a_bucket_is_named(emulator, tiny, uld):
    place = locate(f"{BUCKET}/damaged")
    assert uld("cache", tiny.config, f"--output={place}").status == 0
    shard = place / "signals-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    result = uld(
        *("train", tiny.config, "--config.teacher.mode=cache", f"--workdir={BUCKET}/none"),
        f"--config.teacher.cache={place}",
    )
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"error: {shard}: has sha256 ")
    assert not locate(f"{BUCKET}/none").exists()


@needs_emulator
def test_answers_in_a_bucket_are_those_on_a_disk(emulator, tiny, uld, tmp_path):
    flags = (tiny.config, "--config.generate.shard_size=6")
    place, directory = f"{BUCKET}/answers", tmp_path / "answers"
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


@needs_emulator
def test_what_a_server_has_said_is_kept_in_the_bucket_until_all_is_there(
    emulator, tiny, uld, tmp_path, monkeypatch
):
    teacher, directory = Teacher(), tmp_path / "teacher"
    models.save_pretrained(teacher.loaded, directory)
    fake, place = Fake(teacher), f"{BUCKET}/served"
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


@needs_emulator
def test_growing_files_are_uploaded_whole_and_not_too_often(emulator, monkeypatch):
    place, now = locate(f"{BUCKET}/logs"), time.monotonic()
    uploads = []
    monkeypatch.setattr(
        "uld_jax.mirror.upload", lambda path, to: uploads.append(to.name) or upload(path, to)
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


@needs_emulator
@pytest.mark.parametrize("command", ["train", "export", "evaluate"])
def test_missing_bucket(emulator, tiny, uld, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    output = () if command == "train" else (f"--output={tmp_path / 'output'}",)
    result = uld(command, tiny.config, "--workdir=gs://absent/run", *output)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: --workdir=gs://absent/run: there is no bucket gs://absent")
    assert [*tmp_path.iterdir()] == []
    assert not locate("gs://absent").exists()


class Refusing(http.server.BaseHTTPRequestHandler):
    """What Cloud Storage says to one without the right to anything, or only to read."""

    readable = False

    def do_GET(self):
        if self.readable and "/o" not in self.path:
            return self._answer(200, {"name": "bucket", "kind": "storage#bucket"})
        if self.readable:
            return self._answer(200 if "/o?" in self.path else 404, {"kind": "storage#objects"})
        return self.do_POST()

    def do_POST(self):
        message = "caller does not have storage.objects access"
        self._answer(403, {"error": {"code": 403, "message": message}})

    def _answer(self, status, value):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


@needs_emulator
@pytest.mark.parametrize("readable", [False, True])
def test_a_bucket_that_may_not_be_used(tiny, uld, tmp_path, monkeypatch, readable):
    kind = type("Kind", (Refusing,), {"readable": readable})
    server = http.server.ThreadingHTTPServer(("localhost", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in client_environment(server.server_port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    monkeypatch.chdir(tmp_path)
    forget_clients()
    result = uld("train", tiny.config, "--workdir=gs://bucket/run")
    server.shutdown()
    server.server_close()
    forget_clients()
    assert (result.status, result.err.count("\n")) == (2, 1)
    said = "cannot write there" if readable else "the bucket does not answer"
    assert result.err.startswith(f"error: --workdir=gs://bucket/run: {said} (Forbidden: ")
    assert "caller does not have storage.objects access" in result.err
    assert [*tmp_path.iterdir()] == []


@needs_emulator
@pytest.mark.slow  # gcsfs tries six times, in half a minute
def test_a_store_that_is_not_reached(tiny, uld, tmp_path, monkeypatch):
    for name, value in client_environment(free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    monkeypatch.chdir(tmp_path)
    forget_clients()
    result = uld("train", tiny.config, "--workdir=gs://bucket/run")
    forget_clients()
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "gs://bucket/run: the bucket does not answer (Cannot connect to host" in result.err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/run", "needs gcsfs: pip install 'uld-jax[gcs]'"),
        ("s3://bucket/run", "expected a path of this machine or gs://BUCKET/PATH"),
        ("gs://", "expected gs://BUCKET/PATH, found no bucket in it"),
    ],
)
@pytest.mark.parametrize("flag", ["workdir", "output"])
def test_an_address_that_is_not_understood(uld, tmp_path, monkeypatch, flag, address, message):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    given = {"workdir": tmp_path / "run", "output": tmp_path / "out", flag: address}
    result = uld("export", *(f"--{name}={value}" for name, value in given.items()))
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"error: --{flag}={address}: ")
    assert message in result.err
    assert [*tmp_path.iterdir()] == []
