"""Several processes that share a workdir in a bucket."""

import json
import os
import signal
import sys

import pytest

from tests.stores import REPOSITORY, SERVERS
from uld_jax.files import copy_file, files_below, locate
from uld_jax.train import MEASURED, read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """Starts a store of a kind and leads this process and its children to it."""
    monkeypatch.setenv("ULD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def serve(scheme):
        store = SERVERS[scheme]
        store.skip_if_absent()
        return store.served(tmp_path / "server.log")

    return serve


def started(pod, *arguments, log):
    path = os.pathsep.join((str(REPOSITORY), *sys.path))
    # As many devices as `trained` has, so that padding and its share of the work are the same.
    return pod.start(2, 4, *arguments, log=log, PYTHONPATH=path)


def rows_of(workdir):
    """The metrics, without what no two runs share."""
    rows = read_metrics(workdir)
    return [{name: row[name] for name in row if name not in MEASURED} for row in rows]


def test_a_run_of_two_killed_in_cloud_storage_goes_on(serving, pod, tiny, trained, tmp_path):
    workdir, log = "gs://bucket/run", tmp_path / "log"
    with serving("gs"):
        place = locate(workdir)
        commit = place / "checkpoints" / "2" / "commit_success.txt"
        process = started(pod, "train", tiny.config, f"--workdir={workdir}", log=log)
        pod.wait_until(commit.exists, process, log)
        for index in range(2):
            os.kill(pod.member(index, workdir), signal.SIGKILL)
        assert process.wait(timeout=90) in pod.lost
        assert not (place / "after.json").exists()
        process = started(pod, "train", f"--workdir={workdir}", log=log)
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
        # It went on: the first steps are those of the run that was killed.
        assert not any("step 1/4" in line for line in pod.said(log, 0))
        found, expected = rows_of(place), rows_of(trained)
        assert len(found) == len(expected) == 4
        for row, other in zip(found, expected, strict=True):
            assert row == pytest.approx(other, rel=1e-6, abs=1e-6)
        for name in ("before.json", "teacher_answers.json"):
            assert (place / name).read_bytes() == (trained / name).read_bytes()
        names = [sorted(p.name for p in (run / "student").iterdir()) for run in (place, trained)]
        assert names[0] == names[1]
        assert {"2", "4"} == {path.name for path in (place / "checkpoints").iterdir()}


def test_two_read_a_run_in_s3_and_do_not_train_there(serving, pod, tiny, trained, tmp_path):
    log, scores = tmp_path / "log", [tmp_path / f"{name}.json" for name in ("bucket", "disk")]
    with serving("s3"):
        process = started(pod, "train", tiny.config, "--workdir=s3://bucket/run", log=log)
        assert process.wait(timeout=300) == 2, log.read_text()[-3000:]
        for index in range(2):
            (line,) = [line for line in pod.said(log, index) if line.startswith("error")]
            assert line.startswith("error: --workdir=s3://bucket/run: 2 processes write the parts")
        assert not locate("s3://bucket/run").exists()
        for file in files_below(trained):
            copy_file(file, locate("s3://bucket/run") / str(file.relative_to(trained)))
        for workdir, output in zip(("s3://bucket/run", trained), scores, strict=True):
            command = ("evaluate", f"--workdir={workdir}", f"--output={output}")
            process = started(pod, *command, log=log)
            assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
        found, expected = (json.loads(path.read_text())["scores"] for path in scores)
        assert found == expected
