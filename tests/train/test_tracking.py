"""Weights & Biases, with its own package and without its service."""

import sys

import pytest

from uld_jax.errors import UserError
from uld_jax.train import WandbRun, require_wandb


def test_a_resumed_run_sends_its_numbers_under_the_same_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for step in (1, 2):
        with WandbRun("distil", tmp_path / "run", {"loss": {"uld_weight": 1.5}}) as run:
            run.log("train", {"step": step, "total": 0.25 * step}, step=step)
            run.log("eval", {"f1": 40.5}, step=step)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1
    said = b"".join(path.read_bytes() for path in files)
    for text in (b"train/total", b"0.25", b"0.5", b"eval/f1", b"40.5", b"uld_weight", b"distil"):
        assert text in said
    assert b"train/step" not in said


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'uld-jax\[wandb\]'"):
        require_wandb()
