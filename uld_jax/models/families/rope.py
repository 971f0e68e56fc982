"""Rotary settings between Hugging Face configs and ours, alike for every family that rotates."""

import math
from collections.abc import Mapping
from typing import Any

from uld_jax.errors import UserError
from uld_jax.models.config import DecoderConfig, RopeScaling
from uld_jax.models.families.fields import refuse

# What each scaling may say; anything else is refused by name.
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
_FIELDS = {
    "default": set(),
    "linear": set(),
    "dynamic": {"original_max_position_embeddings"},
    "llama3": {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    },
    "longrope": {
        "attention_factor",
        "long_factor",
        "original_max_position_embeddings",
        "short_factor",
    },
}


def rope_from_hf(
    family: str, rope: Mapping[str, Any], max_positions: int
) -> tuple[float, float, RopeScaling | None]:
    """The rotary fields of a Hugging Face config.

    Args:
        family: Named in an error.
        rope: Its `rope_parameters`.
        max_positions: Its `max_position_embeddings`.

    Returns:
        The base, the rotated part of a head, and the scaling or None.

    Raises:
        UserError: A scaling, or a field of it, that we do not have.

    Example:
        >>> rope_from_hf("llama", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 64)
        (10000.0, 1.0, RopeScaling(kind='linear', factor=2.0, ...))
    """
    kind = rope.get("rope_type", "default")
    where = f"model_type '{family}': rope_parameters"
    if kind not in _FIELDS:
        raise UserError(
            f"{where}: rope_type {kind!r} is not supported; it may be {sorted(_FIELDS)}"
        )
    unknown = {
        name: value
        for name, value in rope.items()
        if value is not None and name not in _COMMON | _FIELDS[kind]
    }
    if unknown:
        raise UserError(f"{where}: unsupported: {unknown}")
    scaling = None if kind == "default" else _scaling(kind, rope, max_positions)
    return float(rope["rope_theta"]), rope.get("partial_rotary_factor", 1.0), scaling


def _scaling(kind: str, rope: Mapping[str, Any], max_positions: int) -> RopeScaling:
    original = rope.get("original_max_position_embeddings") or max_positions
    factor = rope.get("factor") or max_positions / original
    given = rope.get("attention_factor")
    if kind == "linear":
        return RopeScaling(kind, factor)
    if kind == "dynamic":
        # transformers reads the field and then goes by max_position_embeddings.
        return RopeScaling(kind, factor, rope.get("original_max_position_embeddings") or 0)
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return RopeScaling(kind, factor, original, low, high)
    if kind == "yarn":
        return RopeScaling(
            kind,
            factor,
            original,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            truncate=rope.get("truncate", True),
            attention_factor=given or _yarn_attention(factor, rope),
        )
    stretch = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind,
        factor,
        original,
        attention_factor=given or stretch,
        short_factors=tuple(rope["short_factor"]),
        long_factors=tuple(rope["long_factor"]),
    )


def _yarn_attention(factor: float, rope: Mapping[str, Any]) -> float:
    def stretch(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale, whole = rope.get("mscale"), rope.get("mscale_all_dim")
    return stretch(scale) / stretch(whole) if scale and whole else stretch(1.0)


def rope_to_hf(theta: float, fraction: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `rope_from_hf`.

    Args:
        theta: The base.
        fraction: The rotated part of a head.
        scaling: The scaling, or None.

    Returns:
        `rope_parameters`.

    Example:
        >>> rope_to_hf(1e4, 1.0, RopeScaling("linear", factor=2.0))
        {'rope_theta': 10000.0, 'rope_type': 'linear', 'factor': 2.0}
    """
    rope: dict[str, Any] = {"rope_theta": theta}
    if fraction != 1.0:
        rope["partial_rotary_factor"] = fraction
    if scaling is None:
        return rope | {"rope_type": "default"}
    s = scaling
    rope |= {"rope_type": s.kind, "factor": s.factor}
    if s.original_positions:
        rope["original_max_position_embeddings"] = s.original_positions
    if s.kind == "llama3":
        rope |= {"low_freq_factor": s.low_frequency, "high_freq_factor": s.high_frequency}
    if s.kind == "yarn":
        rope |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    if s.kind == "longrope":
        rope |= {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
    if s.kind in ("yarn", "longrope"):
        rope["attention_factor"] = s.attention_factor
    return rope


def rope_fields(family: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The DecoderConfig fields of a family whose layers all rotate alike.

    Args:
        family: Named in an error.
        hf: The Hugging Face config as a dict.

    Returns:
        Field to value.

    Raises:
        UserError: As `rope_from_hf`.

    Example:
        >>> hf = {"rope_parameters": {"rope_theta": 5.0}, "max_position_embeddings": 64}
        >>> rope_fields("llama", hf)["rope_theta"]
        5.0
    """
    positions = hf["max_position_embeddings"]
    theta, fraction, scaling = rope_from_hf(family, hf["rope_parameters"], positions)
    # Older configs say it outside; transformers works it into rope_parameters where it counts.
    outside = hf.get("partial_rotary_factor") or fraction
    refuse(family, partial_rotary_factor=outside if outside != fraction else None)
    return {
        "rope_theta": theta,
        "rope_local_theta": theta,
        "rope_fraction": fraction,
        "rope_scaling": scaling,
        "rope_local_scaling": scaling,
    }


def rope_parameters(c: DecoderConfig) -> dict[str, Any]:
    """The inverse of `rope_fields`: `rope_parameters` for a config class.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> rope_parameters(tiny_config())["rope_type"]
        'default'
    """
    return rope_to_hf(c.rope_theta, c.rope_fraction, c.rope_scaling)
