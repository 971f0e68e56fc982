"""What was measured, for people: tables on the terminal and in Markdown, and the machine."""

import datetime
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.table import Table

from uld_jax.benchmark import pytorch
from uld_jax.benchmark.losses import BASELINES, PASSES

__all__ = [
    "Sheet",
    "case_title",
    "generate_sheets",
    "level_set_sheets",
    "losses_sheets",
    "machine",
    "machine_line",
    "markdown",
    "rich_table",
    "step_sheets",
    "vocabularies",
]

_NONE = "–"
_TIMES = ("fwd ms", "fwd+bwd ms")


@dataclass(frozen=True)
class Sheet:
    """A table before it has a form."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def machine(argv: Sequence[str]) -> dict[str, Any]:
    """Where and when something was measured.

    Args:
        argv: the command line's arguments.

    Returns:
        Device, cores, versions, date and command line; "torch" is None where it is not installed.

    Example:
        >>> machine(["bench", "losses"])["command"]
        'uld-jax bench losses'
    """
    device = jax.local_devices()[0]
    torch = pytorch.find_torch()
    found = None
    if torch is not None:
        found = {
            "version": torch.__version__,
            "device": pytorch.device_of(torch, jax.default_backend()),
            "threads": pytorch.all_threads(torch),
        }
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "torch": found,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["uld-jax", *argv]),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if sys.platform == "linux" and path.is_file():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine in one line, with a note where PyTorch is missing.

    Args:
        found: what `machine` returned.

    Returns:
        The line.
    """
    torch = found["torch"]
    return ", ".join(
        [
            found["device_kind"] if found["platform"] != "cpu" else found["processor"],
            f"{found['cores']} cores",
            f"jax {found['jax']}",
            f"torch {torch['version']} ({torch['device']}, {torch['threads']} threads)"
            if torch
            else "torch is not installed: nothing to compare with it",
            found["date"][:10],
        ]
    )


def vocabularies(case: Mapping[str, Any]) -> str:
    """Both vocabularies of a case.

    Args:
        case: as `losses.measure` returns it.

    Returns:
        "V = …, U = …".

    Example:
        >>> vocabularies({"student_vocab": 49152, "teacher_vocab": 262144})
        'V = 49,152, U = 262,144'
    """
    return f"V = {case['student_vocab']:,}, U = {case['teacher_vocab']:,}"


def case_title(case: Mapping[str, Any]) -> str:
    """The whole size of a case.

    Args:
        case: as `losses.measure` returns it.

    Returns:
        "V = …, U = …, N positions".

    Example:
        >>> case_title({"student_vocab": 5, "teacher_vocab": 7, "positions": 1})
        'V = 5, U = 7, 1 position'
    """
    count = case["positions"]
    return f"{vocabularies(case)}, {count:,} position{'s' * (count != 1)}"


