"""A run that distils hidden states and attention on the command line: train, resume, export."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from uld_jax.cli.main import main
from uld_jax.train import read_metrics

FLAGS = (
    "--config.loss.hidden_weight=0.5",
    "--config.loss.attention_weight=10",
    "--config.loss.feature_layers=all",
)
ADAPTERS = pytest.param(("--config.student.lora_rank=4",), marks=pytest.mark.slow, id="adapters")


@pytest.fixture(scope="module", params=[pytest.param((), id="all weights"), ADAPTERS])
def distilled(request, tiny, tmp_path_factory):
    """The workdir of a whole run."""
    workdir = tmp_path_factory.mktemp("distilled") / "run"
    assert main(["train", tiny.config, *FLAGS, *request.param, f"--workdir={workdir}"]) == 0
    return workdir


def test_the_metrics_say_what_the_loss_is_made_of(distilled):
    rows = read_metrics(distilled)
    assert len(rows) == 4
    for row in rows:
        parts = row["cross_entropy"] + 1.5 * row["uld"] + 0.5 * row["hidden"]
        assert row["total"] == pytest.approx(parts + 10 * row["attention"], rel=1e-5)
        assert row["hidden"] > 0
        assert row["attention"] > 0


def test_a_run_that_stopped_goes_on_to_the_same_student(distilled, uld, tmp_path):
    workdir = shutil.copytree(distilled, tmp_path / "run")
    shutil.rmtree(workdir / "student")
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "after.json").unlink()
    result = uld("train", f"--workdir={workdir}")
    assert result.status == 0, result.err
    assert "+ 0.5 · hidden " in result.out
    for path in (distilled / "student").iterdir():
        assert (workdir / "student" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_student_has_no_projection(distilled, tiny, uld, tmp_path):
    before, after = (
        safetensors.numpy.load_file(directory / "model.safetensors")
        for directory in (tiny.student, distilled / "student")
    )
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    handler = ocp.StandardCheckpointHandler()
    stored = {
        item: [
            leaf.name
            for leaf in jax.tree.leaves(handler.metadata(distilled / "checkpoints" / "4" / item))
        ]
        for item in ("params", "optimizer")
    }
    assert not any("projections" in name for name in stored["params"])
    assert "projections.projections.0.value" in stored["optimizer"]
    # The teacher is not asked for its width: an export has the student alone.
    away = tiny.root / "teacher.away"
    (tiny.root / "teacher").rename(away)
    try:
        result = uld("export", f"--workdir={distilled}", f"--output={tmp_path / 'out'}")
    finally:
        away.rename(tiny.root / "teacher")
    assert result.status == 0, result.err
    exported = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in after.items():
        np.testing.assert_array_equal(exported[name], tensor, name)
