"""Hidden states and attention in the train step, against what transformers makes of each text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx

from uld_jax import models
from uld_jax.config import LossConfig, OptimizerConfig, RunConfig, TeacherConfig
from uld_jax.data import Example, Side, encode_pairs, make_loader
from uld_jax.losses import layer_map
from uld_jax.sharding import batch_shards, make_mesh
from uld_jax.testing import tiny_config, tiny_gemma, tiny_model, tiny_t5
from uld_jax.train import (
    Checkpoints,
    adapt,
    make_program,
    param_shardings,
    restore_params,
    to_mesh,
)

EXAMPLES = [
    Example(str(n), "qa", f"Mill {n} grinds {what}.", f"What does mill {n} grind?", (what,), "")
    for n, what in enumerate(["wheat", "rye and oats", "corn", "7 sacks of barley"] * 2)
]
GEMMA = tiny_gemma(
    kv_heads=2, heads=6, width=48, embed_scale=48**0.5, layers=3, local_layers=(True, False, True)
)
BLOOM = tiny_config(
    family="bloom",
    kv_heads=4,
    mlp_width=128,
    norm="layer",
    norm_eps=1e-5,
    embed_norm=True,
    activation="gelu_tanh",
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    positions="alibi",
)
# What is compared: of a student and its teachers, all layers or the last ones.
KINDS = {
    "decoders": (
        tiny_config(),
        [GEMMA],
        LossConfig(
            chunk_size=8,
            hidden_weight=0.5,
            attention_weight=20.0,
            attention_kind="kl",
            feature_layers="all",
        ),
    ),
    "encoder-decoders": (
        tiny_t5(),
        [tiny_t5(decoder_layers=2, gated=False, activation="relu", width=48), BLOOM],
        LossConfig(chunk_size=8, hidden_weight=2.0, hidden_kind="cosine", attention_weight=100.0),
    ),
}
ONE = (1, 1, 1, 1)
SLOW = [((1, 2, 2, 2), 1), (ONE, 2), ((2, 2, 2, 1), 1)]


def lively(config, kind, seed):
    """With weights so large that attention is far from even."""
    m = tiny_model(config, kind=kind, seed=seed)
    for _, param in nnx.to_flat_state(nnx.state(m.model)):
        if "norm" not in param.get_metadata("axes"):
            param.set_value(param[...] * 6)
    return m


def side_of(m, append_eos):
    start = getattr(m.config, "start_id", None)
    return Side(m.tokenizer, 256, append_eos=append_eos, start_id=start)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A student, its teachers, the pairs that they read, and the run."""

    student: models.LoadedModel
    teachers: list[models.LoadedModel]
    pairs: list
    config: RunConfig


def setting_of(kind):
    student_config, teacher_configs, loss = KINDS[kind]
    student = lively(student_config, "byte_level", 1)
    teachers = [lively(c, "metaspace", 2 + i) for i, c in enumerate(teacher_configs)]
    pairs, _ = encode_pairs(
        EXAMPLES,
        {e.id: e.answers[0] for e in EXAMPLES},
        student=side_of(student, append_eos=True),
        teachers=[side_of(teacher, append_eos=False) for teacher in teachers],
    )
    shares = [TeacherConfig(share=3.0), TeacherConfig(share=1.0)][: len(teachers)]
    config = RunConfig(
        teacher=shares[0],
        extra_teachers=tuple(shares[1:]),
        loss=loss,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    )
    return Setting(student, teachers, pairs, config)


@pytest.fixture(
    scope="module",
    params=["decoders", pytest.param("encoder-decoders", marks=pytest.mark.slow)],
)
def setting(request):
    return setting_of(request.param)


