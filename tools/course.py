"""The first lesson from top to bottom, in a terminal: `make course [DATA=desk|e2e|banking77|file.csv]`

Runs the cells of nbs/00_start.ipynb one after the other, with the headings as milestones, and leaves
runs/<name>/scores.json and report.html.
"""
import argparse, ast, os, re, sys, time, warnings
from pathlib import Path

root = Path(__file__).resolve().parent.parent
LESSON = root/"nbs"/"00_start.ipynb"
SAID = (ValueError, OSError, KeyError, RuntimeError, MemoryError, FloatingPointError)   # errors that carry their own remedy


def options(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="desk, desk_threads, e2e, banking77, legal, or the path of a .csv, .tsv, .json or .jsonl file")
    p.add_argument("--input", help="the file's column with the question, if its name can't be guessed")
    p.add_argument("--output", help="the file's column with the answer, likewise")
    p.add_argument("--instruction", help="what to tell the model, for a file without such a column")
    p.add_argument("--profile", help="section of settings.ini: cpu, t4, a100 or test")
    return p.parse_args(argv)


def prepare(o):
    "Options become settings; nothing is drawn on a screen and nothing is fetched behind the reader's back"
    data = o.data
    if data and Path(data).suffix: data = str(Path(data).expanduser().resolve())
    for key, value in dict(CORPUS=data, INPUT=o.input, OUTPUT=o.output, INSTRUCTION=o.instruction,
                           PROFILE=o.profile).items():
        if value: os.environ[f"FTCOURSE_{key}"] = value
    os.environ.update(MPLBACKEND="Agg", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.chdir(root)
    warnings.filterwarnings("ignore")


def show(value):
    "A cell's last value, where it says something in a terminal"
    plain = type(value).__str__ is not object.__str__ or isinstance(value, (int, float))
    if isinstance(value, str) and "<" in value[:1]: return
    if value is None or not plain or hasattr(value, "figure") or type(value).__name__ in ("Table", "ErrorbarContainer"): return
    if isinstance(value, dict): value = "\n".join(f"{k}: {v}" for k, v in value.items())
    print(value, flush=True)


def run_cell(source, space):
    "Run a cell; show its last expression unless it ends in a semicolon"
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, LESSON.name, "exec"), space)
    if last is None: return
    value = eval(compile(ast.Expression(last.value), LESSON.name, "eval"), space)
    if not source.rstrip().endswith(";"): show(value)


def main():
    for s in (sys.stdout, sys.stderr): s.reconfigure(errors="replace")   # a terminal that isn't UTF-8
    o = options()
    prepare(o)
    import nbformat
    space, start = {"__name__": "__main__"}, time.time()
    print("The first lesson, from top to bottom. On two CPU cores it takes five to ten minutes.", flush=True)
    for cell in nbformat.read(LESSON, as_version=4).cells:
        if cell.cell_type == "markdown":
            for title in re.findall(r"^## (.*)$", cell.source, re.M):
                if title.startswith("What to do next"): return finish(space, start)
                print(f"\n── {title}  ({time.time()-start:.0f} s)", flush=True)
        elif not re.search(r"^#\|\s*(cuda|slow|eval:\s*false)", cell.source, re.M): run_cell(cell.source, space)


def finish(space, start):
    print(f"\nDone in {(time.time()-start)/60:.1f} minutes. Open the report: {space['report'].resolve()}")


if __name__ == "__main__":
    try: main()
    except KeyboardInterrupt: sys.exit("\nStopped. Nothing half-written is left; run it again when you like.")
    except SAID as e:
        if os.environ.get("FTCOURSE_DEBUG"): raise
        said = e.args[0] if isinstance(e, KeyError) and e.args else e
        sys.exit(f"\nStopped: {said}\n(FTCOURSE_DEBUG=1 shows where.)")
