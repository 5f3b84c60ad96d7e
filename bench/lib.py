"""What every benchmark needs: run a command and know what it cost, keep the rows, write them as JSON, Markdown and a picture.

Results go to target/bench/AREA.json as a list of {figure, value, unit, reference, reference_value, ratio, target, holds}.
"""

import html
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def say(*words):
    print(*words, file=sys.stderr, flush=True)


class Cost:
    """Of one run: wall and CPU seconds (all processes that it waited for), and the largest memory of one, in bytes."""

    def __init__(self, wall, cpu, memory, output):
        self.wall, self.cpu, self.memory, self.output = wall, cpu, memory, output

    def __repr__(self):
        return f"{self.wall:.2f} s, {self.cpu:.2f} CPU s, {self.memory / 1e6:.0f} MB"


def run(*command, also=(), check=True, **options):
    """Runs a command to its end; `also` are the pids of servers that work for it, whose CPU counts too."""
    before = sum(cpu_of(pid) for pid in also)
    begun = time.monotonic()
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as child:
        # Small outputs only: neither pipe fills.
        output, errors = child.stdout.read(), child.stderr.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - begun
    if check and child.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed with {child.returncode}:\n{errors.decode(errors='replace')[-2000:]}")
    cpu = used.ru_utime + used.ru_stime + sum(cpu_of(pid) for pid in also) - before
    return Cost(wall, cpu, used.ru_maxrss * 1024, output.decode(errors="replace"))


def cpu_of(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def size_of(*paths):
    """Bytes of all files in folders."""
    return sum(f.lstat().st_size for path in paths for f in Path(path).rglob("*") if f.is_file())


def have(tool):
    return shutil.which(tool) is not None


class Report:
    """The rows of one area, and tables beside them."""

    def __init__(self, area):
        self.area, self.rows, self.tables, self.notes = area, [], [], []

    def row(self, figure, value, unit, reference, reference_value, target, at_most=True):
        """One figure against its reference. `target` bounds the ratio, from above or from below; None where there is none."""
        ratio = value / reference_value if reference_value else None
        holds = None if target is None or ratio is None else (ratio <= target if at_most else ratio >= target)
        sign = "<=" if at_most else ">="
        self.rows.append({
            "figure": figure, "value": value, "unit": unit, "reference": reference, "reference_value": reference_value,
            "ratio": ratio, "target": None if target is None else f"{sign} {target}", "holds": holds,
        })
        say(f"  {figure}: {show(value)} {unit}, {show(ratio)} of {reference}" + ("" if holds is None else f", {'holds' if holds else 'MISSED'}"))

    def table(self, title, head, rows):
        self.tables.append((title, head, rows))

    def write(self):
        folder = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "bench"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.area}.json").write_text(json.dumps(self.rows, indent=1) + "\n")
        (folder / f"{self.area}.md").write_text(self.markdown())
        (folder / f"{self.area}.svg").write_text(self.svg())
        print(self.markdown())
        say(f"written: {folder}/{self.area}.json, .md, .svg")

    def markdown(self):
        rows = [[r["figure"], f"{show(r['value'])} {r['unit']}", f"{r['reference']}: {show(r['reference_value'])}", show(r["ratio"]),
                 r["target"] or "", {True: "yes", False: "**no**", None: ""}[r["holds"]]] for r in self.rows]
        parts = [table(["figure", "value", "reference", "ratio", "target", "holds"], rows)]
        parts += [f"**{title}**\n\n{table(head, body)}" for title, head, body in self.tables]
        return "\n\n".join(parts + self.notes) + "\n"

    def svg(self):
        """The ratios as bars, on a scale that ends at 2; the mark on each is its target."""
        rows = [row for row in self.rows if row["ratio"] is not None]
        width, left, step = 900, 470, 26
        full = width - left - 90
        at = lambda ratio: left + min(ratio, 2) / 2 * full
        out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{len(rows) * step + 40}" font-family="sans-serif" font-size="12">',
               '<rect width="100%" height="100%" fill="white"/>',
               f'<line x1="{at(1):.0f}" y1="8" x2="{at(1):.0f}" y2="{len(rows) * step + 16}" stroke="#999" stroke-dasharray="3 3"/>',
               f'<text x="{at(1):.0f}" y="{len(rows) * step + 32}" text-anchor="middle" fill="#666">1.0: the reference</text>']
        for index, row in enumerate(rows):
            y = index * step + 12
            colour = {True: "#2a7d4f", False: "#c0392b", None: "#6b7c93"}[row["holds"]]
            out.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html.escape(row["figure"])}</text>')
            out.append(f'<rect x="{left}" y="{y + 2}" width="{at(row["ratio"]) - left:.1f}" height="15" fill="{colour}"/>')
            out.append(f'<text x="{at(row["ratio"]) + 6:.1f}" y="{y + 14}">{show(row["ratio"])}</text>')
            if row["target"]:
                x = at(float(row["target"].split()[1]))
                out.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 19}" stroke="black" stroke-width="2"/>')
        return "\n".join(out + ["</svg>"]) + "\n"


def table(head, rows):
    line = lambda cells: "| " + " | ".join(str(cell) for cell in cells) + " |"
    return "\n".join([line(head), "|" + "---|" * len(head)] + [line(row) for row in rows])


def show(value):
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"
