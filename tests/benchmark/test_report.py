"""Tables and pictures: every figure is where its heading says, and gaps are shown as gaps."""

import copy

import pytest
from rich.console import Console

from uld_jax.benchmark import plots, report

OK = {"status": "ok", "lower_ms": 0.01, "upper_ms": 0.03, "seconds": [1.0]}
NO = {"status": "out of memory"}


def candidate(forward, both, pytorch, **more):
    whole = OK | {"median_ms": both, "compile_s": 1.25, "temp_bytes": 3_456_789} | more
    speedup = {"pytorch": pytorch, "jnp.sort": 40.04}
    return {
        "forward": OK | {"median_ms": forward, "compile_s": 9.0, "temp_bytes": 9},
        "forward_backward": whole,
        "speedup": {"forward": {"pytorch": 9.0, "jnp.sort": 9.0}, "forward_backward": speedup},
    }


LOST = {
    "forward": NO,
    "forward_backward": NO,
    "speedup": {p: {"pytorch": None, "jnp.sort": None} for p in ("forward", "forward_backward")},
}
CASES = [
    {
        "student_vocab": student,
        "teacher_vocab": 262_144,
        "positions": positions,
        "candidates": {
            "auto": candidate(0.0123, 1_234.5, 8.5),
            "novel": candidate(3.0, 5.0, None, compile_s=None, temp_bytes=None),
            "jnp.sort": LOST,
        },
        "device_peak_bytes": None,
    }
    for student in (32_000, 49_152)
    for positions in (1, 8)
]
POINT = {
    "bucket_bits": 7,
    "forward": OK | {"median_ms": 0.5},
    "forward_backward": OK | {"median_ms": 0.75},
    "mean_error": 1e-5,
    "max_error": 2e-5,
    "mean_bound": 1e-4,
    "beyond_bound": 0,
}
LOST_POINT = {"bucket_bits": 9, "forward": NO, "forward_backward": NO}
CURVES = [
    {
        "student_vocab": 5,
        "teacher_vocab": 7,
        "positions": 1,
        "curve": [POINT, LOST_POINT],
        "sort": {"forward": OK | {"median_ms": 2.0}, "forward_backward": NO},
    }
]


def test_losses_sheets():
    sheets = report.losses_sheets(CASES)
    assert [sheet.title for sheet in sheets] == [
        "V = 32,000, U = 262,144 (ms / position)",
        "V = 49,152, U = 262,144 (ms / position)",
    ]
    rows = [dict(zip(sheets[0].headings, row, strict=True)) for row in sheets[0].rows]
    assert rows[0] == {
        "N": "1",
        "candidate": "auto",
        "fwd ms": "0.0123",
        "fwd+bwd ms": "1,234",
        "× PyTorch": "8.50",
        "× jnp.sort": "40.0",
        "temp MB": "3.46",
        "compile s": "1.25",
    }
    assert list(rows[1].values())[4:] == ["–", "40.0", "–", "–"]
    assert list(rows[2].values())[2:] == ["out of memory"] * 2 + ["–"] * 4
    assert [row["N"] for row in rows] == ["1"] * 3 + ["8"] * 3


def test_level_set_sheets():
    (sheet,) = report.level_set_sheets(CURVES)
    assert sheet.title == "V = 5, U = 7, 1 position (ms / position)"
    assert [list(row) for row in sheet.rows] == [
        ["7", "0.500", "0.750", "1.0e-05", "2.0e-05", "1.0e-04", "0"],
        ["9", "out of memory", "out of memory", "–", "–", "–", "–"],
        ["sort", "2.00", "out of memory", "–", "–", "–", "–"],
    ]


def test_terminal_table_fits_80_columns():
    fitting = [case["candidates"] | {"level_set": case["candidates"]["auto"]} for case in CASES]
    sheets = report.losses_sheets(
        [
            case | {"candidates": {k: v for k, v in own.items() if v is not LOST}}
            for case, own in zip(CASES, fitting, strict=True)
        ]
    )
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(report.rich_table(sheets[0]))
    assert "…" not in capture.get()
    assert "fwd+bwd ms" in capture.get()