class Job:
    """The setting's program, first state and one batch on a mesh."""

    def __init__(self, setting, shape=ONE, micro_batches=1):
        data, fsdp, tensor, sequence = shape
        devices = jax.devices()[: int(np.prod(shape))]
        self.mesh = make_mesh(data, fsdp, tensor, sequence=sequence, devices=devices)
        graph, params = nnx.split(setting.student.model)
        teachers = [
            nnx.merge(teacher_graph, jax.device_put(own, param_shardings(own, self.mesh)))
            for teacher_graph, own in (nnx.split(m.model) for m in setting.teachers)
        ]
        # A model of its own, which a program may change.
        student = nnx.merge(graph, jax.tree.map(jnp.copy, params))
        adapt(student, setting.config)
        run = {"steps": 10, "mesh": self.mesh}
        self.program, params = make_program(student, teachers, setting.config, **run)
        self.fresh = jax.jit(self.program.fresh, out_shardings=self.program.shardings)
        self.params = params
        loader = make_loader(
            setting.pairs,
            batch_size=8,
            epochs=1,
            seed=0,
            groups=batch_shards(self.mesh),
            micro_batches=micro_batches,
            length_parts=sequence,
            signals=[None for _ in teachers],
        )
        self.batch = to_mesh(next(loader.iterator()), self.mesh)

    def run(self, steps=1):
        """The metrics of the steps, and the state after them."""
        state, found = self.fresh(self.params), []
        for _ in range(steps):
            with jax.set_mesh(self.mesh):
                given = self.program.teacher_params, self.batch, self.program.frozen
                state, metrics = self.program.step(state, *given)
            found.append(metrics)
        return found, state


@pytest.fixture(scope="module")
def job(setting):
    return Job(setting)


@pytest.fixture(scope="module")
def alone(job):
    (metrics,), state = job.run()
    return metrics, state


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A model in transformers, in float64: every layer's output and attention of one text."""

    model: transformers.PreTrainedModel

    @classmethod
    def of(cls, m, directory):
        models.save_pretrained(m, directory)
        encoder = isinstance(m.config, models.EncoderDecoderConfig)
        auto = transformers.AutoModelForSeq2SeqLM if encoder else transformers.AutoModelForCausalLM
        return cls(auto.from_pretrained(directory, attn_implementation="eager").double().eval())

    def read(self, encoded):
        m = self.model
        if hasattr(m, "decoder"):
            layers = m.decoder.block
        else:
            layers = m.transformer.h if hasattr(m, "transformer") else m.model.layers
        outputs = []

        def keep(layer, given, output):
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        tokens = torch.tensor(encoded.tokens, dtype=torch.long)[None]
        with torch.no_grad():
            if len(encoded.encoder):
                prompt = torch.tensor(encoded.encoder)[None]
                given = {"input_ids": prompt, "decoder_input_ids": tokens}
                attention = m(**given, output_attentions=True).decoder_attentions
            else:
                attention = m(tokens, output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        return [x[0].numpy() for x in outputs], [x[0].numpy() for x in attention]


def among(attention_HTT, at):
    """What the aligned tokens give to each other, as a share of that."""
    found = np.tril(attention_HTT[:, at][:, :, at])
    return found / found.sum(-1, keepdims=True)


def hidden_distance(student, teacher, matrix, kind):
    student = student @ matrix
    if kind == "mse":
        return ((student - teacher) ** 2).mean(-1)
    norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - (student * teacher).sum(-1) / norms


def attention_distance(student, teacher, kind):
    if len(student) != len(teacher):
        student, teacher = student.mean(0)[None], teacher.mean(0)[None]
    rows = []
    for i in range(student.shape[1]):
        s, t = student[:, i, : i + 1], teacher[:, i, : i + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            # A key outside of the teacher's window has 0.
            kl = np.where(t > 0, t * np.log(t / s), 0).sum(-1)
        rows.append((kl if kind == "kl" else ((s - t) ** 2).mean(-1)).mean())
    return np.array(rows)


def distances(setting, matrices, tmp_path):
    """Of each teacher: the means over positions of both distances, by plain float64."""
    loss = setting.config.loss
    student = Theirs.of(setting.student, tmp_path / "student")
    found = []
    for number, m in enumerate(setting.teachers):
        teacher = Theirs.of(m, tmp_path / f"teacher_{number}")
        hidden, attention = [], []
        for pair in setting.pairs:
            own, other = pair.student, pair.teachers[number]
            # skip_student_eos: the student's last answer token has no partner.
            n = min(len(own.answer) - 1, len(other.answer))
            at = own.answer[:n] - 1, other.answer[:n] - 1
            (own_hidden, own_maps), (other_hidden, other_maps) = (
                student.read(own),
                teacher.read(other),
            )
            layers = [*enumerate(layer_map(len(own_hidden), len(other_hidden)))]
            layers = layers if loss.feature_layers == "all" else layers[-1:]
            for p, (i, j) in enumerate(layers):
                rows = own_hidden[i][at[0]], other_hidden[j][at[1]]
                hidden += [*(hidden_distance(*rows, matrices[number][p], loss.hidden_kind))]
                maps = among(own_maps[i], at[0]), among(other_maps[j], at[1])
                attention += [*attention_distance(*maps, loss.attention_kind)]
        found.append((np.mean(hidden), np.mean(attention)))
    return found


def matrices_of(state):
    return [
        np.asarray(state.params["projections"][name][...], np.float64)
        for name in sorted(state.params["projections"])
    ]


def test_the_losses_are_those_of_each_text_alone(setting, job, alone, tmp_path):
    matrices = matrices_of(job.fresh(job.params))
    found = np.array(distances(setting, matrices, tmp_path))
    hidden, attention = np.array(setting.config.teacher_shares) @ found
    metrics, loss = alone[0], setting.config.loss
    assert (found > 1e-3).all(), found
    np.testing.assert_allclose(metrics["hidden"], hidden, rtol=1e-4)
    np.testing.assert_allclose(metrics["attention"], attention, rtol=1e-4)
    total = loss.ce_weight * metrics["cross_entropy"] + loss.uld_weight * metrics["uld"]
    total += loss.hidden_weight * hidden + loss.attention_weight * attention
    np.testing.assert_allclose(metrics["total"], total, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "micro_batches"),
    [((1, 2, 2, 2), 2), *(pytest.param(*slow, marks=pytest.mark.slow) for slow in SLOW)],
)
def test_every_mesh_and_accumulation_take_the_same_step(setting, alone, shape, micro_batches):
    (metrics,), state = Job(setting, shape, micro_batches).run()
    for name in ("total", "cross_entropy", "uld", "hidden", "attention", "grad_norm"):
        np.testing.assert_allclose(metrics[name], alone[0][name], rtol=2e-5, err_msg=name)
    moments = (optax.tree.get(s.opt_state, "mu") for s in (state, alone[1]))
    for got, want in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-4)


