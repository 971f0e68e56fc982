import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from uld_jax.data.loader import assign_buckets, make_loader
from uld_jax.data.tokenize import Encoded, Pair
from uld_jax.errors import UserError


def make_pairs(count, seed=0):
    """Pairs whose first student token names them."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        sides = []
        for base, longest in ((1000, 30), (5000, 60)):
            prompt, answer = rng.integers(2, longest), rng.integers(1, 9)
            tokens = np.full(prompt + answer, base + number, np.int32)
            sides.append(Encoded(tokens, np.arange(prompt, prompt + answer, dtype=np.int32)))
        pairs.append(Pair(str(number), sides[0], (sides[1],)))
    return pairs


PAIRS = make_pairs(45)


def loader(pairs=PAIRS, **changes):
    options = {"batch_size": 8, "micro_batches": 2, "groups": 2, "epochs": 2, "seed": 1}
    return make_loader(pairs, **(options | changes))


def batches(made):
    return list(made.iterator())


def teacher_of(batch):
    (teacher,) = batch["teachers"]
    return teacher


def numbers(batch):
    first = batch["student_tokens"][..., 0]
    return (first[first > 0] - 1000).tolist()


def assert_same(left, right):
    assert len(left) == len(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("buckets", [1, 3])
def test_every_pair_once_an_epoch_in_a_new_order(buckets):
    made = loader(buckets=buckets)
    seen = [number for batch in batches(made) for number in numbers(batch)]
    epochs = [seen[:45], seen[45:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(45))] * 2
    assert epochs[0] != epochs[1]
    assert len(made) == len(batches(made)) == len(list(made))


def test_the_seed_decides_the_order():
    assert_same(batches(loader(buckets=2)), batches(loader(buckets=2)))
    other = [numbers(batch) for batch in batches(loader(buckets=2, seed=2))]
    assert other != [numbers(batch) for batch in batches(loader(buckets=2))]


def test_the_first_epochs_do_not_depend_on_their_number():
    short = [numbers(batch) for batch in batches(loader(epochs=1))]
    assert [numbers(batch) for batch in batches(loader(epochs=3))][: len(short)] == short


@pytest.mark.parametrize("buckets", [1, 2, 4])
def test_one_shape_a_bucket_and_no_larger_than_needed(buckets):
    made = loader(buckets=buckets, length_multiple=8, position_multiple=4)
    assert len(made.shapes) == buckets
    needed = {}
    for batch in batches(made):
        lengths = batch["student_tokens"].shape[-1], teacher_of(batch)["tokens"].shape[-1]
        n = batch["targets"].shape[-1]
        shape = next(x for x in made.shapes if x.lengths == lengths)
        assert shape.positions == n
        most = int(batch["ce_weight"].sum(axis=-1).max())
        needed[shape] = max(needed.get(shape, 0), most)
    for shape, most in needed.items():
        assert shape.positions == -(-most // 4) * 4
        assert [length % 8 for length in shape.lengths] == [0, 0]
    longest = max(len(pair.student.tokens) for pair in PAIRS)
    assert max(shape.student_length for shape in made.shapes) == -(-longest // 8) * 8


def test_lengths_and_positions_divide_by_the_parts_of_a_row():
    (shape,) = loader(position_multiple=2, length_parts=3).shapes
    assert shape.student_length % 48 == shape.teacher_lengths[0] % 48 == 0
    assert shape.positions % 6 == 0


def test_buckets_save_padding():
    def padding(buckets):
        made = batches(loader(buckets=buckets, epochs=1, length_multiple=1))
        return sum((teacher_of(batch)["segment_ids"] == 0).sum() for batch in made)

    assert padding(3) < padding(1)


def test_assign_buckets():
    costs = np.random.default_rng(0).integers(1, 100, 400)
    bucket = assign_buckets(costs, 4)
    assert sorted(set(bucket)) == [0, 1, 2, 3]
    totals = np.bincount(bucket, weights=costs)
    assert totals.max() - totals.min() <= 2 * costs.max()
    for b in range(3):
        assert costs[bucket == b].max() <= costs[bucket == b + 1].min()
    np.testing.assert_array_equal(assign_buckets(np.array([3, 3]), 9), [0, 1])


def test_leftovers_are_merged_where_that_saves_batches():
    short, long = make_pairs(3), make_pairs(3, seed=7)
    tokens, answer = np.full(90, 4, np.int32), np.array([80, 81])
    long = [Pair(pair.id, Encoded(tokens, answer), (Encoded(tokens, answer),)) for pair in long]
    made = make_loader(short + long, batch_size=8, epochs=1, seed=0, buckets=2)
    assert (len(made.shapes), len(made)) == (2, 1)
    (batch,) = batches(made)
    assert (batch["student_segment_ids"].any(axis=-1)).sum() == 6
    assert batch["student_tokens"].shape == (1, 8, 96)
    # The longest student is in the bucket of the shorter sums: the leftovers do not fit together.
    wide = Encoded(np.full(100, 4, np.int32), answer)
    narrow = Encoded(np.full(3, 4, np.int32), np.array([2]))
    made = make_loader(
        [Pair("wide", wide, (narrow,)), *long], batch_size=8, epochs=1, seed=0, buckets=2
    )
    assert (len(made.shapes), len(made)) == (2, 2)


def test_padding_at_the_epochs_end_weighs_nothing():
    last = batches(loader(epochs=1))[-1]
    real = last["student_segment_ids"].any(axis=-1)
    assert real.sum() == 45 % 8
    np.testing.assert_array_equal(real.reshape(-1), [True] * 5 + [False] * 3)
    assert last["ce_weight"].sum() == sum(len(PAIRS[n].student.answer) for n in numbers(last))
    assert not last["ce_weight"][1, 1].any()
    assert not teacher_of(last)["uld_weight"][1, 1].any()


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_make_their_own_groups(process_count):
    whole = loader(micro_batches=2, groups=4, batch_size=16, buckets=2)
    shards = [
        loader(
            micro_batches=2,
            groups=4,
            batch_size=16,
            buckets=2,
            process_index=index,
            process_count=process_count,
        )
        for index in range(process_count)
    ]
    assert all(shard.shapes == whole.shapes for shard in shards)
    joined = [
        jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *parts)
        for parts in zip(*map(batches, shards), strict=True)
    ]
    assert_same(joined, batches(whole))


@pytest.mark.parametrize("taken", [0, 1, 4, 9])
def test_a_saved_state_continues_identically(taken):
    made = loader(buckets=2)
    iterator = made.iterator()
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(iterator)
    assert len(rest) == len(made) - taken
    fresh = loader(buckets=2).iterator()
    fresh.set_state(state)
    assert_same(list(fresh), rest)
    iterator.set_state(state)
    assert_same(list(iterator), rest)


def test_options_reach_the_batch():
    made = loader(convention="official", skip_student_eos=False, student_pad_id=3, teacher_pad_id=4)
    batch = batches(made)[0]
    assert (batch["student_tokens"][batch["student_segment_ids"] == 0] == 3).all()
    assert (teacher_of(batch)["tokens"][teacher_of(batch)["segment_ids"] == 0] == 4).all()
    assert teacher_of(batch)["uld_weight"].sum() == pytest.approx(8)
    lengths = [
        min(len(PAIRS[n].student.answer), len(PAIRS[n].teachers[0].answer))
        for n in (batch["student_tokens"][..., 0].ravel() - 1000)
    ]
    assert (teacher_of(batch)["uld_weight"] > 0).sum() == sum(lengths)


def test_leaving_early_is_quiet():
    """A process that stops in the midst of an epoch ends without a word."""
    code = (
        "import numpy as np\n"
        "from uld_jax.data import Encoded, Pair, make_loader\n"
        "e = Encoded(np.arange(4, dtype=np.int32), np.array([2, 3]))\n"
        "pairs = [Pair(str(i), e, (e,)) for i in range(64)]\n"
        "it = make_loader(pairs, batch_size=2, epochs=2, seed=0).iterator()\n"
        "next(it)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_data_layer_is_cheap():
    code = (
        "import sys, uld_jax.data\n"
        "heavy = {'jax', 'grain', 'transformers', 'tensorflow_datasets', 'torch', 'tensorflow'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 6},
            "batch_size 6 is not divisible by micro_batches 2 x data-parallel groups 2 = 4: "
            "the next that is: 8",
        ),
        ({"process_count": 4}, "groups 2 are not divisible by process_count 4"),
        ({"pairs": []}, "no pairs to make batches of"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"buckets": 0}, "buckets: expected at least 1, got 0"),
        ({"micro_batches": 0}, "micro_batches: expected at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        loader(**changes)


def test_prompts_of_an_encoder_have_their_own_padded_length():
    def apart(side):
        start = side.answer[0]
        answer = np.concatenate([[0], side.tokens[start:]]).astype(np.int32)
        return Encoded(answer, np.arange(1, len(answer), dtype=np.int32), side.tokens[:start])

    pairs = [Pair(pair.id, apart(pair.student), pair.teachers) for pair in PAIRS]
    made = loader(pairs, buckets=2, length_multiple=4)
    for batch in batches(made):
        shape = next(
            s
            for s in made.shapes
            if teacher_of(batch)["tokens"].shape[-1] == s.teacher_lengths[0]
            and batch["student_encoder_tokens"].shape[-1] == s.student_encoder_length
        )
        assert batch["student_tokens"].shape[-1] == shape.student_length
        assert shape.teacher_encoder_lengths == (0,)
        assert "encoder_tokens" not in teacher_of(batch)
        assert (
            batch["student_encoder_segment_ids"].any(-1) == (batch["student_segment_ids"].any(-1))
        ).all()
    longest = max(len(pair.student.encoder) for pair in pairs)
    assert max(s.student_encoder_length for s in made.shapes) == -(-longest // 4) * 4
