"""The report as a reader gets it: one file, everything escaped, every number traceable, and no part it cannot miss."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import TASKS, TITLES, Synthetic

from pipeline.errors import DataError
from pipeline.reporting import Report, build_report
from pipeline.store import Store

FIGURES = {
    "accuracy_against_cost", "accuracy_by_level", "router_bd_layer", "router_bd_task", "router_twin_merging",
    "degree_distribution", "hubs", "pairs_same_class", "score_distributions", "reliability", "risk_coverage",
    "loss_curves", "timing",
}  # fmt: skip


class Page(HTMLParser):
    """Tags, addresses and text of a page; notes whether every tag that opens is closed."""

    VOID = frozenset({"meta", "img", "source", "br", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_needs_no_other_file_and_no_script(report: Report) -> None:
    page = Page(report.html)
    assert page.open == []
    assert "script" not in page.tags and "link" not in page.tags
    assert page.addresses and all(a.startswith(("data:image/png;base64,", "#")) for a in page.addresses)
    assert not re.search(r"url\(|@import|https?://", report.html)


def test_links_of_the_page_lead_somewhere(report: Report) -> None:
    targets = [address[1:] for address in Page(report.html).addresses if address.startswith("#")]
    assert targets and all(f'id="{target}"' in report.html for target in targets)


def test_names_from_data_are_escaped(report: Report) -> None:
    assert "letters <A&B>" not in report.html and "letters &lt;A&amp;B&gt;" in report.html
    assert "<not>" not in report.html and "&lt;not&gt; an image" in report.html


def test_page_holds_light_and_dark(report: Report) -> None:
    assert report.html.count("prefers-color-scheme: dark") == 1 + len(FIGURES)


def test_every_expected_figure_is_a_png(report: Report) -> None:
    assert set(report.figures) == FIGURES
    assert all(png.startswith(b"\x89PNG\r\n\x1a\n") for png in report.figures.values())


def test_every_number_names_stored_units_with_their_keys(report: Report, run: Synthetic) -> None:
    content = json.loads(report.json)
    known = {(a.stage, a.unit, a.key) for units in run.artefacts.values() for a in units}
    listed = {(u["stage"], u["unit"], u["key"]) for units in content["sources"].values() for u in units}
    assert listed == known
    for name, number in content["numbers"].items():
        assert number["sources"], name
        for source in number["sources"]:
            assert source in content["sources"] or source == f"runs/{run.record['run_id']}", (name, source)
            if source in content["sources"] and not source.endswith("/*"):
                assert (run.store.root / source / "manifest.json").is_file()


def test_table_numbers_are_those_that_were_measured(report: Report, run: Synthetic) -> None:
    numbers = json.loads(report.json)["numbers"]
    for unit in run.artefacts["evaluate"]:
        metrics = json.loads(unit.file("metrics.json").read_text(encoding="utf-8"))
        for protocol, levels in metrics["protocols"].items():
            for level, cell in (levels or {}).items():
                mean = cell["mean"]["accuracy"]
                assert numbers[f"table.{protocol}.{unit.unit}.{level}.accuracy"]["value"] == pytest.approx(mean)
                drop = 1 - mean / levels["clean"]["mean"]["accuracy"]
                if level != "clean":
                    recorded = numbers[f"table.{protocol}.{unit.unit}.{level}.relative_drop"]["value"]
                    assert recorded == pytest.approx(drop)
                for task in TASKS:
                    value = numbers[f"tasks.{protocol}.{unit.unit}.{level}.{task}.accuracy"]["value"]
                    assert value == pytest.approx(cell["tasks"][task]["accuracy"])


def test_page_shows_every_method_and_says_what_was_rejected(report: Report) -> None:
    text = " ".join(Page(report.html).text)
    assert all(title in text for title in TITLES.values())
    assert "truncated file" in text and "0.8412" in text and "0.065" in text


def test_report_of_almost_nothing_says_what_is_missing(tmp_path: Path) -> None:
    run = Synthetic(Store(tmp_path), leave_out=_all_but("task_arithmetic"))
    report = build_report(run.artefacts, {})
    text = " ".join(Page(report.html).text)
    for remark in (
        "no routing weights",
        "no neighbourhoods",
        "No pairs with labels",
        "no detection stage",
        "no loss curves",
        "holds no timing",
        "nothing to compare with",
    ):
        assert remark in text, remark


def test_report_without_any_evaluation_is_still_a_page() -> None:
    report = build_report({}, {})
    assert "Nothing was evaluated" in report.html and Page(report.html).open == []
    assert report.figures == {} and json.loads(report.json)["numbers"] == {}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run = Synthetic(Store(tmp_path), leave_out=_all_but("task_arithmetic"))
    path = run.artefacts["evaluate"][0].file("metrics.json")
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(str(path))):
        build_report(run.artefacts, {})


def _all_but(model: str) -> list[str]:
    stages = [
        "shard",
        "embed",
        "base",
        "experts",
        "fit_head",
        "fit_router",
        "radius",
        "edges",
        "neighbours",
        "score",
        "pairs",
    ]
    return [*stages, "baselines", "export", "threshold", "detect", *(name for name in TITLES if name != model)]
