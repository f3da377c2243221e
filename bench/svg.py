"""Charts of bars, written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

_OTHERS = "#9ca3af"


@dataclass(frozen=True, slots=True)
class Group:
    """Bars of one figure, by what each is of; one longer than `most` is cut and says so."""

    name: str
    bars: Mapping[str, float]
    most: float


def chart(title: str, groups: list[Group], colours: Mapping[str, str]) -> str:
    """An SVG: a group after another, in each a bar under another."""
    width, left, room, line = 900, 190, 560, 20
    y, parts = 64, []

    def text(x: float, at: float, what: str, more: str = "") -> str:
        return f'<text x="{x}" y="{at}" {more}>{escape(what)}</text>'

    for group in groups:
        parts.append(text(16, y, group.name, 'font-weight="bold"'))
        y += 8
        for name, one in group.bars.items():
            long = room * min(one, group.most) / group.most
            colour = colours.get(name, _OTHERS)
            parts.append(text(left - 8, y + 14, name, 'text-anchor="end"'))
            parts.append(
                f'<rect x="{left}" y="{y + 3}" width="{max(long, 2):.1f}" height="14" rx="2" fill="{colour}"/>'
            )
            label = short(one) + (" (cut)" if one > group.most else "")
            parts.append(text(left + max(long, 2) + 6, y + 14, label))
            y += line
        y += 26
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" '
        'font-family="system-ui, sans-serif" font-size="13">'
        "<style>text{fill:#111}@media(prefers-color-scheme:dark){text{fill:#eee}}</style>"
    )
    return "\n".join([head, text(16, 28, title, 'font-size="16" font-weight="bold"'), *parts, "</svg>\n"])


def short(number: float) -> str:
    """Three digits of it, or as many as it has before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