def losses_sheets(cases: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """One sheet for each pair of vocabularies; times are medians in milliseconds a position.

    Args:
        cases: as `losses.measure` returns them.

    Returns:
        The sheets: N is the number of positions; "× PyTorch" (the faster of its two) and
        "× jnp.sort" say how many times faster forward and backward are.
    """
    headings = (
        "N",
        "candidate",
        *_TIMES,
        "× PyTorch",
        "× jnp.sort",
        "temp MB",
        "compile s",
    )
    rows: dict[str, list[list[str]]] = {}
    for case in cases:
        for name, result in case["candidates"].items():
            both = result["forward_backward"]
            held = both.get("temp_bytes")
            rows.setdefault(vocabularies(case), []).append(
                [
                    f"{case['positions']:,}",
                    name,
                    *_times(result),
                    *(_figure(result["speedup"]["forward_backward"][b]) for b in BASELINES),
                    _figure(None if held is None else held / 1e6),
                    _figure(both.get("compile_s")),
                ]
            )
    return [Sheet(f"{title} (ms / position)", headings, own) for title, own in rows.items()]


def level_set_sheets(cases: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """One sheet a case: a row for each width of the buckets, and one for the exact method.

    Args:
        cases: as `level_set.measure` returns them.

    Returns:
        The sheets; times as in `losses_sheets`, errors against float64.
    """
    errors = ("mean_error", "max_error", "mean_bound")
    names = ("mean error", "max error", "mean bound", "beyond bound")
    return [
        Sheet(
            f"{case_title(case)} (ms / position)",
            ("bucket bits", *_TIMES, *names),
            [
                [
                    str(point["bucket_bits"]),
                    *_times(point),
                    *(f"{point[e]:.1e}" if e in point else _NONE for e in errors),
                    str(point.get("beyond_bound", _NONE)),
                ]
                for point in case["curve"]
            ]
            + [["sort", *_times(case["sort"]), *[_NONE] * len(names)]],
        )
        for case in cases
    ]


def step_sheets(cases: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """One sheet a case: the train step here and in PyTorch, and the ratio of the two.

    Args:
        cases: as `models.measure_step` returns them.

    Returns:
        The sheets; times are medians, "× PyTorch" is the time over PyTorch's, round by round, and
        "loss" that before the first step.
    """
    headings = ("candidate", "ms / step", "tokens / s", "× PyTorch", "loss", "temp MB", "compile s")
    sheets = []
    for case in cases:
        rows = []
        for name, result in case["candidates"].items():
            held, tokens = result["temp_bytes"], case["batch"] * case["length"]
            rows.append(
                [
                    name,
                    _figure(result["median_ms"]),
                    _figure(1e3 * tokens / result["median_ms"]),
                    _figure(case["ratio"] if name != "pytorch" else 1.0),
                    f"{result['loss']:.4f}",
                    _figure(None if held is None else held / 1e6),
                    _figure(result["compile_s"]),
                ]
            )
        title = f"train step of {_model(case)}, {case['batch']} × {case['length']} tokens"
        loop = f", torch's {case['optimizer']} AdamW" if case["optimizer"] else ""
        sheets.append(Sheet(title + loop, headings, rows))
    return sheets


def generate_sheets(cases: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """One sheet a case: greedy generation here and in PyTorch, and the ratio of the two.

    Args:
        cases: as `models.measure_generate` returns them.

    Returns:
        The sheets; times are medians, "× PyTorch" says how many times as many tokens a second,
        round by round, and "same tokens" how many agree with PyTorch's.
    """
    headings = ("candidate", "s", "tokens / s", "× PyTorch", "same tokens", "compile s")
    sheets = []
    for case in cases:
        share = case["agreement"]
        rows = [
            [
                name,
                _figure(result["median_ms"] / 1e3),
                _figure(result["tokens_per_second"]),
                _figure(case["speedup"] if name != "pytorch" else 1.0),
                _NONE if share is None else f"{share:.1%}",
                _figure(result["compile_s"]),
            ]
            for name, result in case["candidates"].items()
        ]
        size = f"{case['batch']} × {case['new_tokens']} tokens after {case['prompt_length']}"
        sheets.append(Sheet(f"greedy generation of {_model(case)}, {size}", headings, rows))
    return sheets


def _model(case: Mapping[str, Any]) -> str:
    return f"a {case['family']} of {_figure(case['parameters'] / 1e6)} M parameters"


def rich_table(sheet: Sheet) -> Table:
    """A sheet for the terminal.

    Args:
        sheet: the table.

    Returns:
        The same for rich to print.
    """
    table = Table(title=sheet.title, box=box.SIMPLE, title_justify="left", collapse_padding=True)
    for heading in sheet.headings:
        table.add_column(heading, justify="left" if heading == "candidate" else "right")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def markdown(sheets: Sequence[Sheet], note: str) -> str:
    """Sheets for a README.

    Args:
        sheets: the tables.
        note: a line below them.

    Returns:
        Markdown.

    Example:
        >>> print(markdown([Sheet("small", ("a", "b"), [("1", "2")])], "made here"), end="")
        **small**
        <BLANKLINE>
        | a | b |
        |--:|--:|
        | 1 | 2 |
        <BLANKLINE>
        made here
    """
    parts = []
    for sheet in sheets:
        rule = "".join("|:--" if heading == "candidate" else "|--:" for heading in sheet.headings)
        lines = [f"| {' | '.join(cells)} |" for cells in (sheet.headings, *sheet.rows)]
        parts.append("\n".join([f"**{sheet.title}**\n", lines[0], f"{rule}|", *lines[1:]]))
    return "\n\n".join([*parts, note]) + "\n"


def _times(result: Mapping[str, Any]) -> list[str]:
    return [
        _figure(result[p]["median_ms"]) if result[p]["status"] == "ok" else result[p]["status"]
        for p in PASSES
    ]


def _figure(value: float | None) -> str:
    """Three significant digits, never in scientific notation."""
    if value is None:
        return _NONE
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(digits, 0)}f}"
