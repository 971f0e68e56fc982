"""A whole model beside the same one in PyTorch: the train step, and greedy generation."""

import functools
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from uld_jax import models
from uld_jax.benchmark import pytorch, pytorch_models
from uld_jax.benchmark.losses import summary
from uld_jax.benchmark.timing import Program, interleave, median_ratio
from uld_jax.config import OptimizerConfig
from uld_jax.losses.cross_entropy import fused_cross_entropy
from uld_jax.models import Decoder, LoadedModel
from uld_jax.train.optimizer import make_optimizer
from uld_jax.train.state import TrainState, init_state
from uld_jax.train.step import apply_gradients

__all__ = ["measure_generate", "measure_step", "student_step", "text_prompts"]

OURS, THEIRS = "uld_jax", "pytorch"
# The schedule is constant on both sides: its shape costs nothing, and torch's would differ.
_OPTIMIZER = OptimizerConfig(schedule="constant")
_TEXT = """\
The river leaves the hills a few miles above the town, and for most of the year it is shallow enough
to be crossed on foot. In spring it rises within an hour. The miller, who has seen forty such
springs, keeps a rope tied between his door and the old oak, and does not explain it to visitors.
They learn what it is for when the water reaches the second step and the geese move into the barn.
"""


def student_step(
    state: TrainState,
    tokens_BT: jax.Array,
    *,
    graph: nnx.GraphDef[Decoder],
    tx: optax.GradientTransformation,
    chunk_size: int,
) -> tuple[TrainState, jax.Array]:
    """The student's side of `train.train_step`: next-token cross-entropy on every position.

    Args:
        state: the model and its optimizer; donate it.
        tokens_BT: i32 token ids; each but the first is a target.
        graph: the model's graph.
        tx: the optimizer.
        chunk_size: positions that meet the vocabulary at a time.

    Returns:
        The next state, and the mean loss before the step.
    """
    inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:].reshape(1, -1)
    weights = jnp.full(targets.shape, 1 / targets.size)

    def loss(params: nnx.State) -> jax.Array:
        model = nnx.merge(graph, params)
        hidden_BTD = model.hidden(inputs, segment_ids=jnp.ones_like(inputs))
        return fused_cross_entropy(
            hidden_BTD.reshape(*targets.shape, -1),
            model.head_VD,
            targets,
            weights=weights,
            softcap=model.config.logit_softcap or None,
            chunk_size=chunk_size,
            compute_dtype=hidden_BTD.dtype,
        )

    value, grads = jax.value_and_grad(loss)(state.params)
    return apply_gradients(state, grads, tx)[0], value


def measure_step(
    m: LoadedModel, *, batch: int, length: int, chunk_size: int, seed: int, repeats: int
) -> dict[str, Any]:
    """Time of a train step, forward, backward and AdamW, here and in PyTorch.

    Args:
        m: the model, in float32.
        batch: rows B.
        length: tokens of a row that are read; as many are predicted.
        chunk_size: of our loss, see `fused_cross_entropy`.
        seed: of the random tokens and of the order of the runs.
        repeats: rounds.

    Returns:
        The sizes; "candidates", by name what `losses.summary` gives for a step, with "loss", before
        the first step; "optimizer", the loop of torch's AdamW; "ratio", the median over rounds of
        our time over PyTorch's; both None where torch is not installed.
    """
    random = np.random.default_rng(seed)
    tokens_BT = random.integers(0, m.config.vocab_size, (batch, length + 1), dtype=np.int32)
    # Theirs first: ours gives its arrays up to the training state.
    torch, theirs, loop = pytorch.find_torch(), None, None
    if torch is not None:
        device = pytorch.device_of(torch, jax.default_backend())
        torch.set_num_threads(pytorch.all_threads(torch))
        model = pytorch_models.open_model(torch, device, m)
        optimizer, loop = pytorch_models.adamw(torch, model, _OPTIMIZER)
        clip = _OPTIMIZER.clip_norm
        theirs = pytorch_models.train_step(torch, model, optimizer, tokens_BT, clip)
    run, program = _our_step(m, tokens_BT, chunk_size)
    programs = {OURS: program} | ({THEIRS: Program(theirs, None, None)} if theirs else {})
    # Before anything is timed, because every run is a step further.
    losses = {OURS: float(run())} | ({THEIRS: theirs()} if theirs else {})
    seconds = interleave({name: p.run for name, p in programs.items()}, repeats, seed=seed)
    return _sizes(m) | {
        "batch": batch,
        "length": length,
        "chunk_size": chunk_size,
        "candidates": {
            name: summary(program, seconds[name], 1) | {"loss": losses[name]}
            for name, program in programs.items()
        },
        "optimizer": loop,
        "ratio": median_ratio(seconds[OURS], seconds.get(THEIRS, [])),
    }


