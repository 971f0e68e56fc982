"""How much arithmetic a train step is, and whose."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from uld_jax.chips import peak_flops
from uld_jax.models import DecoderConfig, EncoderDecoderConfig
from uld_jax.models.flops import forward_flops
from uld_jax.types import Batch, TeacherTokens

ModelConfig = DecoderConfig | EncoderDecoderConfig


class StepFlops(NamedTuple):
    """Floating-point operations of one step over all devices.

    Attributes:
        student: Forward and backward.
        teacher: Of the teachers that read in the step itself, forward.

    Example:
        >>> StepFlops(student=300.0, teacher=100.0).teacher_share
        0.25
    """

    student: float
    teacher: float

    @property
    def total(self) -> float:
        """Of all models."""
        return self.student + self.teacher

    @property
    def teacher_share(self) -> float:
        """The teachers' part of the whole."""
        return self.teacher / self.total


def utilisation(flops: float, seconds: float, devices: Sequence[Any]) -> float | None:
    """Model FLOPs utilisation: the part of the devices' bfloat16 peak that a step has made use of.

    Args:
        flops: Of the step, by the models' sizes.
        seconds: It took.
        devices: All that took part.

    Returns:
        From 0 to 1; None where the devices' peak is not known.

    Source:
        "PaLM: Scaling Language Modeling with Pathways", appendix B.
    """
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else flops / seconds / (peak * len(devices))


def memory_peak(devices: Sequence[Any]) -> int | None:
    """The most bytes that were in use at a time on any of some devices, since the process began.

    Args:
        devices: Of this process.

    Returns:
        The number; None where devices do not tell, as CPUs do not.
    """
    told = [device.memory_stats() for device in devices]
    return max((stats["peak_bytes_in_use"] for stats in told if stats), default=None)


def step_flops(
    batch: Batch,
    student: ModelConfig,
    teachers: Sequence[ModelConfig | None],
    *,
    adapters: bool = False,
) -> StepFlops:
    """An estimate from the padded sizes of a batch; see `uld_jax.models.flops.forward_flops`.

    Args:
        batch: One step's.
        student: Its config.
        teachers: Each teacher's; any where the batch has its signal.
        adapters: Only adapters are trained, so that most weights have no gradient.

    Returns:
        The estimate; what is recomputed in the backward pass does not count.
    """
    positions = batch.targets.size
    encoder = batch.student_encoder_tokens
    forward = forward_flops(
        student,
        rows=batch.student_tokens.size // batch.student_tokens.shape[-1],
        length=batch.student_tokens.shape[-1],
        encoder_length=0 if encoder is None else encoder.shape[-1],
        positions=positions,
    )
    read = 0
    for config, given in zip(teachers, batch.teachers, strict=True):
        if config is not None and isinstance(given, TeacherTokens):
            encoder = given.encoder_tokens
            read += forward_flops(
                config,
                rows=given.tokens.size // given.tokens.shape[-1],
                length=given.tokens.shape[-1],
                encoder_length=0 if encoder is None else encoder.shape[-1],
                positions=positions,
            )
    return StepFlops(forward * (2 if adapters else 3), read)
