import hashlib
import json
import os
import random
import shutil
import signal as signals
import subprocess
import sys
import time

import numpy as np
import pytest

from uld_jax.data import SignalStore, SignalWriter, truncate_signal
from uld_jax.data.shards import write_records
from uld_jax.data.signal_store import CACHE
from uld_jax.errors import UserError

PROVENANCE = {"model": "toy", "tokenizer": "9f", "temperature": 1.0, "prompts": ["a", 2]}
SETTINGS = {"total": 11, "epsilon": 0.01, "cap": 40, "shard_size": 3}


def example(index, vocab=300):
    rng = np.random.default_rng(index)
    weights = np.exp(-rng.uniform(0.5, 2) * np.log(np.arange(1, vocab + 1)))
    rows = np.tile(weights / weights.sum(), (index % 3 + 1, 1))
    zeros = np.zeros(len(rows))
    return f"é{index}", truncate_signal(rows, zeros, zeros + 2.5, epsilon=0.01, cap=40)


def fill(writer):
    for shard in writer.missing_shards():
        writer.write_shard(shard, [example(i) for i in writer.examples_of(shard)])


@pytest.fixture
def cache(tmp_path):
    directory = tmp_path / "cache"
    writer = SignalWriter(directory, PROVENANCE, **SETTINGS)
    fill(writer)
    writer.finish()
    return directory


def contents(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def test_what_is_written_is_read_by_id(cache):
    store = SignalStore(cache, PROVENANCE)
    assert len(store) == 11
    assert "é3" in store
    assert "3" not in store
    for i in reversed(range(11)):
        example_id, expected = example(i)
        read = store[example_id]
        np.testing.assert_array_equal(read.counts, expected.counts)
        np.testing.assert_allclose(read.probs, expected.probs, atol=0.005)
    with pytest.raises(KeyError):
        store["nobody"]
    assert store.max_count == max(example(i)[1].counts.max() for i in range(11))
    assert SignalStore(cache).manifest == store.manifest


def test_the_manifest_says_what_is_there(cache):
    manifest = SignalStore(cache).manifest
    shards = manifest.pop("shards")
    assert [shard["name"] for shard in shards] == sorted(
        path.name for path in cache.iterdir() if path.name != "manifest.json"
    )
    assert [shard["records"] for shard in shards] == [3, 3, 3, 2]
    assert sum(shard["bytes"] for shard in shards) == manifest.pop("bytes")
    expected = [example(i)[1] for i in range(11)]
    counts = np.concatenate([signal.counts for signal in expected])
    assert manifest.pop("mean_count") == pytest.approx(counts.mean())
    assert manifest.pop("over_bound") == sum((s.error > 0.015).sum() for s in expected) > 0
    assert 0.015 < manifest.pop("max_error") < 1
    assert 0.005 < manifest.pop("mean_error") < 0.5
    assert 100 < manifest.pop("record_bytes") < 100 * 11
    assert manifest == {
        "format": 1,
        "provenance": PROVENANCE,
        **SETTINGS,
        "error_bound": 0.015,
        "examples": 11,
        "dropped": 0,
        "positions": len(counts),
        "max_count": counts.max(),
    }


def test_dropped_examples_are_counted_and_a_shard_may_be_empty(tmp_path):
    writer = SignalWriter(tmp_path, PROVENANCE, **SETTINGS | {"total": 5})
    writer.write_shard(1, [], dropped=2)
    writer.write_shard(0, [example(1)], dropped=2)
    manifest = writer.finish()
    assert (manifest["dropped"], manifest["examples"]) == (4, 1)
    store = SignalStore(tmp_path)
    assert len(store) == 1
    assert store["é1"].counts.tolist() == example(1)[1].counts.tolist()


def test_the_order_of_writing_leaves_no_trace(cache, tmp_path):
    first = SignalWriter(tmp_path / "b", PROVENANCE, **SETTINGS)
    second = SignalWriter(tmp_path / "b", PROVENANCE, **SETTINGS)  # another process
    for shard, writer in ((3, first), (1, second), (0, second), (2, first)):
        writer.write_shard(shard, [example(i) for i in writer.examples_of(shard)])
    assert second.missing_shards() == []
    assert second.finish() == first.finish()  # the second time it is only read
    assert contents(tmp_path / "b") == contents(cache)
    with pytest.raises(UserError, match="is finished"):
        first.write_shard(0, [example(i) for i in range(3)])


def test_padding_takes_no_room_on_disk(tmp_path):
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 20)
    if (tmp_path / "hole").stat().st_blocks:
        pytest.skip("this file system has no sparse files")
    write_records(tmp_path / "x", [b"record"] * 3, CACHE.options)
    status = (tmp_path / "x").stat()
    assert status.st_size == 2 << 16
    assert status.st_blocks * 512 <= 16 << 10
    assert "parallelism:1" in CACHE.options


