"""Rotary frequencies of every scaling against transformers, and the rotation."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from uld_jax.errors import UserError
from uld_jax.models.families.rope import rope_from_hf, rope_to_hf
from uld_jax.models.rope import rotary_angles, rotary_frequencies, rotate

RNG = np.random.default_rng(0)
ORIGINAL = 64
SCALINGS = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn-mscale": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 4.0, 8.0],
    },
}


def normal(*shape):
    return RNG.normal(size=shape)


@pytest.mark.parametrize("length", [ORIGINAL, 1000])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_equal_transformers(name, fraction, length):
    kind, dim = name.split("-")[0], 8
    rope = {"rope_type": kind, "rope_theta": 500.0, **SCALINGS[name]}
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=1,
        head_dim=int(dim / fraction),
        max_position_embeddings=256,
        rope_parameters=rope | {"partial_rotary_factor": fraction},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    theta, part, scaling = rope_from_hf("llama", config.rope_parameters, 256)
    found = rotary_frequencies(dim, theta, scaling, length=length, max_positions=256)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)
    assert part == fraction
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx(factor, rel=1e-6)
    assert rope_from_hf("llama", rope_to_hf(theta, part, scaling), 256) == (theta, part, scaling)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "spiral"}, "spiral"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 7.0}, "beta_fast"),
    ],
)
def test_unknown_rotary_settings_are_named(rope, named):
    with pytest.raises(UserError, match=named):
        rope_from_hf("llama", rope | {"rope_theta": 1e4}, 64)


def test_rotation_is_complex_multiplication():
    x, positions, theta = normal(2, 3, 2, 6), np.array([[0, 1, 7], [5, 900, 4000]]), 500.0
    angles = rotary_angles(jnp.array(positions), rotary_frequencies(6, theta))
    turn = np.exp(1j * positions[:, :, None, None] * theta ** (-np.arange(3) / 3))
    turned = (x[..., :3] + 1j * x[..., 3:]) * turn
    found = rotate(jnp.array(x), angles)
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6)


def test_rotated_products_depend_on_the_distance_only():
    q, k = jnp.array(normal(1, 1, 1, 8)), jnp.array(normal(1, 1, 1, 8))

    def product(at_q, at_k):
        turned = (
            rotate(x, rotary_angles(jnp.array([[at]]), rotary_frequencies(8, 100.0)))
            for x, at in ((q, at_q), (k, at_k))
        )
        return float(jnp.vdot(*turned))

    assert product(3, 1) == pytest.approx(product(23, 21), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-3)
