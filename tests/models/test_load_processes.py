"""Two processes load one model: each reads what its own devices hold, and no more."""

import json
import os
import socket
import subprocess
import sys

import pytest

from uld_jax import models
from uld_jax.testing import tiny_config, tiny_model

LAYER_NORM = {
    "norm": "layer",
    "gated": False,
    "parallel": True,
    "kv_heads": 4,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "activation": "gelu",
}
# Plain and tied; all three in one tensor, a group a head; the same in one group; stored [in, out].
CONFIGS = {
    "llama": tiny_config(),
    "gpt_neox": tiny_config(family="gpt_neox", tied=False, **LAYER_NORM),
    "phi3": tiny_config(family="phi3", tied=False),
    "gpt2": tiny_config(
        family="gpt2", positions="learned", **(LAYER_NORM | {"parallel": False, "mlp_width": 128})
    ),
}

CHILD = """
import json, sys
from pathlib import Path
import jax, numpy as np
from flax import nnx

jax.config.update("jax_cpu_collectives_implementation", "gloo")
process, address, *directories = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
from uld_jax import models
from uld_jax.models.reading import parameters_of, read_parameter
from uld_jax.models.safetensors_source import SafetensorsSource
from uld_jax.sharding import make_mesh


class Counting(SafetensorsSource):
    total = 0

    def read(self, name, boxes):
        parts = super().read(name, boxes)
        self.total += sum(part.nbytes for part in parts)
        return parts


mine = make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
answer = []
for directory in directories:
    whole = models.load(directory, mesh=mine)
    expected = models.parameters(whole.model)
    abstract = models.parameters(
        models.abstract_decoder(whole.config, models.Policy(), "float32")
    )
    for shape in ((1, 4, 1), (1, 2, 2), (4, 1, 1)):
        source, mesh, held = Counting(Path(directory)), make_mesh(*shape), 0
        flat = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(expected)}
        for weight, param in parameters_of(source, abstract):
            array = read_parameter(source, weight, param, mesh)
            assert not array.is_fully_addressable
            right, shards = np.asarray(flat[weight.path][...]), {}
            for shard in array.addressable_shards:
                shards[str(shard.index)] = shard.data
                np.testing.assert_array_equal(shard.data, right[shard.index], weight.path)
            held += sum(data.nbytes for data in shards.values())
        size = sum(x.nbytes for x in jax.tree.leaves(expected))
        answer.append({"read": source.total, "held": held, "whole": size})
print(json.dumps(answer))
"""


def free_address():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        models.save_pretrained(tiny_model(config), root / name)
    return [str(root / name) for name in CONFIGS]


def test_each_process_reads_what_its_devices_hold(directories):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(number), address, *directories],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for number in range(2)
    ]
    ends = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, err[-3000:]
    for out, _ in ends:
        answers = json.loads(out.splitlines()[-1])
        assert len(answers) == 3 * len(CONFIGS)
        for number, found in enumerate(answers):
            assert found["read"] == found["held"]
            # The last mesh only replicates; the others leave half of the matrices to the other.
            share = found["held"] / found["whole"]
            assert share == 1 if number % 3 == 2 else share < 0.6
