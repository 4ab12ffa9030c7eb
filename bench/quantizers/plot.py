"""The results of run.py as one picture and one table: perplexity, on a logarithmic axis, against bits of a weight.

python bench/quantizers/plot.py bench/quantizers/results/DATE-MODEL.json
"""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 860, 520, 70, 50, 30
RIGHT = 260  # for the names
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
           "#000000", "#aec7e8")  # fmt: skip
OURS = "entropy"  # what the others are held against at their own bytes


def family(name: str) -> str:
    """The method of a row, without its bits or its step."""
    words = name.split()
    return " ".join(words[:-2] if "step" in words else words[:-1]).rstrip(",")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown, the smallest file first; beside each how many times the perplexity of our method it has.

    That is at as many bytes: the geometric mean of the stretches that were measured, and in brackets their range.
    """
    lines = [f"| method | MB | bits a weight | perplexity | stretches | times {OURS} |", "|---|---|---|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["bytes"]):
        figures = f"{row['bytes'] / 1e6:.4g} | {row['bits a weight']:.2f} | {row['perplexity']:.4g}"
        lines.append(f"| {name} | {figures} | {len(stretches(row))} | {beside(rows, row)} |")
    return "\n".join(lines)


def stretches(row: dict[str, Any]) -> list[float]:
    """The perplexity of each stretch; rows of one have that alone."""
    found: list[float] = row.get("stretches", [row["perplexity"]])
    return found


def beside(rows: dict[str, dict[str, Any]], row: dict[str, Any]) -> str:
    """How many times the perplexity of our method a row has at its bytes; nothing for our own and smaller files."""
    points = [r for name, r in rows.items() if family(name) == OURS]
    if row in points or row["bytes"] < min(r["bytes"] for r in points):
        return ""
    pairs = [(p, at_bytes(points, i, row["bytes"])) for i, p in enumerate(stretches(row))]
    ratios = [theirs / ours for theirs, ours in pairs]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{mean:.4g}" + (f" ({min(ratios):.4g} to {max(ratios):.4g})" if len(ratios) > 1 else "")


def at_bytes(ours: list[dict[str, Any]], i: int, size: float) -> float:
    """The perplexity of our method on a stretch at so many bytes: its logarithm on the line between two rows.

    The curve is convex, so that this is too high, if anything. Beyond the largest file it is that one's.
    """
    points = sorted((row["bytes"], math.log(stretches(row)[i])) for row in ours)
    for (low, first), (high, second) in pairwise(points):
        if low <= size <= high:
            return math.exp(first + (second - first) * (size - low) / (high - low))
    return math.exp(points[-1][1])


def picture(rows: dict[str, dict[str, Any]], title: str) -> str:
    """An SVG with a line for each method, and the model as it was as a dashed one; all by their first stretch."""
    before = stretches(rows["as it was"])[0] if "as it was" in rows else None
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        if name != "as it was":
            lines.setdefault(family(name), []).append((row["bits a weight"], stretches(row)[0]))
    every = [p for line in lines.values() for p in line]
    low, high = min(b for b, _ in every) - 0.2, max(b for b, _ in every) + 0.2
    least = math.log(min([p for _, p in every] + ([before] if before else []))) - 0.1
    most = math.log(max(p for _, p in every)) + 0.1

    def at(bits: float, perplexity: float) -> tuple[float, float]:
        x = LEFT + (bits - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        y = TOP + (most - math.log(perplexity)) / (most - least) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><text x="{LEFT}" y="18">{title}</text>',
    ]
    for bits in range(math.ceil(low), math.floor(high) + 1):
        x = at(bits, math.exp(least))[0]
        out.append(
            f'<path d="M{x} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/><text x="{x - 4}" y="{HEIGHT - 30}">{bits}</text>'
        )
    for power in range(1, 8):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            if least <= math.log(value) <= most:
                y = at(low, value)[1]
                out.append(
                    f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/><text x="20" y="{y + 4}">{value:g}</text>'
                )
    if before:
        y = at(low, before)[1]
        out.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="black" stroke-dasharray="4"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y + 4}">as it was: {before:.4g}</text>')
    if len(lines) > len(COLOURS):
        raise SystemExit(f"{len(lines)} methods and {len(COLOURS)} colours: add some")
    for colour, line in zip(COLOURS, lines.values(), strict=False):
        points = [at(*p) for p in sorted(line)]
        path = "L".join(f"{x} {y}" for x, y in points)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in points]
    for i, (colour, name) in enumerate(zip(COLOURS, lines, strict=False)):
        y = TOP + 14 + 18 * i
        out.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{y - 4}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 26}" y="{y}">{name}</text>')
    out.append(f'<text x="{LEFT + 150}" y="{HEIGHT - 10}">bits a weight: 8 bytes of the file / weights</text></svg>')
    return "\n".join(out) + "\n"


def main() -> None:
    source = Path(sys.argv[1])
    found = json.loads(source.read_text())
    title = f"{found['model']}: perplexity against the size of the file, {found['tokens']} tokens of calibration"
    source.with_suffix(".svg").write_text(picture(found["rows"], title))
    print(table(found["rows"]))


if __name__ == "__main__":
    main()
