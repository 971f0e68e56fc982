"""How fast and how exact the sort-free distance is, by the width of its buckets."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from uld_jax.benchmark.losses import PASSES, runs_of, summary
from uld_jax.benchmark.timing import interleave
from uld_jax.losses import uld
from uld_jax.losses.level_set import level_set_uld

__all__ = ["BITS", "check_bits", "exact_distance", "measure"]

BITS = tuple(range(3, 12))
_SORT = "sort"


def check_bits(bucket_bits: int) -> None:
    """Refuse a width of the buckets that the method does not have, without computing anything.

    Args:
        bucket_bits: log₂ of the buckets in an octave.

    Raises:
        ValueError: naming the widths that it has.

    Example:
        >>> check_bits(7)
    """
    logits = jax.ShapeDtypeStruct((1, 1), np.float32)
    jax.eval_shape(partial(_value, bucket_bits=bucket_bits), logits, logits)


def exact_distance(student_NV: np.ndarray, teacher_NU: np.ndarray) -> np.ndarray:
    """The distance in float64 with numpy, straight from its definition.

    Args:
        student_NV: logits.
        teacher_NU: logits.

    Returns:
        f64[N].

    Example:
        >>> float(exact_distance(np.zeros((1, 4)), np.array([[0.0]]))[0])
        1.5
    """

    def sorted_softmax(logits: np.ndarray, width: int) -> np.ndarray:
        weights = np.exp(logits.astype(np.float64) - logits.max())
        padded = np.zeros(width)
        padded[: len(weights)] = np.sort(weights / weights.sum())[::-1]
        return padded

    width = max(student_NV.shape[-1], teacher_NU.shape[-1])
    return np.array(
        [
            np.abs(sorted_softmax(s, width) - sorted_softmax(t, width)).sum()
            for s, t in zip(student_NV, teacher_NU, strict=True)
        ]
    )


def measure(
    student_NV: jax.Array, teacher_NU: jax.Array, *, bits: Sequence[int], seed: int, repeats: int
) -> dict[str, Any]:
    """The curve at one size, beside the exact method by sorting.

    Args:
        student_NV: f32 logits.
        teacher_NU: f32 logits.
        bits: log₂ of the buckets in an octave, one point of the curve each.
        seed: of the order of the runs.
        repeats: rounds.

    Returns:
        The size; "curve", for each of the bits the passes as `losses.summary` gives them and,
        where memory suffices, the errors against float64: "mean_error", "max_error", "mean_bound",
        and "beyond_bound", the number of positions whose error is larger than its certified bound;
        "sort", the passes of the exact method.
    """
    exact = exact_distance(np.asarray(student_NV), np.asarray(teacher_NU))
    distances = {str(b): partial(_value, bucket_bits=b) for b in bits} | {
        _SORT: partial(uld, method="sort")
    }
    programs = {
        (name, which): program
        for name, distance in distances.items()
        for which, program in runs_of(distance, student_NV, teacher_NU)
    }
    possible = {key: program.run for key, program in programs.items() if program is not None}
    seconds = interleave(possible, repeats, seed=seed)

    def passes(name: str) -> dict[str, Any]:
        return {
            which: summary(programs[name, which], seconds.get((name, which), []), len(exact))
            for which in PASSES
        }

    def errors(bucket_bits: int) -> dict[str, Any]:
        if programs[str(bucket_bits), "forward"] is None:
            return {}
        value, bound = map(
            np.asarray, level_set_uld(student_NV, teacher_NU, bucket_bits=bucket_bits)
        )
        error = np.abs(value.astype(np.float64) - exact)
        return {
            "mean_error": float(error.mean()),
            "max_error": float(error.max()),
            "mean_bound": float(bound.mean(dtype=np.float64)),
            "beyond_bound": int((error > bound).sum()),
        }

    return {
        "student_vocab": student_NV.shape[-1],
        "teacher_vocab": teacher_NU.shape[-1],
        "positions": len(exact),
        "curve": [{"bucket_bits": b} | passes(str(b)) | errors(b) for b in bits],
        "sort": passes(_SORT),
    }


def _value(student_NV: jax.Array, teacher_NU: jax.Array, *, bucket_bits: int) -> jax.Array:
    return level_set_uld(student_NV, teacher_NU, bucket_bits=bucket_bits)[0]
