"""Piano rolls, embedded."""

from __future__ import annotations

import base64
import struct
from typing import TYPE_CHECKING

from mt3_export.lab.report.markup import Markup, element

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_export.lab.overlays import Picture

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def roll_figures(pictures: Sequence[Picture]) -> list[Markup]:
    """A figure for each picture; what could not be drawn says why."""
    return [_figure(picture, index) for index, picture in enumerate(pictures)]


def _figure(picture: Picture, index: int) -> Markup:
    if not picture.png.startswith(SIGNATURE):
        return element("p", element("b", picture.title), ". ", picture.caption, class_="note")
    width, height = struct.unpack(">II", picture.png[16:24])
    data = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    alt = f"Piano roll, {picture.title}. {picture.caption}"
    image = element("img", src=data, alt=alt, width=width, height=height)
    key = f"fit{index}"
    fit = element("input", type="checkbox", id=key, class_="fit")
    label = element("label", "Fit to the page", for_=key)
    label_roll = f"Piano roll, {picture.title}"
    scroll = element("div", image, class_="scroll roll", tabindex="0", role="region", aria_label=label_roll)
    caption = element("figcaption", element("b", picture.title), " ", element("span", picture.caption))
    return element("figure", caption, fit, label, scroll)
