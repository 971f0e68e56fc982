"""Every loss compiles for a TPU v5e slice and lowers for CUDA; neither device is needed.

Run as a script, this file compiles the losses named by its arguments for a v5e 2x2 slice, batch
over its four chips, and prints what the compiler says of each as JSON.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uld_jax.losses import (
    HeadTeacher,
    SortedTeacher,
    fused_uld_cross_entropy,
    level_set_uld,
    sharded_uld,
    sharded_uld_cross_entropy,
    sorted_probabilities,
    truncated_uld,
    uld,
    uld_to_sorted,
)
from uld_jax.losses.aligned import hybrid_loss, span_aligned_uld
from uld_jax.losses.divergences import DIVERGENCES

B, V, U = 8, 49_152, 262_144
SMALL = 4096
CHIPS = 4


class Case(NamedTuple):
    """A function and the shapes and types of its arguments.

    Attributes:
        function: of arrays only.
        arguments: what it is compiled for.
        gradient: whether its sum is compiled with the gradient by the first argument.
        specs: how the arguments lie on the four chips; None for the batch on each first axis.
    """

    function: Callable[..., jax.Array]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    gradient: bool = True
    specs: tuple[PartitionSpec, ...] | None = None

    def program(self) -> Callable[..., object]:
        if not self.gradient:
            return self.function
        return jax.value_and_grad(lambda *arguments: self.function(*arguments).sum())

    def shardings(self, mesh: Mesh) -> tuple[NamedSharding, ...]:
        specs = self.specs or (PartitionSpec("batch"),) * len(self.arguments)
        return tuple(NamedSharding(mesh, spec) for spec in specs)

    def bytes_per_chip(self) -> int:
        return sum(a.size * a.dtype.itemsize for a in self.arguments) // CHIPS


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def value_and_bound(student, teacher):
    value, bound = level_set_uld(student, teacher)
    return value + jax.lax.stop_gradient(bound)


def value_and_bounds(student, probs, tail, *, method):
    value, lower, upper = truncated_uld(student, probs, tail, method=method)
    return value + lower + upper


def fused(method, *, teacher, sharded=False):
    """Hidden states and heads, the vocabularies whole or over the four chips."""
    hidden, per_position, specs = floats(B, 64, 32), floats(B, 64), PartitionSpec("batch")
    heads = floats(SMALL, 32), floats(2 * SMALL, 32)
    if teacher == "sorted":
        arguments = (hidden, heads[0], floats(B, 64, 128), per_position)

        def loss(hidden, head, probs, tail, *weights):
            signal = {"teacher_probs_sorted": probs, "teacher_tail_mass": tail}
            return total(hidden, head, None, None, *weights, **signal)

    else:
        arguments = (hidden, heads[0], hidden, heads[1])

        def loss(*arrays):
            return total(*arrays)

    def total(*arrays, **signal):
        *arrays, targets, ce_weights, uld_weights = arrays
        options = {"ce_weights": ce_weights, "method": method}
        if not sharded:
            options["uld_weights"] = uld_weights
            return fused_uld_cross_entropy(*arrays, targets, **options, **signal).total
        if signal:
            probs, tail = signal.values()
            teacher = SortedTeacher(probs, uld_weights, tail)
        else:
            teacher = HeadTeacher(*arrays[2:], uld_weights)
        options |= {"mesh": jax.sharding.get_abstract_mesh(), "vocab_axis": "batch"}
        return sharded_uld_cross_entropy(*arrays[:2], [teacher], targets, **options).total

    arguments += (integers(B, 64), per_position, per_position)
    whole = PartitionSpec()
    if sharded:
        specs = tuple(specs if x in heads else whole for x in arguments)
    else:
        specs = tuple(whole if x in heads else specs for x in arguments)
    return Case(loss, arguments, specs=specs)


def over_chips(student, teacher, *, method):
    mesh = jax.sharding.get_abstract_mesh()
    return sharded_uld(student, teacher, mesh=mesh, vocab_axis="batch", method=method)


MATCHED = np.arange(100, dtype=np.int32)
METHODS = ("sort", "level_set")


def aligned(function):
    """Four groups of at most three tokens a side."""
    logits = floats(B, 5, 300), floats(B, 6, 500)
    ids = integers(B, 5), integers(B, 6)
    groups = integers(B, 4, 3), integers(B, 4, 3)
    return Case(function, (*logits, *ids, *groups))


LOGITS = floats(B, V), floats(B, U)
CASES = {
    "uld/sort": Case(partial(uld, method="sort"), LOGITS),
    "uld/level_set": Case(partial(uld, method="level_set"), LOGITS),
    # So many rows that nothing larger than a row's probabilities may be kept of each.
    **{
        f"uld/{method}/many rows": Case(
            partial(uld, method=method), (floats(512 * CHIPS, SMALL),) * 2
        )
        for method in METHODS
    },
    "level_set_uld": Case(value_and_bound, (floats(B, SMALL), floats(B, SMALL))),
    "sorted_probabilities": Case(sorted_probabilities, (floats(B, U),), gradient=False),
    **{
        f"uld_to_sorted/{method}": Case(
            partial(uld_to_sorted, method=method), (floats(B, SMALL), floats(B, SMALL))
        )
        for method in METHODS
    },
    **{
        f"truncated_uld/{method}": Case(
            partial(value_and_bounds, method=method), (floats(B, SMALL), floats(B, 128), floats(B))
        )
        for method in METHODS
    },
    **{
        f"fused/{method}/{teacher}": fused(method, teacher=teacher)
        for method in METHODS
        for teacher in ("hidden", "sorted")
    },
    **{
        f"fused/{method}/{teacher}/sharded": fused(method, teacher=teacher, sharded=True)
        for method in METHODS
        for teacher in ("hidden", "sorted")
    },
    **{
        f"sharded_uld/{method}": Case(
            partial(over_chips, method=method),
            (floats(B, SMALL),) * 2,
            specs=(PartitionSpec(None, "batch"),) * 2,
        )
        for method in METHODS
    },
    **{name: Case(function, (floats(B, SMALL),) * 2) for name, function in DIVERGENCES.items()},
    "span_aligned_uld": aligned(span_aligned_uld),
    "hybrid_loss": aligned(partial(hybrid_loss, student_matched=MATCHED, teacher_matched=MATCHED)),
}
# What a TPU does one element at a time.
SLOW_ON_TPU = {"gather", "scatter"}
# These look up the observed tokens of each group: a few elements.
LOOK_UP = {"span_aligned_uld", "hybrid_loss"}


def operations(program):
    """The names of the operations in the text of an optimised program."""
    return set(re.findall(r"^\s+(?:ROOT )?%?\S+ = .*? ([a-z][a-z\-]*)\(", program, re.MULTILINE))


def compile_for_tpu(names):
    """Facts of each named case: operations, temporary bytes of a chip, the compiler's estimates."""
    slice_2x2 = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(slice_2x2.devices, "batch")
    facts = {}
    for name in names:
        case = CASES[name]
        with jax.set_mesh(mesh):
            shardings = case.shardings(mesh)
            lowered = jax.jit(case.program(), in_shardings=shardings).lower(*case.arguments)
        program = lowered.compile()
        memory, costs = program.memory_analysis(), program.cost_analysis()
        assert memory is not None
        assert costs is not None
        facts[name] = {
            "operations": sorted(operations(program.as_text())),
            "temporary_bytes": memory.temp_size_in_bytes,
            "flops": costs["flops"],
            "bytes_accessed": costs["bytes accessed"],
        }
    return facts


