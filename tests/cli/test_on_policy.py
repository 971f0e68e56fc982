"""A whole run in which the student writes a part of the answers that it is taught on."""

import json
import shutil

import pytest

from uld_jax.train import MEASURED

FLAGS = (
    "--config.train.on_policy_fraction=0.5",
    "--config.train.on_policy_tokens=8",
    "--config.student.max_length=400",
    "--config.teacher.max_length=400",
)


def rows_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


@pytest.fixture(scope="module")
def sampled(tiny, tmp_path_factory):
    from uld_jax.cli.main import main

    workdir = tmp_path_factory.mktemp("on_policy") / "run"
    assert main(["train", tiny.config, f"--workdir={workdir}", *FLAGS]) == 0
    return workdir


def test_metrics_count_the_students_own_answers(sampled):
    rows = rows_of(sampled)
    assert len(rows) == 4
    # An untrained student writes bytes that are no text: many are longer when read again.
    assert 1 <= sum(row["on_policy_rows"] for row in rows) <= 16
    for row in rows:
        assert row["on_policy_rows"] <= 4
        assert row["total"] == pytest.approx(row["cross_entropy"] + 1.5 * row["uld"], rel=1e-5)


def test_a_resumed_run_samples_the_same_answers(sampled, uld, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(sampled, again)
    for left in ("student", "checkpoints/4"):
        shutil.rmtree(again / left)
    (again / "after.json").unlink()
    assert uld("train", f"--workdir={again}").status == 0
    assert rows_of(again) == rows_of(sampled)
    name = "student/model.safetensors"
    assert (again / name).read_bytes() == (sampled / name).read_bytes()
