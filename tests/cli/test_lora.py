"""A run with adapters and a quantised teacher on the command line: train, resume, export."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
import transformers

from uld_jax import models

FLAGS = ("--config.student.lora_rank=4", "--config.teacher.quantize=int8")


@pytest.fixture(scope="module")
def adapted(tiny, tmp_path_factory):
    """The workdir of a whole run."""
    from uld_jax.cli.main import main

    workdir = tmp_path_factory.mktemp("adapted") / "run"
    assert main(["train", tiny.config, *FLAGS, f"--workdir={workdir}"]) == 0
    return workdir


def tensors(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def test_the_student_is_saved_merged(adapted, tiny):
    before, after = tensors(tiny.student), tensors(adapted / "student")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = np.array_equal(tensor, after[name])
        assert same != name.endswith("_proj.weight"), name
    ours = models.load(adapted / "student").model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(adapted / "student")
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(tokens), expected, atol=1e-5, rtol=1e-4)


def test_checkpoints_hold_adapters_alone(adapted):
    newest = max(int(path.name) for path in (adapted / "checkpoints").iterdir())
    handler = ocp.StandardCheckpointHandler()
    stored = handler.metadata(adapted / "checkpoints" / str(newest) / "params")
    names = {leaf.name.removesuffix(".value") for leaf in jax.tree.leaves(stored)}
    assert len(names) == 2 * 7
    assert all(name.endswith(("_lora_a", "_lora_b")) for name in names)


def test_a_run_that_stopped_goes_on_to_the_same_student(adapted, uld, tmp_path):
    workdir = shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(workdir / "student")
    (workdir / "after.json").unlink()
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest)
    result = uld("train", f"--workdir={workdir}")
    assert result.status == 0, result.err
    assert "trained are adapters of rank 4" in result.out
    assert "teacher: int8," in result.out
    for path in (adapted / "student").iterdir():
        assert (workdir / "student" / path.name).read_bytes() == path.read_bytes(), path.name


def test_export_and_evaluate_read_the_adapters(adapted, uld, tmp_path):
    assert uld("export", f"--workdir={adapted}", f"--output={tmp_path / 'out'}").status == 0
    for name, tensor in tensors(adapted / "student").items():
        np.testing.assert_array_equal(tensor, tensors(tmp_path / "out")[name], name)
    assert uld("evaluate", f"--workdir={adapted}").status == 0


def test_a_matrix_that_the_student_lacks_is_one_line(tiny, uld, tmp_path):
    flags = (*FLAGS, "--config.student.lora_targets=mlp.up,cross.query")
    result = uld("train", tiny.config, *flags, f"--workdir={tmp_path / 'run'}")
    assert result.status == 2
    assert "lora_targets: the model has no cross.query; it has attention.key" in result.err
    assert not (tmp_path / "run").exists()
