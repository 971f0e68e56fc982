"""What the decoders with LayerNorm and a plain MLP share: rows of their weight tables."""

from collections.abc import Sequence

from uld_jax.models.families.base import Part, Weight


def norm_rows(path: str, hf: str) -> tuple[Weight, ...]:
    """The two rows of a LayerNorm.

    Args:
        path: Our name of the scale; the bias is beside it.
        hf: The Hugging Face name without "weight" or "bias".

    Returns:
        The rows.

    Example:
        >>> [row.hf for row in norm_rows("norm", "transformer.ln_f")]
        ['transformer.ln_f.weight', 'transformer.ln_f.bias']
    """
    return Weight(path, f"{hf}.weight"), Weight(f"{path}_bias", f"{hf}.bias")


def linear_rows(
    path: str, hf: str, *, has_bias: bool, part: Part | None = None, transpose: bool = True
) -> tuple[Weight, ...]:
    """The row of a projection, and that of its bias.

    Args:
        path: Our name.
        hf: The Hugging Face name without "weight" or "bias".
        has_bias: Whether it has one.
        part: Which part of a fused tensor it is.
        transpose: Hugging Face stores [out, in], as all but GPT-2 do.

    Returns:
        One or two rows.

    Example:
        >>> [row.path for row in linear_rows("blocks.mlp.up", "fc1", has_bias=True)]
        ['blocks.mlp.up', 'blocks.mlp.up_bias']
    """
    bias_part = part and Part(part.groups, part.sizes, part.index)
    rows = [Weight(path, f"{hf}.weight", transpose=transpose, part=part)]
    if has_bias:
        rows.append(Weight(f"{path}_bias", f"{hf}.bias", part=bias_part))
    return tuple(rows)


def fused_rows(
    hf: str, groups: int, sizes: Sequence[int], *, has_bias: bool, axis: int = 0
) -> tuple[Weight, ...]:
    """The rows of query, key and value that one tensor holds.

    Args:
        hf: The Hugging Face name without "weight" or "bias".
        groups: Groups of heads in the tensor.
        sizes: Rows of query, key and value in a group.
        has_bias: Whether they have biases.
        axis: The tensor's output axis; 1 also means that it is stored [in, out].

    Returns:
        Three or six rows.

    Example:
        >>> [row.path for row in fused_rows("qkv", 1, (8, 2, 2), has_bias=False)][:2]
        ['blocks.attention.query', 'blocks.attention.key']
    """
    rows: list[Weight] = []
    for index, name in enumerate(("query", "key", "value")):
        part = Part(groups, tuple(sizes), index, axis)
        path = f"blocks.attention.{name}"
        rows += linear_rows(path, hf, has_bias=has_bias, part=part, transpose=axis == 0)
    return tuple(rows)
