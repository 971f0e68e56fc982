"""What loading costs the host, measured in processes of their own."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

from uld_jax.testing import toy_tokenizer

VOCABULARY, WIDTH, MLP, LAYERS, HEADS, KV_HEADS = 32_000, 1024, 4096, 12, 16, 8
CONFIG = transformers.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=MLP,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    tie_word_embeddings=False,
)
# The bound, on the bytes of the loaded arrays.
BOUND = 1.3

MEASURE = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from uld_jax import models

def memory(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024

# What the backend itself needs, and the least that compiling anything does.
jax.jit(lambda x: x @ x)(jnp.ones((64, 64))).block_until_ready()
# Linux then counts the peak from here on.
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
m = models.load(sys.argv[1])
size = sum(x.nbytes for x in jax.tree.leaves(models.parameters(m.model)))
print(json.dumps({"size": size, "before": before, "peak": memory("VmHWM") - before}))
"""


def measured(path):
    """Bytes of the loaded parameters, and by how much the process grew at most."""
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-W", "error", "-c", MEASURE, str(path)]
    done = subprocess.run(run, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def layer_shapes(layer):
    block, kv = f"model.layers.{layer}.", KV_HEADS * WIDTH // HEADS
    return {
        f"{block}input_layernorm.weight": (WIDTH,),
        f"{block}post_attention_layernorm.weight": (WIDTH,),
        f"{block}self_attn.q_proj.weight": (WIDTH, WIDTH),
        f"{block}self_attn.k_proj.weight": (kv, WIDTH),
        f"{block}self_attn.v_proj.weight": (kv, WIDTH),
        f"{block}self_attn.o_proj.weight": (WIDTH, WIDTH),
        f"{block}mlp.gate_proj.weight": (MLP, WIDTH),
        f"{block}mlp.up_proj.weight": (MLP, WIDTH),
        f"{block}mlp.down_proj.weight": (WIDTH, MLP),
    }


OUTER = {
    "model.embed_tokens.weight": (VOCABULARY, WIDTH),
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (VOCABULARY, WIDTH),
}


def write_sharded(directory, kind):
    """A checkpoint in four files, its layers in turn in each; written a file at a time."""
    CONFIG.save_pretrained(directory)
    toy_tokenizer().save_pretrained(directory)
    rng, weight_map = np.random.default_rng(0), {}
    for part in range(4):
        shapes = OUTER if part == 3 else {}
        for layer in range(part, LAYERS, 4):
            shapes = shapes | layer_shapes(layer)
        file = f"model-{part + 1:05}-of-00004.safetensors"
        tensors = {n: rng.random(s, np.float32).astype(kind) for n, s in shapes.items()}
        safetensors.numpy.save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def scratch(tmp_path):
    """A folder whose large files go when the test is done."""
    yield tmp_path
    for path in tmp_path.glob("*"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_a_sharded_checkpoint(scratch, kind):
    write_sharded(scratch, kind)
    found = measured(scratch)
    assert found["size"] > 0.95e9
    print(f"{np.dtype(kind)}: peak {found['peak'] / found['size']:.3f} of {found['size']} bytes")
    assert found["peak"] <= BOUND * found["size"]
