"""Answers that the student samples during training, in place of the teacher's."""

import dataclasses

import jax
import numpy as np
import pytest

from uld_jax import models
from uld_jax.data import (
    Example,
    Side,
    encode_pairs,
    encode_prompts,
    first_line,
    make_loader,
)
from uld_jax.models import Sampling
from uld_jax.testing import tiny_gemma, tiny_model, tiny_t5
from uld_jax.train import OnPolicy

EXAMPLES = [
    Example(str(n), "qa", f"Mill {n} grinds {what}.", f"What does mill {n} grind?", (what,), "")
    for n, what in enumerate(["wheat", "rye and oats", "corn", "7 sacks of barley"] * 3)
]
TOKENS, BATCH = 6, 4


def side_of(m, *, append_eos):
    start = getattr(m.config, "start_id", None)
    return Side(m.tokenizer, 256, append_eos=append_eos, start_id=start)


@pytest.fixture(scope="module", params=["decoder", "encoder-decoder"])
def setting(request):
    """A student, a loader with room for its answers, and what samples them."""
    student = tiny_model(tiny_t5() if request.param == "encoder-decoder" else None, seed=1)
    teacher = tiny_model(tiny_gemma(kv_heads=2), kind="metaspace", seed=2)
    sides = side_of(student, append_eos=True), side_of(teacher, append_eos=False)
    on_policy = OnPolicy(
        sides[0],
        [sides[1]],
        examples={example.id: example for example in EXAMPLES},
        pool=EXAMPLES,
        seed=0,
        fraction=0.625,
        sampling=Sampling(temperature=1.0),
        max_new_tokens=TOKENS,
        stop_ids=models.line_stop_ids(student),
    )
    answers = {example.id: example.answers[0] for example in EXAMPLES}
    pairs, _ = encode_pairs(EXAMPLES, answers, student=sides[0], teachers=[sides[1]])
    # Random bytes are more tokens when they are read again.
    loader = make_loader(pairs, batch_size=BATCH, epochs=2, seed=0, answer_room=4 * TOKENS)
    return student, loader, on_policy


def test_the_students_answers_stand_in_the_batch(setting):
    student, loader, on_policy = setting
    original = loader.collate(0, loader.rows(0))
    arrays, replaced = on_policy.batch(student.model, loader, 0, jax.random.key(3))
    assert jax.tree.map(np.shape, arrays) == jax.tree.map(np.shape, original)
    changed = (arrays["student_tokens"] != original["student_tokens"]).any(-1)[0]
    assert replaced == changed.sum() == 2
    chosen = on_policy._choose(loader.rows(0), 0)
    assert sorted(chosen) == np.flatnonzero(changed).tolist()
    ids = [loader.rows(0)[row].id for row in chosen]
    examples = [on_policy.examples[id_] for id_ in ids]
    # What the student itself writes with that key.
    found = models.continue_prompts(
        student.model,
        encode_prompts(examples, on_policy.student),
        max_new_tokens=TOKENS,
        eos_id=on_policy.stop_ids,
        sampling=on_policy.sampling,
        tokenizer=student.tokenizer,
        key=jax.random.fold_in(jax.random.key(3), 0),
    )
    texts = {id_: first_line(each.text) for id_, each in zip(ids, found, strict=True)}
    pairs, _ = encode_pairs(examples, texts, student=on_policy.student, teachers=on_policy.teachers)
    for row, pair in zip(chosen, pairs, strict=True):
        teacher = arrays["teachers"][0]
        for tokens, segment_ids, read in (
            (arrays["student_tokens"], arrays["student_segment_ids"], pair.student),
            (teacher["tokens"], teacher["segment_ids"], pair.teachers[0]),
        ):
            kept = tokens[0, row][segment_ids[0, row] == 1]
            np.testing.assert_array_equal(kept, read.tokens)


def test_they_have_uld_and_no_cross_entropy(setting):
    student, loader, on_policy = setting
    everything = dataclasses.replace(on_policy, fraction=1.0)
    arrays, replaced = everything.batch(student.model, loader, 1, jax.random.key(3))
    ce_rows = arrays["student_index"][0, 0] // arrays["student_tokens"].shape[-1]
    with_ce = np.unique(ce_rows[arrays["ce_weight"][0, 0] > 0])
    with_uld = np.unique(ce_rows[arrays["teachers"][0]["uld_weight"][0, 0] > 0])
    assert replaced >= 3
    assert len(with_ce) == BATCH - replaced
    assert len(with_uld) == BATCH


def test_a_batch_depends_on_the_key_and_the_parameters_alone(setting):
    student, loader, on_policy = setting
    first, _ = on_policy.batch(student.model, loader, 2, jax.random.key(3))
    again, _ = on_policy.batch(student.model, loader, 2, jax.random.key(3))
    other, _ = on_policy.batch(student.model, loader, 2, jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["student_tokens"] != other["student_tokens"]).any()


def test_the_fraction_holds_over_all_batches(setting):
    _, loader, on_policy = setting
    counts = [len(on_policy._choose(loader.rows(n), n)) for n in range(len(loader))]
    assert sum(counts) == int(len(loader) * on_policy.fraction * BATCH)
    assert set(counts) == {2, 3}


def test_an_answer_without_room_leaves_the_row_as_it_was(setting):
    student, loader, on_policy = setting
    pairs = [pair for n in range(3) for pair in loader.rows(n)]
    narrow = make_loader(pairs, batch_size=BATCH, epochs=1, seed=0)
    arrays, replaced = on_policy.batch(student.model, narrow, 0, jax.random.key(3))
    assert replaced == 0
    jax.tree.map(np.testing.assert_array_equal, narrow.collate(0, narrow.rows(0)), arrays)