@pytest.fixture(scope="module")
def on_tpu():
    """What a fresh process, which may load libtpu, finds out about all cases."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is absent: pip install 'uld-jax[plan]'")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # No TPU is there: neither ask the cloud about it, nor lock it against other processes.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    command = [sys.executable, __file__, *CASES]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_tpu_without_element_by_element_operations(name, on_tpu):
    facts = on_tpu[name]
    operations = set(facts["operations"])
    assert "fusion" in operations
    if name not in LOOK_UP:
        assert not operations & SLOW_ON_TPU
    assert "all-gather" not in operations
    assert facts["flops"] > 0
    assert facts["bytes_accessed"] > 0
    assert facts["temporary_bytes"] <= 3 * CASES[name].bytes_per_chip() + 2**20


@pytest.mark.parametrize("name", [name for name in CASES if "level_set" in name])
def test_level_sets_sort_nothing_on_tpu(name, on_tpu):
    # To cut the student's tail off takes its K largest, which XLA sorts for on a TPU.
    truncates = name.startswith("truncated") or "/sorted" in name
    assert ("sort" in on_tpu[name]["operations"]) == truncates


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda(name):
    case = CASES[name]
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((CHIPS,), ("batch",), axis_types=auto, devices=jax.devices()[:CHIPS])
    with jax.set_mesh(mesh):
        program = jax.jit(case.program(), in_shardings=case.shardings(mesh))
        exported = jax.export.export(program, platforms=["cuda"])(*case.arguments)
    program = exported.mlir_module()
    assert exported.platforms == ("cuda",)
    # No call back into Python, and nothing that only a CPU has.
    assert "callback" not in program
    assert "lapack" not in program


if __name__ == "__main__":
    print(json.dumps(compile_for_tpu(sys.argv[1:])))
