"""The results of run.py as one picture and one table: perplexity, on a logarithmic axis, against bits of a weight.

python bench/quantizers/plot.py bench/quantizers/results/DATE-MODEL.json
"""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 860, 520, 70, 50, 30
RIGHT = 260  # for the names
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
           "#000000", "#aec7e8")  # fmt: skip
OURS = "entropy"  # what the others are held against at their own bytes


def family(name: str) -> str:
    """The method of a row, without its bits or its step."""
    words = name.split()
    return " ".join(words[:-2] if "step" in words else words[:-1]).rstrip(",")


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows in Markdown, the smallest file first; beside each what our method has at as many bytes."""
    lines = [f"| method | MB | bits a weight | perplexity | {OURS} at as many bytes |", "|---|---|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["bytes"]):
        figures = f"{row['bytes'] / 1e6:.4g} | {row['bits a weight']:.2f} | {row['perplexity']:.4g}"
        ours = None if family(name) == OURS else at_bytes(rows, row["bytes"])
        lines.append(f"| {name} | {figures} | {'' if ours is None else f'{ours:.4g}'} |")
    return "\n".join(lines)


def at_bytes(rows: dict[str, dict[str, float]], size: float) -> float | None:
    """The perplexity of our method at so many bytes: its logarithm on the line between the two rows around them.

    The curve is convex, so that this is too high, if anything. None beyond the smallest and the largest file.
    """
    points = sorted((row["bytes"], math.log(row["perplexity"])) for name, row in rows.items() if family(name) == OURS)
    for (low, first), (high, second) in pairwise(points):
        if low <= size <= high:
            return math.exp(first + (second - first) * (size - low) / (high - low))
    return None


def picture(rows: dict[str, dict[str, float]], title: str) -> str:
    """An SVG with a line for each method, and the model as it was as a dashed one."""
    before = rows.get("as it was", {}).get("perplexity")
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        if name != "as it was":
            lines.setdefault(family(name), []).append((row["bits a weight"], row["perplexity"]))
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
