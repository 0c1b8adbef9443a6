"""The figures of a report: each drawn in both themes, kept as a file and embedded in the page."""

import base64
from collections.abc import Callable
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from pipeline.reporting.markup import Html, tag
from pipeline.reporting.style import DARK, LIGHT, Theme, render

ON_DARK = "(prefers-color-scheme: dark)"


@dataclass
class Gallery:
    """Light PNGs by name, to be written to `figures/<name>.png`; the page holds them, and dark ones if wanted."""

    pictures: dict[str, bytes] = field(default_factory=dict)
    dark: bool = True

    def add(self, name: str, draw: Callable[[Theme], Figure], alt: str, caption: object = "") -> Html:
        """The `<figure>` of a drawing, without any address outside the page."""
        assert name not in self.pictures, f"two figures are called {name}"
        drawn = render(draw, (LIGHT, DARK) if self.dark else (LIGHT,))
        self.pictures[name] = drawn[LIGHT.name]
        sources = [tag("source", srcset=_data(drawn[DARK.name]), media=ON_DARK)] if self.dark else []
        image = tag("img", src=_data(self.pictures[name]), alt=alt, loading="lazy")
        picture = Html(f"<picture>{''.join(map(_void, (*sources, image)))}</picture>")
        return tag("figure", picture, tag("figcaption", caption) if caption else Html(""), id=f"figure-{name}")


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _void(element: Html) -> str:
    return element[: element.rindex("</")]  # source and img have no end tag
