"""Which devices a command's models lie on, where several processes have some each."""

import jax
import pytest

from uld_jax.cli.devices import evaluation_mesh, mesh_of, meshes, own_mesh
from uld_jax.config import MeshConfig, RunConfig, TeacherConfig
from uld_jax.errors import UserError


@pytest.fixture
def second_of_two(monkeypatch):
    """Has this process the last four of the eight devices, and another the first four."""
    own = jax.devices()[4:]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_devices", lambda: own)
    monkeypatch.setattr(jax, "local_device_count", lambda: len(own))
    return own


def shape(mesh):
    return tuple(mesh.shape.values())


def test_one_process_has_the_config_s_mesh():
    axes = MeshConfig(data=2, fsdp=2, tensor=2, slices=2)
    assert own_mesh(axes) == mesh_of(axes)
    streamed = RunConfig(
        mesh=MeshConfig(fsdp=2), teacher=TeacherConfig(mode="stream", devices=4, fsdp=2)
    )
    mesh, apart = evaluation_mesh(streamed)
    assert (mesh, apart) == (meshes(streamed)["student"], False)
    assert list(mesh.devices.flat) == jax.devices()[:4]


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (MeshConfig(), (4, 1, 1, 1)),
        # What is given for all eight devices.
        (MeshConfig(data=2, fsdp=4, slices=2), (1, 4, 1, 1)),
        (MeshConfig(data=2, sequence=2, tensor=2), (1, 1, 2, 2)),
        (MeshConfig(data=2, fsdp=-1), (2, 2, 1, 1)),
    ],
)
def test_of_several_processes_each_has_its_own_devices(second_of_two, axes, expected):
    mesh = own_mesh(axes)
    assert shape(mesh) == expected
    assert set(mesh.devices.flat) == set(second_of_two)


def test_models_are_evaluated_apart_where_they_fit_on_one_process(second_of_two):
    mesh, apart = evaluation_mesh(RunConfig(mesh=MeshConfig(data=2, sequence=2, tensor=2)))
    assert (shape(mesh), apart) == ((2, 1, 1, 2), True)
    assert set(mesh.devices.flat) == set(second_of_two)
    for axes in (MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=-1)):
        together = RunConfig(mesh=axes)
        assert evaluation_mesh(together) == (meshes(together)["student"], False)
    with pytest.raises(UserError, match="does not multiply to the 4 devices"):
        own_mesh(MeshConfig(data=1, fsdp=8))
