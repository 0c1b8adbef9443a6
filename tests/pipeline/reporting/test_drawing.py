"""Markup and pictures: what is not markup is escaped; equal figures are equal bytes; both themes share a layout."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from pipeline.reporting.gallery import Gallery
from pipeline.reporting.markup import Html, table, tag, text
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.results import ModelResult, Results
from pipeline.reporting.router import section
from pipeline.reporting.style import DARK, LIGHT, METHOD_LINES, Theme, canvas, render


@given(st.text())
def test_text_never_opens_a_tag_or_leaves_an_attribute(value: str) -> None:
    inside = tag("p", value, title=value)
    assert inside.count("<") == inside.count(">") == 2
    assert inside.count('"') == 2


def test_markup_passes_unchanged() -> None:
    assert text(Html("<b>x</b>")) == "<b>x</b>"
    assert "<td><b>1</b></td>" in table(["a", "b"], [["row", tag("b", 1)]])


@pytest.mark.parametrize(
    ("weights", "told"), [([0.5, 0.5], "uniform would be 0.50"), ([0.9, 0.8], "gates of their own")]
)
def test_only_shares_are_measured_by_a_uniform_one(weights: list[float], told: str) -> None:
    router = {"experts": ["a", "b"], "groups": ["all"], "mean_weights": {"clean": {"a": weights, "b": weights}}}
    model = ModelResult("m", "M", ("a", "b"), ("clean",), {}, {}, router, {}, "evaluate/m")
    assert told in section(Results((model,)), Gallery(dark=False), Numbers())


def test_equal_figures_are_equal_bytes_in_both_themes() -> None:
    first, second = render(_draw), render(_draw)
    assert first == second and set(first) == {LIGHT.name, DARK.name}
    for theme in (LIGHT, DARK):
        picture = Image.open(io.BytesIO(first[theme.name]))
        expected = tuple(int(theme.paper[i : i + 2], 16) for i in (1, 3, 5))
        assert picture.getpixel((2, 2)) == expected


def test_names_with_dollar_signs_are_drawn_as_they_are() -> None:
    def draw(theme: Theme) -> Figure:
        figure = canvas(1.5)
        figure.subplots().set_title("$x_ and $\\broken")
        return figure

    assert render(draw)[LIGHT.name]


def test_no_two_methods_share_hue_and_marker() -> None:
    looks = [(line.hue, line.marker, line.dash) for line in METHOD_LINES.values()]
    assert len(set(looks)) == len(looks)


def _draw(theme: Theme) -> Figure:
    figure = canvas(1.5)
    figure.subplots().plot([0, 1], [1, 0], color=theme.blue)
    return figure
