"""The page around the sections: one HTML file that needs no other file, no network and no script."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reporting.css import CSS
from pipeline.reporting.markup import Html, join, tag, text


@dataclass(frozen=True)
class Section:
    """One part of the page; `intro` says in a sentence what the reader looks at."""

    id: str
    title: str
    intro: str
    body: Html


@dataclass(frozen=True)
class Tile:
    """One number at the head of the page."""

    value: str
    label: str


def page(
    name: str, eyebrow: str, headline: str, leads: Sequence[str], tiles: Sequence[Tile], sections: Sequence[Section]
) -> str:
    """The whole document."""
    links = [tag("a", section.title, href=f"#{section.id}") for section in sections]
    top = tag(
        "header",
        tag("p", eyebrow, class_="eyebrow"),
        tag("h1", headline),
        *(tag("p", lead, class_="lead") for lead in leads if lead),
        tag(
            "div", *(tag("div", tag("b", t.value), tag("span", t.label), class_="tile") for t in tiles), class_="tiles"
        ),
    )
    body = tag(
        "div",
        tag("nav", tag("strong", name), *links),
        tag("main", top, *(_section(section) for section in sections), _footer()),
        class_="frame",
    )
    # A policy, not a hope: the browser itself refuses anything that is not in this file.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = join(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}">'),
            tag("title", f"{name}: BD-Merging report"),
            Html(f"<style>\n{CSS}\n</style>"),
        ]
    )
    return f"<!DOCTYPE html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def _section(section: Section) -> Html:
    intro = tag("p", section.intro, class_="intro") if section.intro else ""
    return tag("section", tag("h2", section.title), intro, section.body, id=section.id)


def _footer() -> Html:
    said = "Every number of this page stands in report.json with the stored units it was computed from."
    return tag("footer", said)
