"""Figures rendered by vl-convert, as SVG and PDF: no browser, no network, same input, same bytes."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pikepdf
import vl_convert
from markupsafe import escape

from reports import drawings
from reports.data import ReportData
from reports.drawings import FAINT, HEIGHT, INK, WIDTH, Drawing
from reports.strings import Said


@dataclass(frozen=True, slots=True)
class Figure:
    """A rendered figure. svg: for the page, which has one legend for all and both languages; spec: of its own file."""

    name: str
    title: str
    svg: str
    spec: dict[str, Any]

    def file_svg(self) -> bytes:
        """A file of its own, with title and legend."""
        return vl_convert.vegalite_to_svg(self.spec).encode()

    def file_pdf(self) -> bytes:
        """The same as PDF. vl-convert writes dictionaries in any order; qpdf sorts them."""
        out = io.BytesIO()
        with pikepdf.open(io.BytesIO(vl_convert.svg_to_pdf(self.file_svg().decode()))) as pdf:
            pdf.save(out, deterministic_id=True)
        return out.getvalue()


def all_figures(data: ReportData) -> dict[str, list[Figure]]:
    """All figures of a report, by the section of the page that shows them."""
    sections: Iterable[tuple[str, Callable[[ReportData], list[Drawing]]]] = (
        ("steps", drawings.step_curves), ("latency", drawings.quality_latency), ("memory", drawings.quality_memory),
        ("metrics", drawings.metric_pairs), ("differences", drawings.forests), ("training", drawings.training_curves),
        ("study", drawings.study_figures),
    )  # fmt: skip
    drawn = {name: draw(data) for name, draw in sections}
    names = iter(_distinct([drawing.name for of_part in drawn.values() for drawing in of_part]))
    return {part: [_figure(drawing, next(names), data) for drawing in of_part] for part, of_part in drawn.items()}


def _distinct(names: Iterable[str]) -> list[str]:
    """Names of files, each of its own: ``a/b`` and ``a-b`` make the same."""
    counts: Counter[str] = Counter()
    found = []
    for name in names:
        counts[name] += 1
        found.append(name if counts[name] == 1 else f"{name}-{counts[name]}")
    return found


def _figure(drawing: Drawing, name: str, data: ReportData) -> Figure:
    plain = drawing.chart.to_dict(validate=False)  # the parts were validated as they were made
    svg = vl_convert.vegalite_to_svg(_spec(plain, legend=False))
    on_page = _in_both_languages(_with_unique_ids(svg, name), set(_said(plain)))
    titled = plain | {"title": f"{data.title}: {drawing.title}"}
    return Figure(name, drawing.title, on_page, _spec(titled, legend=True))


def _spec(chart: dict[str, Any], *, legend: bool) -> dict[str, Any]:
    config = {
        "background": "transparent",
        "font": "Helvetica, Arial, sans-serif",
        "view": {"stroke": None, "continuousWidth": WIDTH, "continuousHeight": HEIGHT},
        "axis": {"labelColor": INK, "titleColor": INK, "tickColor": INK, "domainColor": INK, "gridColor": INK,
                 "gridOpacity": FAINT * 0.75, "domainOpacity": 0.4, "tickOpacity": 0.4, "labelFontSize": 11,
                 "titleFontSize": 11, "titleFontWeight": "normal", "titleOpacity": 0.75, "titlePadding": 8},
        "legend": {"disable": True} if not legend else
                  {"orient": "bottom", "labelColor": INK, "labelFontSize": 11, "symbolOpacity": 1},
        "title": {"color": INK, "fontSize": 13, "fontWeight": "bold", "anchor": "start", "offset": 12},
    }  # fmt: skip
    return chart | {"config": config}


def _with_unique_ids(svg: str, prefix: str) -> str:
    """Prefix the ids of a drawing, so that several in one page don't share clip paths."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def _said(value: Any) -> Iterator[Said]:
    """The texts in a chart that have another language."""
    if isinstance(value, Said):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _said(part)
    elif isinstance(value, list):
        for part in value:
            yield from _said(part)


def _in_both_languages(svg: str, texts: Iterable[Said]) -> str:
    """Let the drawn texts be in both languages, of which the page hides one."""
    for text in texts:
        both = f'<tspan lang="en">{escape(str(text))}</tspan><tspan lang="zh">{escape(text.zh)}</tspan>'
        svg = svg.replace(f">{escape(str(text))}</text>", f">{both}</text>")
    return svg