@pytest.mark.parametrize("torch", [None, {"version": "2.13.0", "device": "cpu", "threads": 2}])
def test_machine_line_says_whether_torch_is_there(torch):
    found = report.machine(["bench", "losses", "--repeats=3"])
    assert found["command"] == "uld-jax bench losses --repeats=3"
    assert {"device_kind", "processor", "cores", "jax", "jaxlib", "python"} <= found.keys()
    line = report.machine_line(found | {"torch": torch})
    assert ("torch is not installed" in line) == (torch is None)
    assert "\n" not in line


def is_whole_png(path):
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")


def test_pictures_with_gaps_are_drawn(tmp_path):
    plots.plot_losses(CASES, "a note", tmp_path / "losses.png")
    plots.plot_level_set(CURVES, "a note", tmp_path / "level_set.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["level_set.png", "losses.png"]
    assert all(map(is_whole_png, tmp_path.iterdir()))


def test_a_picture_shows_the_times(tmp_path):
    slower = copy.deepcopy(CASES)
    slower[0]["candidates"]["auto"]["forward_backward"]["median_ms"] *= 2
    for name, cases in (("a", CASES), ("b", CASES), ("c", slower)):
        plots.plot_losses(cases, "a note", tmp_path / name)
    pictures = [(tmp_path / name).read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_picture_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "losses.png").mkdir()
    with pytest.raises(IsADirectoryError):
        plots.plot_losses(CASES, "a note", tmp_path / "losses.png")
    assert [path.name for path in tmp_path.iterdir()] == ["losses.png"]


MODEL = {"family": "llama", "parameters": 134_500_000, "batch": 4}
TIMED = {"status": "ok", "median_ms": 2_000.0, "compile_s": 3.0, "temp_bytes": 1_000_000_000}
UNKNOWN = TIMED | {"median_ms": 4_000.0, "compile_s": None, "temp_bytes": None}


def test_step_sheets():
    case = MODEL | {"length": 128, "optimizer": "fused", "ratio": 0.5}
    case["candidates"] = {"uld_jax": TIMED | {"loss": 10.5}, "pytorch": UNKNOWN | {"loss": 10.25}}
    (sheet,) = report.step_sheets([case])
    assert sheet.title == (
        "train step of a llama of 134 M parameters, 4 × 128 tokens, torch's fused AdamW"
    )
    assert [list(row) for row in sheet.rows] == [
        ["uld_jax", "2,000", "256", "0.500", "10.5000", "1,000", "3.00"],
        ["pytorch", "4,000", "128", "1.00", "10.2500", "–", "–"],
    ]


def test_step_sheets_without_torch():
    case = MODEL | {"length": 128, "optimizer": None, "ratio": None}
    (sheet,) = report.step_sheets([case | {"candidates": {"uld_jax": TIMED | {"loss": 1.0}}}])
    assert sheet.title.endswith("4 × 128 tokens")
    assert sheet.rows[0][3] == "–"


def test_generate_sheets():
    case = MODEL | {"prompt_length": 32, "new_tokens": 64, "speedup": 2.0, "agreement": 0.9951}
    case["candidates"] = {
        "uld_jax": TIMED | {"tokens_per_second": 128.0},
        "pytorch": UNKNOWN | {"tokens_per_second": 64.0},
    }
    (sheet,) = report.generate_sheets([case])
    assert sheet.title == (
        "greedy generation of a llama of 134 M parameters, 4 × 64 tokens after 32"
    )
    assert [list(row) for row in sheet.rows] == [
        ["uld_jax", "2.00", "128", "2.00", "99.5%", "3.00"],
        ["pytorch", "4.00", "64.0", "1.00", "99.5%", "–"],
    ]
