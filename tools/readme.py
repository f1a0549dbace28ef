"""Put what lesson 00 printed into the README: `python tools/readme.py [--check]`

The scoreboard in the README is not typed: it is the saved output of nbs/00_start.ipynb, between two markers.
"""
import re, sys
from pathlib import Path
import nbformat

root = Path(__file__).resolve().parent.parent
MARKS = re.compile(r"(<!-- scoreboard -->\n).*?(<!-- /scoreboard -->)", re.S)


def printed():
    "The scoreboard, the paired differences and the cost, as lesson 00 printed them"
    for cell in nbformat.read(root/"nbs"/"00_start.ipynb", as_version=4).cells:
        for out in cell.get("outputs", []):
            text = out.get("text", "")
            if "\nReport: " in text: return text.split("\nReport: ")[0].strip("\n")
    raise SystemExit("nbs/00_start.ipynb has no saved scoreboard: run tools/lessons.py nbs/00_start.ipynb first")


def filled(readme):
    "The README with the scoreboard of the day"
    return MARKS.sub(lambda m: f"{m[1]}```text\n{printed()}\n```\n{m[2]}", readme)


if __name__ == "__main__":
    path = root/"README.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in sys.argv: sys.exit(0 if old == new else "README.md shows another scoreboard than lesson 00: run tools/readme.py")
    path.write_text(new, encoding="utf-8")
