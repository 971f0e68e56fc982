"""Encoder-decoders in the train step: every position is where its target is predicted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx

from uld_jax import models
from uld_jax.config import LossConfig, OptimizerConfig
from uld_jax.data import Example, Side, encode_pairs, make_loader
from uld_jax.losses import uld
from uld_jax.sharding import batch_shards, make_mesh
from uld_jax.testing import tiny_gemma, tiny_model, tiny_t5
from uld_jax.train import (
    StepTeacher,
    init_state,
    make_optimizer,
    state_shardings,
    to_mesh,
    train_step,
)
from uld_jax.train.state import param_shardings

EXAMPLES = [
    Example(str(n), "qa", f"Mill {n} grinds {what}.", f"What does mill {n} grind?", (what,), "")
    for n, what in enumerate(["wheat", "rye and oats", "corn", "7 sacks of barley"] * 2)
]
KINDS = {
    "student": (tiny_t5(family="t5", tied=True, scaled_head=True), tiny_gemma(kv_heads=2)),
    "teacher": (None, tiny_t5()),
    "both": (tiny_t5(gated=False, activation="relu"), tiny_t5()),
}
SLOW = {"teacher"}


def side_of(m, append_eos):
    start = getattr(m.config, "start_id", None)
    return Side(m.tokenizer, 256, append_eos=append_eos, start_id=start)


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS],
)
def setting(request):
    """Student and teacher, at least one of them an encoder-decoder, and the pairs they read."""
    student_config, teacher_config = KINDS[request.param]
    student = tiny_model(student_config, seed=1)
    teacher = tiny_model(teacher_config, kind="metaspace", seed=2)
    pairs, _ = encode_pairs(
        EXAMPLES,
        {e.id: e.answers[0] for e in EXAMPLES},
        student=side_of(student, append_eos=True),
        teachers=[side_of(teacher, append_eos=False)],
    )
    return student, teacher, pairs


def one_step(student, teacher, pairs, mesh, micro_batches=1):
    """The metrics of one step on all pairs, and the student's first moments after it."""
    graph, params = nnx.split(student.model)
    teacher_graph, teacher_params = nnx.split(teacher.model)
    tx = make_optimizer(OptimizerConfig(), 10, params)
    state = init_state(params, tx, seed=0)
    shardings = state_shardings(state, tx, mesh)
    loss = LossConfig(chunk_size=8)
    step = jax.jit(
        functools.partial(
            train_step, student=graph, teachers=[StepTeacher(teacher_graph)], tx=tx, loss=loss
        ),
        out_shardings=(shardings, None),
    )
    groups = batch_shards(mesh)
    loader = make_loader(
        pairs,
        batch_size=8,
        epochs=1,
        seed=0,
        groups=groups,
        micro_batches=micro_batches,
        length_parts=mesh.shape["sequence"],
    )
    batch = to_mesh(next(loader.iterator()), mesh)
    teacher_params = jax.device_put(teacher_params, param_shardings(teacher_params, mesh))
    with jax.set_mesh(mesh):
        state, metrics = step(jax.device_put(state, shardings), [teacher_params], batch)
    return metrics, optax.tree.get(state.opt_state, "mu")


@pytest.fixture(scope="module")
def alone(setting):
    return one_step(*setting, make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def answer_logits(m, encoded):
    """The logits that predict each answer token, of one text without padding."""
    inputs = {"encoder_tokens": jnp.array(encoded.encoder)[None]} if len(encoded.encoder) else {}
    logits = m.model(jnp.array(encoded.tokens)[None], **inputs)[0]
    return logits[jnp.array(encoded.answer) - 1]


def test_the_loss_is_that_of_each_text_alone(setting, alone):
    student, teacher, pairs = setting
    cross_entropies, distances = [], []
    for pair in pairs:
        student_AV = answer_logits(student, pair.student)
        teacher_AU = answer_logits(teacher, pair.teachers[0])
        targets = jnp.array(pair.student.tokens[pair.student.answer])
        ce_A = optax.softmax_cross_entropy_with_integer_labels(student_AV, targets)
        cross_entropies += ce_A.tolist()
        # skip_student_eos: the student's last answer token has no partner.
        n = min(len(student_AV) - 1, len(teacher_AU))
        distances += uld(student_AV[:n], teacher_AU[:n]).tolist()
    metrics, _ = alone
    assert metrics["ce_positions"] == len(cross_entropies)
    assert metrics["uld_positions"] == len(distances)
    np.testing.assert_allclose(metrics["cross_entropy"], np.mean(cross_entropies), rtol=1e-5)
    np.testing.assert_allclose(metrics["uld"], np.mean(distances), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "micro_batches"),
    [((2, 2, 2), 1), ((1, 1, 1), 2), pytest.param((1, 1, 1, 2), 1, marks=pytest.mark.slow)],
)
def test_every_mesh_and_accumulation_take_the_same_step(setting, alone, shape, micro_batches):
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = make_mesh(*shape[:3], sequence=(*shape, 1)[3], devices=devices)
    student, teacher, pairs = setting
    metrics, moments = one_step(student, teacher, pairs, mesh, micro_batches)
    for name in ("total", "cross_entropy", "uld", "grad_norm"):
        np.testing.assert_allclose(metrics[name], alone[0][name], rtol=1e-5, err_msg=name)
    for got, want in zip(*map(jax.tree.leaves, (moments, alone[1])), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-5)


def test_cross_entropy_is_transformers_loss_on_labels(setting, alone, tmp_path):
    """transformers makes the decoder's input from the labels itself."""
    student, _, pairs = setting
    if not isinstance(student.config, models.EncoderDecoderConfig):
        pytest.skip("the student is a decoder")
    models.save_pretrained(student, tmp_path / "student")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student").eval()
    sums, count = 0.0, 0
    for pair in pairs:
        labels = torch.tensor(pair.student.tokens[1:], dtype=torch.long)[None]
        prompt = torch.tensor(pair.student.encoder)[None]
        with torch.no_grad():
            sums += theirs(input_ids=prompt, labels=labels).loss.item() * labels.shape[1]
        count += labels.shape[1]
    np.testing.assert_allclose(alone[0]["cross_entropy"], sums / count, rtol=1e-5)
