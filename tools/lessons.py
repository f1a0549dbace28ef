"""Run lessons from top to bottom and save what they show.

    python tools/lessons.py                        # every lesson, in order, on this machine's settings
    python tools/lessons.py nbs/09_lora.ipynb      # one of them
    python tools/lessons.py --profile test --check # run without saving: what the tests do
    python tools/lessons.py --flags cuda,slow …    # also the cells that need a GPU, or patience
"""
import argparse, os, re, sys, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

root = Path(__file__).resolve().parent.parent
FLAGS = {"cuda", "slow"}


def directives(cell):
    "The `#|` words at the top of a code cell, such as `export` or `cuda`"
    return set(re.findall(r"^#\|\s*([\w]+)", cell.source, re.M))


def run_lesson(path, profile=None, flags=(), save=True, timeout=None):   # seconds for a cell; None: as long as it takes
    "Execute the notebook at `path`; save it with its outputs, or leave the file alone"
    nb = nbformat.read(path, as_version=4)
    whole = list(nb.cells)
    skip = FLAGS - set(flags)
    def runs(c): return c.cell_type != "code" or not (
        directives(c) & skip or re.search(r"^#\|\s*eval:\s*false", c.source, re.M))
    nb.cells = [c for c in whole if runs(c)]
    if profile: os.environ["FTCOURSE_PROFILE"] = profile
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")   # they name files of this machine
    start = time.time()
    nb.metadata.pop("widgets", None)
    NotebookClient(nb, timeout=timeout, kernel_name="python3", store_widget_state=False,
                   resources={"metadata": {"path": str(Path(path).resolve().parent)}}).execute()
    if save:
        nb.cells = whole
        for c in nb.cells: c.metadata.pop("execution", None)
        tmp = Path(path).with_suffix(".tmp")
        nbformat.write(nb, tmp)
        os.replace(tmp, path)
    return time.time() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("notebooks", nargs="*", type=Path)
    p.add_argument("--profile", help="section of settings.ini, such as cpu or test")
    p.add_argument("--flags", default="", help="also run cells flagged so: cuda,slow")
    p.add_argument("--check", action="store_true", help="run, but don't save")
    a = p.parse_args()
    todo = a.notebooks or sorted(p for p in (root/"nbs").glob("**/*.ipynb") if p.name[0].isdigit() or p.parent.name == "cases")
    for f in todo:
        print(f"{f} …", flush=True)
        try: took = run_lesson(f, a.profile, a.flags.split(","), save=not a.check)
        except CellExecutionError as e:
            sys.exit(f"{f} stopped at an error:\n{e}")
        print(f"{f}: {took:.0f} s, {f.stat().st_size/1e3:.0f} kB", flush=True)


if __name__ == "__main__": main()
