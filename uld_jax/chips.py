"""What is published of the chips that programs run on, or are planned for."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """What is published of a chip.

    Attributes:
        flops: bfloat16 operations a second, at best.
        memory: Bytes of HBM.
        memory_bandwidth: Bytes a second between it and the chip.
        network_bandwidth: Bytes a second over all its links to other chips of the slice.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    network_bandwidth: float


# Source: cloud.google.com/tpu/docs, the page of each generation; links are in Gbit/s there.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 2400e9 / 8),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 4800e9 / 8),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 3584e9 / 8),
}
# What jax calls them, and the bfloat16 peaks of GPUs (NVIDIA's data sheets, without sparsity).
_KINDS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(kind: str) -> float | None:
    """The bfloat16 operations a second of a device, at best.

    Args:
        kind: As `jax.Device.device_kind` has it.

    Returns:
        The number; None for a kind that is not known, such as a CPU.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("TPU v5 lite"), peak_flops("cpu")
        (989000000000000.0, 197000000000000.0, None)
    """
    # Of several that fit the longest: "TPU v5 lite" is no "TPU v5".
    fitting = [name for name in _KINDS if kind.startswith(name)]
    return _KINDS[max(fitting, key=len)] if fitting else None