def test_misuse_of_a_writer_is_refused(tmp_path):
    writer = SignalWriter(tmp_path, PROVENANCE, **SETTINGS)
    with pytest.raises(ValueError, match="expected 3 examples, got 1 records and 1 dropped"):
        writer.write_shard(0, [example(0)], dropped=1)
    with pytest.raises(ValueError, match="an id is there twice"):
        writer.write_shard(0, [example(0)] * 3)
    with pytest.raises(ValueError, match="shard: expected 0 to 3, got 4"):
        writer.write_shard(4, [])
    with pytest.raises(ValueError, match=r"shards \[0, 1, 2, 3\] are missing"):
        writer.finish()
    with pytest.raises(ValueError, match="total and shard_size >= 1"):
        SignalWriter(tmp_path, PROVENANCE, **SETTINGS | {"total": 0})


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from test_signal_store import *
print("ready", flush=True)
writer = SignalWriter(sys.argv[1], PROVENANCE, **SETTINGS | {{"total": 60}})
fill(writer)
writer.finish()
"""


def start(directory):
    code = CHILD.format(tests=os.path.dirname(__file__))
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_killed_at_ten_random_moments_the_cache_is_the_same(tmp_path):
    undisturbed = start(tmp_path / "whole")
    began = time.monotonic()
    undisturbed.communicate()
    duration = time.monotonic() - began
    assert undisturbed.returncode == 0
    rng = random.Random(0)
    states = set()
    for _ in range(10):
        child = start(tmp_path / "killed")
        time.sleep(rng.uniform(0, duration / 4))
        child.send_signal(signals.SIGKILL)
        child.communicate()
        found = tmp_path / "killed"
        states.add(frozenset(contents(found)) if found.is_dir() else frozenset())
        if (found / "manifest.json").is_file():
            SignalStore(found, PROVENANCE)
            shutil.rmtree(found)
    assert len(states) > 2  # the kills met different moments
    last = start(tmp_path / "killed")
    last.communicate()
    assert last.returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(SignalStore(tmp_path / "killed", PROVENANCE)) == 60


STRAY = ["unfinished.json", ".signals-00001.array_record", ".manifest.json.77"]


def test_a_kill_after_the_manifest_is_tidied_up(cache):
    before = contents(cache)
    for name in STRAY:
        (cache / name).write_text("half a fi")
    (cache / "signals-00001.array_record.json").write_text("{")
    SignalStore(cache, PROVENANCE)
    assert SignalWriter(cache, PROVENANCE, **SETTINGS).missing_shards() == []
    assert contents(cache) == before


def test_complete_shards_are_kept_and_half_written_ones_are_not(cache, tmp_path):
    directory = tmp_path / "b"
    writer = SignalWriter(directory, PROVENANCE, **SETTINGS)
    for shard in (0, 1, 2):
        writer.write_shard(shard, [example(i) for i in writer.examples_of(shard)])
    kept = (directory / "signals-00002.array_record").stat().st_ino
    (directory / "signals-00000.array_record.json").unlink()  # killed between shard and note
    path = directory / "signals-00001.array_record"
    path.write_bytes(path.read_bytes()[:-1])
    (directory / ".signals-00003.array_record").write_bytes(b"half")
    (directory / ".signals-00003.array_record.json.12").write_bytes(b"half")
    resumed = SignalWriter(directory, PROVENANCE, **SETTINGS)
    assert resumed.missing_shards() == [0, 1, 3]
    fill(resumed)
    assert (directory / "signals-00002.array_record").stat().st_ino == kept
    resumed.finish()
    assert contents(directory) == contents(cache)


@pytest.mark.parametrize("finished", [True, False])
def test_another_cache_is_not_continued(cache, finished):
    if not finished:
        (cache / "manifest.json").rename(cache / "unfinished.json")
    other = {**PROVENANCE, "model": "big", "data": "f0"} | {"temperature": 2.0}
    with pytest.raises(UserError) as error:
        SignalWriter(cache, other, **SETTINGS | {"epsilon": 0.1})
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "epsilon is 0.01, expected 0.1",
        "provenance.model is 'toy', expected 'big'",
        "provenance.temperature is 1.0, expected 2.0",
        "provenance.data is absent, expected 'f0'",
        "choose another directory",
    ):
        assert part in message
    assert "tokenizer" not in message


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"found thesis\.tex: choose another directory"):
        SignalWriter(tmp_path, PROVENANCE, **SETTINGS)
    with pytest.raises(UserError, match="cannot be made"):
        SignalWriter(tmp_path / "thesis.tex", PROVENANCE, **SETTINGS)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def edit(change):
    def damage(path):
        manifest = json.loads((path.parent / "manifest.json").read_text())
        change(manifest)
        (path.parent / "manifest.json").write_text(json.dumps(manifest))

    return damage


def swap(path):
    """Another file with its right checksum."""
    path.write_bytes((path.parent / "signals-00001.array_record").read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(lambda manifest: manifest["shards"][0].update(sha256=digest))(path)


def foreign(records):
    def damage(path):
        write_records(path, records, CACHE.options)
        sizes = {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        edit(lambda manifest: manifest["shards"][0].update(sizes))(path)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "signals-00000.array_record: has sha256 .*, expected"),
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), "has 131063 bytes, expected 131072"),
        (lambda p: p.unlink(), "signals-00000.array_record: no such file, expected a shard"),
        (lambda p: (p.parent / "manifest.json").unlink(), "found 4 shards of an unfinished one"),
        (lambda p: shutil.rmtree(p.parent), "no such directory, expected a teacher cache"),
        (lambda p: (p.parent / "manifest.json").write_text("{"), "manifest.json: not JSON"),
        (lambda p: (p.parent / "manifest.json").write_text("[]"), "expected a JSON object"),
        (edit(lambda manifest: manifest.update(format=2)), "format is 2, expected 1"),
        (edit(lambda manifest: manifest.pop("shards")), r"\['shards'\] missing"),
        (swap, "id 'é3' is there twice"),
        (foreign([b"neither"]), "its first record is no list of ids"),
        (foreign([]), "its first record is no list of ids"),
    ],
)
def test_a_damaged_cache_is_refused_at_opening(cache, damage, message):
    damage(cache / "signals-00000.array_record")
    with pytest.raises(UserError, match=message) as error:
        SignalStore(cache, PROVENANCE)
    assert "\n" not in str(error.value)
    assert "run `uld-jax cache` again" in str(error.value)


def test_a_cache_of_something_else_is_refused_field_by_field(cache):
    with pytest.raises(UserError) as error:
        SignalStore(cache, {**PROVENANCE, "tokenizer": "00", "temperature": 2.0, "data": 1})
    message = str(error.value)
    assert "tokenizer is '9f', expected '00'" in message
    assert "temperature is 1.0, expected 2.0" in message
    assert "data is absent, expected 1" in message
    assert "model" not in message
    assert "\n" not in message
    SignalStore(cache, {**PROVENANCE, "prompts": ("a", 2)})
