"""Generates the table of metrics in docs/scoring.md from the registry in vpcodec/metrics.

python docs/make_metrics.py          # write it
python docs/make_metrics.py --check  # exit 1 if it is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from vpcodec.metrics.base import Metric
from vpcodec.metrics.registry import METRICS, SYSTEM_METRICS

TARGET = Path(__file__).with_name("scoring.md")
BEGIN, END = "<!-- made by docs/make_metrics.py -->\n", "<!-- end -->\n"
BETTER = {"": "", "zero": "0", "higher": "higher", "lower": "lower"}


def table() -> str:
    """The metrics in their order, as a table in Markdown."""
    lines = ["| name | what | unit | better | needs |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(row, (*METRICS.values(), *SYSTEM_METRICS.values()))]) + "\n"


def row(metric: Metric) -> str:
    rate = f", {metric.rate // 1000} kHz" if metric.rate else ""
    alone = "; no reference" if not metric.needs_reference and metric.name in METRICS else ""
    name = f"`{metric.name}`" + ("" if metric.default else " (only when named)")
    needs = ", ".join(metric.packages)
    what = f"{metric.label}: {metric.source}{rate}{alone}"
    return f"| {name} | {what} | {metric.unit} | {BETTER[metric.better]} | {needs} |"


def page(text: str) -> str:
    """The page with its table replaced."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + table() + END + rest.partition(END)[2]


def main() -> None:
    text = TARGET.read_text()
    if "--check" in sys.argv:
        sys.exit(text != page(text))
    TARGET.write_text(page(text))


if __name__ == "__main__":
    main()
