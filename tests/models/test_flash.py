"""Attention kernels: the splash kernel against ours, compiled for TPUs; cuDNN lowered for CUDA.

Run as a script, this file compiles a decoder's loss gradient for a v5e 2x2 slice and prints facts.
"""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from uld_jax.models import Decoder, Policy
from uld_jax.models.flash import choose_backend, splash_attention
from uld_jax.models.layers import attention, attention_mask
from uld_jax.sharding import make_mesh
from uld_jax.testing import tiny_config, tiny_gemma
from uld_jax.train.state import param_shardings

RNG = np.random.default_rng(0)
SEGMENTS = jnp.array([[1] * 100 + [2] * 100 + [0] * 56, [1] * 256])
LENGTH = 4096


def normal(*shape):
    return jnp.array(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (40, 0.0), (0, 2.0)])
@pytest.mark.parametrize("sequence", [0, 1, 2], ids=["alone", "meshed", "sequence"])
def test_splash_equals_plain_attention(window, softcap, sequence):
    q, k, v = normal(2, 256, 4, 16), normal(2, 256, 2, 16), normal(2, 256, 2, 16)
    weights = normal(2, 256, 4, 16)
    positions = jnp.broadcast_to(jnp.arange(256), (2, 256))
    mask = attention_mask(positions, positions, SEGMENTS, SEGMENTS)
    if window:
        mask &= positions[:, :, None] - positions[:, None, :] < window

    def kernel(q, k, v):
        options = {"window": window, "softcap": softcap, "interpret": True}
        return (weights * splash_attention(q, k, v, SEGMENTS, scale=0.3, **options)).sum()

    def plain(q, k, v):
        return (weights * attention(q, k, v, mask, scale=0.3, softcap=softcap)).sum()

    found = jax.value_and_grad(kernel, argnums=(0, 1, 2))
    if sequence:
        devices = jax.devices()[: 4 * sequence]
        mesh = make_mesh(1, 2, 2, sequence=sequence, devices=devices)
        with jax.set_mesh(mesh):
            found = jax.jit(found)(q, k, v)
    else:
        found = found(q, k, v)
    expected = jax.value_and_grad(plain, argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "attention", "length", "expected"),
    [
        ({}, "auto", 128, "xla"),
        ({}, "splash", 128, "splash"),
        ({}, "splash", 100, "xla"),
        ({"positions": "alibi"}, "splash", 128, "xla"),
        ({}, "cudnn", 128, "cudnn"),
    ],
)
def test_the_backend_suits_model_and_machine(changes, attention, length, expected):
    assert choose_backend(tiny_config(**changes), Policy(attention=attention), length) == expected


def test_the_backend_suits_a_row_in_parts():
    mesh = make_mesh(1, 1, 1, sequence=2, devices=jax.devices()[:2])
    half = {"splash": Policy(attention="splash"), "cudnn": Policy("bfloat16", attention="cudnn")}
    with jax.set_mesh(mesh):
        assert choose_backend(tiny_config(), half["splash"], 256) == "splash"
        assert choose_backend(tiny_config(), half["splash"], 128) == "xla"
        assert choose_backend(tiny_config(), half["cudnn"], 256) == "xla"


def loss_gradient(config, attention):
    """The gradient function of a decoder in bfloat16, and its abstract arguments."""
    policy = Policy("bfloat16", remat="dots", attention=attention)
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, policy, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32)

    def loss(params, tokens, segments):
        hidden = nnx.merge(graph, params).hidden(tokens, segment_ids=segments)
        return (hidden.astype(jnp.float32) ** 2).sum()

    return jax.grad(loss), (params, tokens, tokens)


def compile_for_tpu():
    """Of each backend: whether the program calls kernels, and temporary bytes of a chip."""
    slice_2x2 = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = make_mesh(1, 2, 2, devices=slice_2x2.devices)
    config = tiny_gemma(heads=8, kv_heads=2, head_dim=64, width=128, mlp_width=256, window=256)
    facts = {}
    for backend in ("splash", "xla"):
        program, arguments = loss_gradient(config, backend)
        with jax.set_mesh(mesh):
            shardings = (param_shardings(arguments[0], mesh), None, None)
            compiled = jax.jit(program, in_shardings=shardings).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        facts[backend] = {
            "kernels": compiled.as_text().count("tpu_custom_call"),
            "temporary_bytes": memory.temp_size_in_bytes,
        }
    return facts


def test_splash_compiles_for_tpu_and_holds_no_square():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is absent: pip install 'uld-jax[plan]'")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    command = [sys.executable, __file__]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    facts = json.loads(found.stdout.splitlines()[-1])
    # Forward, and the two backward kernels, each for local and for global layers.
    assert facts["splash"]["kernels"] >= 6
    assert facts["xla"]["kernels"] == 0
    assert facts["splash"]["temporary_bytes"] < facts["xla"]["temporary_bytes"] / 8


def test_cudnn_lowers_for_cuda(monkeypatch):
    # Lowering asks this machine for its cuDNN, which has none; nothing else is replaced.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    program, arguments = loss_gradient(tiny_config(head_dim=64), "cudnn")
    kernels = [f"__cudnn$fmhaScaleBiasSoftmax{way}" for way in ("", "Backward")]
    exported = jax.export.export(
        jax.jit(program),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels],
    )(*arguments)
    assert all(f"@{name}(" in exported.mlir_module() for name in kernels)


if __name__ == "__main__":
    print(json.dumps(compile_for_tpu()))
