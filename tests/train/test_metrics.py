"""Metrics on disk: a resumed run's file reads as if it had never stopped."""

import json
import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from uld_jax.train import MetricsWriter, read_metrics


def events(workdir):
    """Every event of every file, oldest file first, read record by record."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            # Length, its checksum, the event, its checksum.
            (length,) = struct.unpack_from("<Q", content)
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def scalars(workdir):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
    ]


def write(workdir, start, steps):
    with MetricsWriter(workdir, step=start) as writer:
        for step in steps:
            writer.write({"step": step, "total": step / 4, "skipped_steps": 0})


def test_every_row_is_read_back(tmp_path):
    write(tmp_path, 0, [1, 2])
    assert read_metrics(tmp_path) == [
        {"step": 1, "total": 0.25, "skipped_steps": 0},
        {"step": 2, "total": 0.5, "skipped_steps": 0},
    ]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4, 5])
    write(tmp_path, 3, [4, 5, 6])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_starting_again_from_the_beginning_drops_all(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    write(tmp_path, 0, [1])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("left", ['{"step": 3, "to', '{"step": 3}'])
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path, left):
    write(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(left)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 2, [3, 4])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_rows_are_on_disk_before_the_writer_is_closed(tmp_path):
    with MetricsWriter(tmp_path, step=0) as writer:
        writer.write({"step": 1, "total": 2.5})
        assert read_metrics(tmp_path) == [{"step": 1, "total": 2.5}]
        writer.flush()
        assert scalars(tmp_path) == [(1, "train/total", 2.5)]


def test_tensorboard_events(tmp_path):
    write(tmp_path, 0, [1])
    with MetricsWriter(tmp_path, step=1) as writer:
        writer.write_scores({"f1": 50.0}, step=1)
    assert scalars(tmp_path) == [
        (1, "train/total", 0.25),
        (1, "train/skipped_steps", 0.0),
        (1, "eval/f1", 50.0),
    ]
    # TensorBoard hides what an earlier file has from such a step on.
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 2]
    assert all(event.wall_time > 0 for event in events(tmp_path))


def test_numbers_that_are_not_finite_pass_in_silence(tmp_path, caplog):
    with MetricsWriter(tmp_path, step=0) as writer:
        writer.write({"step": 1, "grad_norm": float("nan")})
    assert math.isnan(read_metrics(tmp_path)[0]["grad_norm"])
    assert math.isnan(scalars(tmp_path)[0][2])
    assert caplog.messages == []


def test_no_file_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []
