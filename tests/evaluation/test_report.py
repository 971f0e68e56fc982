import io

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from uld_jax.evaluation import METRICS
from uld_jax.evaluation.report import comparison_table, plot_losses, sample_table


def _render(table, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_comparison_table_shows_values_and_signed_change():
    before = {name: 10.0 + index for index, name in enumerate(METRICS)}
    after = {name: 20.123 - index for index, name in enumerate(METRICS)}
    lines = [line.split() for line in _render(comparison_table(before, after)).splitlines()]
    rows = [line for line in lines if line and line[0] in METRICS]
    assert lines[1] == ["metric", "before", "after", "change"]
    assert [row[0] for row in rows] == list(METRICS)
    assert rows[0] == ["f1", "10.00", "20.12", "+10.12"]
    assert rows[-1] == ["rougeLsum", "17.00", "13.12", "-3.88"]


def test_comparison_table_shows_the_named_metrics_in_order():
    scores = {"f1": 1.0, "em": 2.0, "bertscore": 3.0}
    text = _render(comparison_table(scores, scores, names=("bertscore", "f1")))
    assert text.index("bertscore") < text.index("f1")
    assert "em" not in text.split()
    with pytest.raises(KeyError, match="rouge9"):
        comparison_table(scores, scores, names=("rouge9",))


def test_sample_table_shows_texts_as_they_are():
    row = {
        "question": "Who [bold]won[/bold]?",
        "reference": "Denver",
        "before": "[/] red",
        "after": "Denver Broncos",
    }
    text = _render(sample_table([row, row | {"after": "none"}]))
    for value in [*row, *row.values(), "none"]:
        assert value in text


def test_sample_table_keeps_every_character_of_a_long_answer():
    answer = "x" * 60 + "END"
    row = {"question": "q", "reference": "r", "before": "b", "after": answer}
    text = _render(sample_table([row]), width=50)
    assert text.count("x") == 60
    assert "END" in "".join(text.split())


def _metrics(count):
    return [
        {
            "step": step,
            "total": 4.5 / step**0.2,
            "cross_entropy": 2.5 / step**0.25,
            "uld": 1.3 / step**0.15,
        }
        for step in range(1, count + 1)
    ]


@pytest.mark.parametrize("count", [1, 300])
def test_plot_is_a_png_1200_pixels_wide_with_three_curves(tmp_path, count):
    path = tmp_path / "losses.png"
    plot_losses([*_metrics(count), {"step": 9, "f1": 40.0}], path)
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (720, 1200)
    for colour in ("222222", "0072b2", "d55e00"):
        target = np.frombuffer(bytes.fromhex(colour), np.uint8) / 255
        drawn = np.abs(image[..., :3] - target).max(axis=-1) < 0.02
        assert drawn.sum() > 50, colour
    legend, step_label, loss_label = image[20:115, 1000:], image[690:, 500:700], image[250:400, :25]
    for region in (legend, step_label, loss_label):
        assert (region[..., :3].max(axis=-1) < 0.2).sum() > 50


def test_plot_refuses_metrics_without_losses(tmp_path):
    with pytest.raises(ValueError, match="with cross_entropy, step, total, uld, got none"):
        plot_losses([{"step": 1, "f1": 40.0}], tmp_path / "losses.png")
    assert list(tmp_path.iterdir()) == []
