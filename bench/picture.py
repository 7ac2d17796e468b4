"""The results as one SVG: a small bar chart for each of a few measures, readable on white and dark.

No library: bars, numbers and a frame are few enough elements to write down.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from html import escape

from bench.report import MEASURES, Measure, Results, figures
from bench.subjects import BARE

SHOWN = (
    "token_us",
    "ttft_p50_ms",
    "short_per_s",
    "body_per_s",
    "many_mb",
    "cancel_served_ms",
)
WIDTH = 900
COLUMNS = 2
CHART = WIDTH // COLUMNS
LABELS = 130
NUMBERS = 70
BAR = 14
ROW = 20
HEAD = 34
FOOT = 58
CUT = 4  # a bar is this much longer than the middle one, at most
LONGER = "⟫"
STYLE = """
 text { font: 12px system-ui, sans-serif; fill: #24292f }
 .title { font-weight: 600 } .small { font-size: 10px; fill: #6e7781 }
 .bar { fill: #8c959f } .ours { fill: #d4a017 } .spread { stroke: #24292f; stroke-width: 1 }
 .paper { fill: #ffffff }
 @media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #8b949e } .paper { fill: #0d1117 }
  .bar { fill: #6e7681 } .spread { stroke: #e6edf3 }
 }"""


def svg(results: Results) -> str:
    """A whole SVG document, with machine, versions and date at its foot."""
    charts = [
        (measure, shown)
        for measure in MEASURES
        if measure.key in SHOWN
        and (shown := {k: v for k, v in figures(results, measure.key).items() if k != BARE})
    ]
    lines: list[str] = []
    top = 0
    for first in range(0, len(charts), COLUMNS):
        line = charts[first : first + COLUMNS]
        for column, (measure, shown) in enumerate(line):
            lines += _chart(measure, shown, column * CHART, top)
        top += HEAD + ROW * max(len(shown) for _, shown in line)
    height = top + FOOT
    lines += _foot(results, top + 22)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">\n<style>{STYLE}\n</style>\n'
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )


def _chart(
    measure: Measure, shown: dict[str, dict[str, float]], left: int, top: int
) -> Iterator[str]:
    arrow = "less is better" if measure.better == "less" else "more is better"
    title = f"{measure.title}{f', {measure.unit}' if measure.unit else ''}"
    yield (
        f'<text class="title" x="{left + 8}" y="{top + 22}">{escape(title)} '
        f'<tspan class="small">{arrow}</tspan></text>'
    )
    room = CHART - LABELS - NUMBERS
    scale = max(*(values["max"] for values in shown.values()), 1e-9)
    if measure.better == "less":  # one of 1,000 µs would leave the others no length at all
        middle_one = statistics.median(values["median"] for values in shown.values())
        scale = min(scale, CUT * middle_one) or scale
    for number, (row, values) in enumerate(shown.items()):
        y = top + HEAD + number * ROW
        x = left + LABELS
        length = {key: room * min(max(value, 0) / scale, 1) for key, value in values.items()}
        kind = "ours" if row.startswith("hive") else "bar"
        said = f"{values['median']:,.{measure.digits}f}"
        cut = f" {LONGER}" if values["median"] > scale else ""
        middle = y + BAR / 2
        yield f'<text x="{x - 6}" y="{y + 11}" text-anchor="end">{escape(row)}</text>'
        yield (
            f'<rect class="{kind}" x="{x}" y="{y}" width="{max(length["median"], 1):.1f}" '
            f'height="{BAR}" rx="2"/>'
        )
        if values["max"] > values["min"]:
            ends = f'x1="{x + length["min"]:.1f}" x2="{x + length["max"]:.1f}"'
            yield f'<line class="spread" {ends} y1="{middle}" y2="{middle}"/>'
        yield f'<text x="{x + length["max"] + 5:.1f}" y="{y + 11}">{said}{cut}</text>'


def _foot(results: Results, y: int) -> Iterator[str]:
    plan = results.plan
    versions = {
        row.partition(":")[0]: version for row, version in results.versions.items() if version
    }
    rounds = f"median and range of {len(results.rounds)} rounds"
    for number, line in enumerate(
        (
            f"{plan.streams} streams × {plan.rate:.0f} tokens/s ({plan.arrival}), "
            f"{plan.short_callers} callers, {plan.many} streams held, {plan.cancelled} cancelled; "
            f"{rounds if len(results.rounds) > 1 else 'one round'}; on one core; "
            f"{LONGER} is longer than drawn",
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            results.where,
        )
    ):
        yield f'<text class="small" x="8" y="{y + 14 * number}">{escape(line)}</text>'