def test_both_distances_fall_and_the_projections_learn(job):
    metrics, state = job.run(8)
    for name in ("hidden", "attention", "total"):
        values = [float(each[name]) for each in metrics]
        assert values[-1] < 0.9 * values[0], (name, values)
    for before, after in zip(matrices_of(job.fresh(job.params)), matrices_of(state), strict=True):
        assert (before != after).mean() > 0.99


def test_a_checkpoint_keeps_projections_apart_from_the_student(job, alone, setting, tmp_path):
    _, state = alone
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, {"position": 1})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        like = jax.eval_shape(job.program.fresh, job.params)
        restored, position = checkpoints.restore(like, job.program.shardings)
    assert position == {"position": 1}
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    # What an export reads needs to know of no teacher.
    student = restore_params(tmp_path, nnx.state(setting.student.model), job.mesh)
    of_state = nnx.state(job.program.student(state.params))
    jax.tree.map(np.testing.assert_array_equal, student, of_state)
    assert "projections" not in student
    count = sum(leaf.size for leaf in jax.tree.leaves(student))
    assert count == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(setting.student.model)))


def test_projections_are_trained_beside_adapters(setting):
    own = dataclasses.replace(setting.config.student, lora_rank=4, lora_targets="mlp.up")
    adapted = dataclasses.replace(setting.config, student=own)
    job = Job(dataclasses.replace(setting, config=adapted))
    state = jax.eval_shape(job.program.fresh, job.params)
    trained = {path[-1] for path, _ in nnx.to_flat_state(state.params)}
    assert trained == {"up_lora_a", "up_lora_b", *map(str, range(len(setting.teachers)))}
    moments = optax.tree.get(state.opt_state, "mu")
    assert moments["projections"]["0"].shape == state.params["projections"]["0"].shape
    # Gradients of all of them, or the optimizer would refuse them.
    given = job.program.teacher_params, job.batch, job.program.frozen
    _, metrics = jax.eval_shape(job.program.step, state, *given)
    assert {"hidden", "attention"} <= metrics.keys()