def _our_step(
    m: LoadedModel, tokens_BT: np.ndarray, chunk_size: int
) -> tuple[Callable[[], jax.Array], Program]:
    graph, params = nnx.split(m.model)
    tx = make_optimizer(_OPTIMIZER, 1_000, params)
    step = functools.partial(student_step, graph=graph, tx=tx, chunk_size=chunk_size)
    state = jax.jit(functools.partial(init_state, tx=tx, seed=0))(params)
    start = time.perf_counter()
    executable = jax.jit(step, donate_argnums=0).lower(state, tokens_BT).compile()
    compile_s = time.perf_counter() - start
    memory = executable.memory_analysis()
    held = [state]

    def run() -> jax.Array:
        held[0], loss = executable(held[0], tokens_BT)
        jax.block_until_ready(held[0])
        return loss

    return run, Program(run, compile_s, memory.temp_size_in_bytes if memory else None)


def text_prompts(m: LoadedModel, batch: int, length: int) -> np.ndarray:
    """Rows of English text, each from another place in it, all of the same number of tokens.

    Args:
        m: the model whose tokenizer cuts the text.
        batch: rows.
        length: tokens of a row.

    Returns:
        i32[batch, length].

    Example:
        >>> from uld_jax.testing import tiny_model
        >>> text_prompts(tiny_model(), 2, 5).shape
        (2, 5)
    """
    ids = m.tokenizer.encode(_TEXT, add_special_tokens=False)
    starts = np.arange(batch)[:, None] * len(ids) // batch
    return np.asarray(ids, np.int32)[(starts + np.arange(length)) % len(ids)]


def measure_generate(
    m: LoadedModel, *, batch: int, prompt_length: int, new_tokens: int, seed: int, repeats: int
) -> dict[str, Any]:
    """Time of greedy generation, of exactly so many tokens, here and in PyTorch.

    Args:
        m: the model, in float32.
        batch: prompts, continued together.
        prompt_length: tokens of each.
        new_tokens: tokens to write after each, an end of sequence or not.
        seed: of the order of the runs.
        repeats: rounds.

    Returns:
        The sizes; "candidates", by name what `losses.summary` gives for the whole batch, with
        "tokens_per_second"; "speedup", the median over rounds of PyTorch's time over ours;
        "agreement", the share of the tokens that are the same up to a row's first difference; both
        None where torch is not installed.
    """
    prompts_BP = text_prompts(m, batch, prompt_length)

    def ours() -> np.ndarray:
        answers = models.generate(
            m.model, list(prompts_BP), max_new_tokens=new_tokens, eos_id=-1, batch_size=batch
        )
        return np.asarray(answers)

    runs: dict[str, Callable[[], np.ndarray]] = {OURS: ours}
    torch = pytorch.find_torch()
    if torch is not None:
        runs[THEIRS] = _their_generation(torch, m, prompts_BP, new_tokens)
    start = time.perf_counter()
    written = {OURS: ours()}
    first_s = time.perf_counter() - start
    if torch is not None:
        written[THEIRS] = runs[THEIRS]()
    seconds = interleave(runs, repeats, seed=seed)
    # The first call compiles, and then runs.
    compile_s = {OURS: max(0.0, first_s - statistics.median(seconds[OURS]))}
    candidates = {
        name: summary(Program(run, compile_s.get(name), None), seconds[name], 1)
        for name, run in runs.items()
    }
    for result in candidates.values():
        result["tokens_per_second"] = 1e3 * batch * new_tokens / result["median_ms"]
    return _sizes(m) | {
        "batch": batch,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "candidates": candidates,
        "speedup": median_ratio(seconds.get(THEIRS, []), seconds[OURS]),
        "agreement": _agreement(written[OURS], written[THEIRS]) if torch is not None else None,
    }


def _their_generation(
    torch: ModuleType, m: LoadedModel, prompts_BP: np.ndarray, new_tokens: int
) -> Callable[[], np.ndarray]:
    torch.set_num_threads(pytorch.all_threads(torch))
    device = pytorch.device_of(torch, jax.default_backend())
    model = pytorch_models.open_model(torch, device, m)
    return pytorch_models.generator(torch, model, prompts_BP, new_tokens)


def _agreement(left_BN: np.ndarray, right_BN: np.ndarray) -> float:
    """The share of the tokens before each row's first difference: what follows has other words."""
    return float(np.cumprod(left_BN == right_BN, axis=1).mean())


def _sizes(m: LoadedModel) -> dict[str, Any]:
    count = sum(x.size for x in jax.tree.leaves(nnx.state(m.model, nnx.Param)))
    return {"family": m.config.family, "parameters": count}
