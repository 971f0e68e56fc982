"""The distance as the paper's released PyTorch code computes it: what ours is measured against.

Softmax of both sides in float32, `torch.sort` of both, the shorter zero-padded, absolute
differences, their sum, and the mean over positions. PyTorch is never required: it is looked up
when asked for, and a machine without it has one row less in its tables.
"""

import functools
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

__all__ = [
    "all_threads",
    "device_of",
    "find_torch",
    "forward",
    "forward_backward",
    "mean_distance",
    "temp_bytes",
]


def find_torch() -> ModuleType | None:
    """The torch module, or None where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def device_of(torch: ModuleType, platform: str) -> str:
    """Where torch computes when JAX computes on a platform: on the same GPU, else on the CPU.

    Args:
        torch: the module.
        platform: JAX's, as "cpu", "gpu" or "tpu".

    Returns:
        torch's name of the device.
    """
    return "cuda" if platform == "gpu" and torch.cuda.is_available() else "cpu"


@functools.cache
def all_threads(torch: ModuleType) -> int:
    """How many threads torch takes if left alone; asked before anything sets another number.

    Args:
        torch: the module.

    Returns:
        The number.
    """
    return torch.get_num_threads()


def mean_distance(torch: ModuleType, student: Any, teacher: Any) -> Any:
    """The distance of each position, averaged.

    Args:
        torch: the module.
        student: tensor f32[N, V] of logits.
        teacher: tensor f32[N, U] of logits, without gradient.

    Returns:
        A tensor f32[].

    Reference:
        Boizard et al., arXiv 2402.12030, section 3.
    """
    q = torch.softmax(student.float(), -1).sort(-1, descending=True).values
    p = torch.softmax(teacher.float(), -1).sort(-1, descending=True).values
    gap = q.shape[-1] - p.shape[-1]
    q = torch.nn.functional.pad(q, (0, max(-gap, 0)))
    p = torch.nn.functional.pad(p, (0, max(gap, 0)))
    return (q - p).abs().sum(-1).mean()


def forward(
    torch: ModuleType, device: str, student_NV: np.ndarray, teacher_NU: np.ndarray
) -> Callable[[], float]:
    """A function that computes the value alone.

    Args:
        torch: the module.
        device: torch's name of the device.
        student_NV: f32 logits.
        teacher_NU: f32 logits.

    Returns:
        The function; it returns the mean distance, when it is there.
    """
    student, teacher = _tensors(torch, device, student_NV, teacher_NU)

    def run() -> float:
        with torch.no_grad():
            # Reading the value waits for a GPU to finish.
            return mean_distance(torch, student, teacher).item()

    return run


def forward_backward(
    torch: ModuleType, device: str, student_NV: np.ndarray, teacher_NU: np.ndarray
) -> Callable[[], Any]:
    """A function that computes the value and its gradient by the student's logits.

    Args:
        torch: the module.
        device: torch's name of the device.
        student_NV: f32 logits.
        teacher_NU: f32 logits.

    Returns:
        The function; it returns (value, gradient tensor [N, V]), when they are there.
    """
    student, teacher = _tensors(torch, device, student_NV, teacher_NU)
    student.requires_grad_(True)

    def run() -> tuple[float, Any]:
        student.grad = None
        value = mean_distance(torch, student, teacher)
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return value.item(), student.grad

    return run


def temp_bytes(
    torch: ModuleType, device: str, student: tuple[int, int], teacher: tuple[int, int]
) -> dict[str, int]:
    """Bytes held at the peak besides inputs and results, for shapes rather than values.

    On a CPU: what torch's allocator hands out, as its profiler records it, in a process of its own
    so that the profiler disturbs no measurement. On a GPU: the allocator's own peak.

    Args:
        torch: the module.
        device: torch's name of the device.
        student: shape (N, V).
        teacher: shape (N, U).

    Returns:
        Bytes by "forward" and "forward_backward"; empty where they cannot be had.
    """
    if device == "cuda":
        return _measure(partial(_cuda_peak, torch), torch, device, (student, teacher))
    command = [sys.executable, "-m", __name__, *map(str, (*student, *teacher))]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(process.stdout) if process.returncode == 0 else {}


def _measure(
    peak: Callable[[Callable[[], object]], int],
    torch: ModuleType,
    device: str,
    shapes: Iterable[tuple[int, int]],
) -> dict[str, int]:
    noise = np.random.default_rng(0)
    student, teacher = (noise.normal(size=shape).astype(np.float32) for shape in shapes)
    # The gradient is a result.
    return {
        "forward": peak(forward(torch, device, student, teacher)),
        "forward_backward": peak(forward_backward(torch, device, student, teacher))
        - student.nbytes,
    }


def _cuda_peak(torch: ModuleType, run: Callable[[], object]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _profiled_peak(torch: ModuleType, run: Callable[[], object]) -> int:
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = np.cumsum([event["args"]["Bytes"] for event in sorted(changes, key=lambda e: e["ts"])])
    return int(held.max())


def _tensors(
    torch: ModuleType, device: str, student_NV: np.ndarray, teacher_NU: np.ndarray
) -> tuple[Any, Any]:
    # Copied: torch would share, and complain about, JAX's read-only memory.
    return tuple(torch.tensor(x, device=device) for x in (student_NV, teacher_NU))


def _main(arguments: Sequence[str]) -> None:
    torch = find_torch()
    assert torch is not None
    positions, student, rows, teacher = map(int, arguments)
    shapes = (positions, student), (rows, teacher)
    print(json.dumps(_measure(partial(_profiled_peak, torch), torch, "cpu", shapes)))


if __name__ == "__main__":
    _main(sys.argv[1:])
