"""Checksums of models: the same wherever the weights lie, another for other weights."""

import dataclasses

import jax.numpy as jnp
import pytest

from uld_jax import models
from uld_jax.sharding import make_mesh
from uld_jax.testing import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    models.save_pretrained(tiny_model(), directory)
    return directory


def test_a_mesh_changes_nothing(saved):
    found = {
        models.fingerprint(models.load(saved, mesh=make_mesh(*shape)))
        for shape in ((8, 1, 1), (1, 4, 2))
    }
    assert found == {models.fingerprint(models.load(saved))}


def test_weights_their_type_and_config_count(saved):
    m = models.load(saved)
    others = [
        models.fingerprint(models.load(saved, param_dtype="bfloat16")),
        models.fingerprint(dataclasses.replace(m, config=dataclasses.replace(m.config, eos_id=3))),
    ]
    own = models.fingerprint(m)
    m.model.norm.set_value(m.model.norm[...].at[3].add(1e-6))
    others.append(models.fingerprint(m))
    m.model.norm.set_value(jnp.negative(m.model.norm[...]))
    others.append(models.fingerprint(m))
    for kind in ("int8", "int4"):
        quantised = models.load(saved)
        models.quantize(quantised.model, kind)
        others.append(models.fingerprint(quantised))
    assert len({own, *others}) == 7
