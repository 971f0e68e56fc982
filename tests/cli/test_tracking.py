"""A run that sends its metrics to Weights & Biases, with its package and without its service."""

import sys

import pytest

PROJECT = "--config.train.wandb_project=distil"


def test_steps_and_scores_are_sent(tiny, uld, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    workdir = f"--workdir={tmp_path / 'run'}"
    result = uld("train", tiny.config, workdir, PROJECT, "--config.train.max_steps=1")
    assert (result.status, result.err) == (0, "")
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    for text in (b"train/total", b"train/uld", b"eval/f1", b"uld_weight"):
        assert text in file.read_bytes()


def test_without_the_package_nothing_is_begun(tiny, uld, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = uld("train", tiny.config, f"--workdir={tmp_path / 'run'}", PROJECT)
    assert result.status == 2
    assert result.err.startswith("error: train.wandb_project: ")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
