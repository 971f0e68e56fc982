"""The candidates of the sweep: each is what it says, and each is measured."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from uld_jax.benchmark import level_set, losses, pytorch
from uld_jax.benchmark.timing import OutOfMemory, Program
from uld_jax.losses import reference_uld
from uld_jax.losses.uld import METHODS

CASE = losses.Case(20, 33, 3)
OPTIONS = {"kind": "normal", "seed": 0, "repeats": 2}


def arrays(student=20, teacher=33, seed=0):
    return losses.random_logits(losses.Case(student, teacher, 3), kind="normal", seed=seed)


@pytest.mark.parametrize(("student", "teacher"), [(20, 33), (33, 20), (16, 16)])
def test_pytorch_value_and_gradient_equal_the_reference(student, teacher):
    logits = arrays(student, teacher)
    value, gradient = pytorch.forward_backward(torch, "cpu", *map(np.asarray, logits))()
    expected = jax.value_and_grad(lambda s: reference_uld(s, logits[1]).mean())(logits[0])
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient.numpy(), expected[1], atol=1e-7)
    assert pytorch.forward(torch, "cpu", *map(np.asarray, logits))() == pytest.approx(value)


def test_pytorch_gradients_do_not_pile_up():
    run = pytorch.forward_backward(torch, "cpu", *map(np.asarray, arrays()))
    first = run()[1].numpy().copy()
    np.testing.assert_array_equal(run()[1].numpy(), first)


def test_every_method_is_a_candidate_and_computes_the_distance():
    logits = arrays()
    candidates = losses.candidates()
    assert set(candidates) == {*METHODS, "jnp.sort", "softmax", *losses.TORCH}
    for name in (*METHODS, "jnp.sort"):
        np.testing.assert_allclose(candidates[name](*logits), reference_uld(*logits), atol=1e-3)


def test_the_floor_has_a_gradient_by_the_student_alone():
    student, teacher = arrays()
    by_student, by_teacher = jax.grad(
        lambda s, t: losses.softmax_floor(s, t).sum(), argnums=(0, 1)
    )(student, teacher)
    assert jnp.abs(by_student).min() > 0
    np.testing.assert_array_equal(by_teacher, jnp.zeros_like(teacher))


def test_logits_follow_seed_and_kind():
    case = losses.Case(2_000, 1_000, 2)
    one, again, other = (
        losses.random_logits(case, kind="normal", seed=seed)[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert jnp.std(one) == pytest.approx(2, rel=0.1)
    peaked = jax.nn.softmax(losses.random_logits(case, kind="peaked", seed=0)[0])
    assert (jax.lax.top_k(peaked, 10)[0].sum(-1) > 0.6).all()
    # The likely tokens do not lie in order, and not in the same place in every row.
    assert (peaked.argmax(-1) > 0).all()
    assert peaked[0].argmax() != peaked[1].argmax()


def test_measure_times_every_candidate_and_compares_with_the_baselines():
    result = losses.measure(CASE, list(losses.candidates()), **OPTIONS)
    assert (result["student_vocab"], result["teacher_vocab"], result["positions"]) == (20, 33, 3)
    assert list(result["candidates"]) == list(losses.candidates())
    for name, candidate in result["candidates"].items():
        for which in losses.PASSES:
            own = candidate[which]
            assert own["status"] == "ok"
            assert len(own["seconds"]) == 2
            assert 0 < own["lower_ms"] <= own["median_ms"] <= own["upper_ms"]
            assert own["median_ms"] == pytest.approx(1e3 * np.median(own["seconds"]) / 3)
            assert (own["compile_s"] is None) == (name in losses.TORCH)
            assert own["temp_bytes"] > 0
            for baseline in losses.BASELINES:
                names = losses.TORCH if baseline == "pytorch" else (baseline,)
                theirs = np.min([result["candidates"][n][which]["seconds"] for n in names], 0)
                expected = np.median(np.divide(theirs, own["seconds"]))
                assert candidate["speedup"][which][baseline] == pytest.approx(expected)


def test_without_the_baselines_there_are_no_ratios():
    result = losses.measure(CASE, ["softmax"], **OPTIONS)
    ratios = result["candidates"]["softmax"]["speedup"]["forward"]
    assert ratios == {"pytorch": None, "jnp.sort": None}


def test_each_pytorch_candidate_sets_its_threads():
    threads = []
    programs = {n: dict(losses._torch_programs(n, arrays())) for n in losses.TORCH}
    for name in (*losses.TORCH, *losses.TORCH):
        programs[name]["forward"].run()
        threads.append(torch.get_num_threads())
    assert threads == [pytorch.all_threads(torch), 1] * 2


def test_pytorch_memory_is_the_peak_without_the_result():
    held = pytorch.temp_bytes(torch, "cpu", (32, 1_000), (32, 3_000))
    # Forward at its peak: sorted q [V]; p, its sorted copy and i64 indices [U]; in f32.
    assert held["forward"] == pytest.approx(4 * 32 * (1_000 + 4 * 3_000), rel=0.1)
    assert held["forward_backward"] > held["forward"]


def test_want_of_memory_is_a_result(monkeypatch):
    def greedy(student, teacher):
        del teacher
        return jnp.broadcast_to(student.sum(), (1 << 46,))[: student.shape[0]]

    def refuse(function, *arguments):
        if function.__closure__ and greedy in [c.cell_contents for c in function.__closure__]:
            raise OutOfMemory("too large")
        return Program(lambda: None, 0.5, 8)

    monkeypatch.setattr(losses, "compile_program", refuse)
    monkeypatch.setattr(losses, "candidates", lambda: {"greedy": greedy, "softmax": abs})
    result = losses.measure(CASE, ["greedy", "softmax"], **OPTIONS)["candidates"]
    assert result["softmax"]["forward"]["status"] == "ok"
    assert result["greedy"]["forward"] == {"status": "out of memory"}
    assert result["greedy"]["speedup"]["forward"] == {"pytorch": None, "jnp.sort": None}


def test_pytorch_out_of_memory_is_a_result(monkeypatch):
    monkeypatch.setattr(pytorch, "mean_distance", lambda torch, *_: torch.empty(1 << 60))
    result = losses.measure(CASE, ["pytorch", "softmax"], **OPTIONS)["candidates"]
    assert result["pytorch"]["forward_backward"] == {"status": "out of memory"}
    assert result["softmax"]["forward"]["status"] == "ok"


def test_logits_that_do_not_fit_are_a_result(monkeypatch):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(losses, "random_logits", refuse)
    result = losses.measure(CASE, ["softmax"], **OPTIONS)["candidates"]
    assert result["softmax"]["forward"] == {"status": "out of memory"}


def test_torch_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert pytorch.find_torch() is None


def test_exact_distance_equals_the_reference():
    student, teacher = arrays()
    student = student.at[0, 0].set(-jnp.inf)
    np.testing.assert_allclose(
        level_set.exact_distance(np.asarray(student), np.asarray(teacher)),
        reference_uld(student, teacher),
        rtol=1e-5,
    )


def test_level_set_curve_gets_more_exact_and_keeps_its_bound():
    student, teacher = arrays(400, 700)
    result = level_set.measure(student, teacher, bits=(3, 7), seed=0, repeats=1)
    coarse, fine = result["curve"]
    assert (coarse["bucket_bits"], fine["bucket_bits"]) == (3, 7)
    assert 0 < fine["mean_error"] <= fine["max_error"] < coarse["max_error"]
    assert fine["mean_bound"] < coarse["mean_bound"]
    assert coarse["beyond_bound"] == fine["beyond_bound"] == 0
    for passes in (coarse, fine, result["sort"]):
        assert all(passes[which]["status"] == "ok" for which in losses.PASSES)


def test_level_set_counts_positions_beyond_their_bound(monkeypatch):
    shift = np.array([0, 0.5, 0.5])
    monkeypatch.setattr(level_set, "exact_distance", lambda s, t: reference_uld(s, t) + shift)
    result = level_set.measure(*arrays(), bits=(7,), seed=0, repeats=1)
    assert result["curve"][0]["beyond_bound"] == 2
