"""Checkpoints: bit for bit, on any mesh, and never a damaged one."""

import functools
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from uld_jax.config import OptimizerConfig
from uld_jax.errors import UserError
from uld_jax.models import Decoder
from uld_jax.sharding import make_mesh
from uld_jax.testing import tiny_config
from uld_jax.train import Checkpoints, init_state, make_optimizer, restore_params, state_shardings

MESHES = {"one device": (1, 1, 1), "eight devices": (2, 2, 2)}


def mesh_of(name):
    sizes = MESHES[name]
    return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def make_state(mesh_name="one device", *, step=2, config=None, tx=None):
    """A state full of different numbers, and its shardings."""
    mesh = mesh_of(mesh_name)
    params = nnx.state(Decoder(config or tiny_config(), rngs=nnx.Rngs(0)), nnx.Param)
    tx = tx or make_optimizer(OptimizerConfig(), 10, params)
    fresh = functools.partial(init_state, tx=tx, seed=7)
    shardings = state_shardings(jax.eval_shape(fresh, params), tx, mesh)
    leaves, tree = jax.tree.flatten(fresh(params))
    rng = np.random.default_rng(step)
    numbers = [(rng.standard_normal(x.shape) * 9).astype(x.dtype) for x in leaves]
    state = jax.tree.unflatten(tree, numbers)
    state = type(state)(np.int32(step), state.params, state.opt_state, state.key)
    return jax.device_put(state, shardings), shardings


def assert_equal_states(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def save(directory, *steps, keep=2):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            state, _ = make_state(step=step)
            checkpoints.save(state, {"position": step})


def restore(directory, mesh_name="one device", **changes):
    state, shardings = make_state(mesh_name, step=0, **changes)
    with Checkpoints(directory, keep=2) as checkpoints:
        return checkpoints.restore(state, shardings)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 2 and 4."""
    directory = tmp_path / "checkpoints"
    save(directory, 2, 4)
    return directory


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:500])


def flip_one_bit(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_a_file(folder):
    largest_file(folder).unlink()


def change_the_iterator(folder):
    path = folder / "data" / "metadata"
    path.write_text(json.dumps({"position": 99}))


def cut_the_digests(folder):
    path = folder / "SHA256SUMS"
    path.write_bytes(path.read_bytes()[:50] + b"\xff")


def remove_the_digests(folder):
    (folder / "SHA256SUMS").unlink()


DAMAGES = [
    cut,
    flip_one_bit,
    remove_a_file,
    change_the_iterator,
    cut_the_digests,
    remove_the_digests,
]


@pytest.mark.parametrize("mesh_name", MESHES)
def test_reads_back_bit_for_bit_on_any_mesh(saved, mesh_name):
    expected, shardings = make_state(mesh_name, step=4)
    state, iterator_state = restore(saved, mesh_name)
    assert_equal_states(state, expected)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    assert iterator_state == {"position": 4}


def test_saved_from_a_sharded_state(tmp_path):
    state, _ = make_state("eight devices", step=3)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, {})
    found, _ = restore(tmp_path)
    assert_equal_states(found, make_state(step=3)[0])


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    """Training goes on, into the same buffers, while the checkpoint is being written."""
    state, _ = make_state(step=1)
    onward = jax.jit(
        functools.partial(jax.tree.map, lambda x: x + jnp.ones((), x.dtype)), donate_argnums=0
    )
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, {})
        for _ in range(5):
            state = onward(state)
    found, _ = restore(tmp_path)
    assert_equal_states(found, make_state(step=1)[0])


def test_keeps_the_newest(tmp_path):
    save(tmp_path, 2, 4, 6, 8, keep=2)
    assert names(tmp_path) == ["6", "8"]


def test_nothing_there(tmp_path, caplog):
    assert restore(tmp_path / "checkpoints") is None
    assert caplog.messages == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_to_the_one_before(saved, caplog, damage):
    damage(saved / "4")
    state, iterator_state = restore(saved)
    assert_equal_states(state, make_state(step=2)[0])
    assert iterator_state == {"position": 2}
    assert caplog.messages == [
        f"checkpoint {saved / '4'} is damaged or not complete: trying step 2"
    ]
    # Gone, so that the run can write it again.
    assert names(saved) == ["2"]
    save(saved, 4)
    assert names(saved) == ["2", "4"]


def test_all_damaged(saved, caplog):
    for step in (2, 4):
        cut(saved / str(step))
    assert restore(saved) is None
    assert caplog.messages[-1] == ("no whole checkpoint is left: starting again from the beginning")
    assert names(saved) == []


def test_older_damage_does_not_matter(saved, caplog):
    cut(saved / "2")
    assert restore(saved)[1] == {"position": 4}
    assert caplog.messages == []


def test_what_a_kill_left_half_written_is_removed(saved):
    shutil.copytree(saved / "4", saved / "6.orbax-checkpoint-tmp")
    assert restore(saved)[1] == {"position": 4}
    assert names(saved) == ["2", "4"]


def test_digests_are_what_sha256sum_checks(saved):
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=saved / "4", check=False).returncode == 0
    flip_one_bit(saved / "4")
    failed = subprocess.run(command, cwd=saved / "4", check=False, capture_output=True)
    assert failed.returncode == 1


def test_another_model_is_an_error_and_keeps_the_checkpoints(saved):
    said = (
        "checkpoints/4 is of another model than the student (11 parameters differ, such as "
        "blocks.attention.key.value: (2, 32, 16) there, (2, 16, 16) here): give student.source"
    )
    with pytest.raises(UserError, match=re.escape(said)):
        restore(saved, config=tiny_config(width=16))
    said = "(1 parameters differ, such as head.value: absent there, (64, 32) here)"
    with pytest.raises(UserError, match=re.escape(said)):
        restore(saved, config=tiny_config(tied=False))
    assert names(saved) == ["2", "4"]


def test_another_optimizer_is_an_error_and_keeps_the_checkpoints(saved):
    with pytest.raises(UserError, match=r"checkpoints/4 is of another optimizer \("):
        restore(saved, tx=optax.adamw(1e-3))
    assert names(saved) == ["2", "4"]


def test_restore_params_reads_only(saved):
    cut(saved / "4")
    (saved / "6.orbax-checkpoint-tmp").mkdir()
    state, _ = make_state(step=0)
    params = restore_params(saved, state.params, mesh_of("eight devices"))
    assert_equal_states(params, make_state(step=2)[0].params)
    assert names(saved) == ["2", "4", "6.orbax-checkpoint-tmp"]


def test_restore_params_without_a_checkpoint(tmp_path):
    state, _ = make_state(step=0)
    for directory in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="no whole checkpoint; has the run begun to train"):
            restore_params(directory, state.params, mesh_of("one device"))
    assert names(tmp_path) == []
