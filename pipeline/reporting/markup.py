"""HTML, escaped: every text that reaches the page passes through `tag` or `text`."""

import html
from collections.abc import Iterable


class Html(str):
    """Text that is markup already. Everything else is escaped on its way into a tag."""

    __slots__ = ()


def text(value: object) -> Html:
    """The value with HTML's special characters escaped; markup made here passes unchanged."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """`<name attributes>children</name>`. A trailing underscore in an attribute's name is dropped (`class_`)."""
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{listed}>{''.join(text(child) for child in children)}</{name}>")


def join(pieces: Iterable[object]) -> Html:
    """The pieces, escaped where they are not markup, one after another."""
    return Html("".join(text(piece) for piece in pieces))


def note(message: object) -> Html:
    """A plain remark, such as why a picture is not there."""
    return tag("p", message, class_="note")


def details(summary: str, *children: object, opened: bool = False) -> Html:
    """A part that opens on a click, without script."""
    body = join([tag("summary", summary), *children])
    return Html(f"<details{' open' if opened else ''}>{body}</details>")


def table(
    header: Iterable[object], rows: Iterable[Iterable[object]], class_: str = "", above: Iterable[object] = ()
) -> Html:
    """A table; a cell that is a ready `td` or `th` passes, the first of a row becomes its heading.

    `above` is a row over the header, for cells that span columns.
    """
    heads = [
        tag("tr", *(cell if _is_cell(cell) else tag("th", cell, scope="col") for cell in cells))
        for cells in (above, header)
    ]
    head = join(heads[1:] if heads[0] == tag("tr") else heads)
    body = join(
        tag("tr", *(cell if _is_cell(cell) else _cell(cell, first=index == 0) for index, cell in enumerate(row)))
        for row in rows
    )
    return tag("div", tag("table", tag("thead", head), tag("tbody", body), class_=class_ or None), class_="scroll")


def _is_cell(value: object) -> bool:
    return isinstance(value, Html) and value.startswith(("<td", "<th"))


def _cell(value: object, first: bool) -> Html:
    return tag("th", value, scope="row") if first else tag("td", value)
