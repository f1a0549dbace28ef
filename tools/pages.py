"""Build the site without Quarto: nbdev prepares the lessons in _proc, smalldocs makes pages of them.

    python tools/pages.py   # then open _proc/_docs/index.html
"""
import os, re, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What only real Quarto reads in the same files; anything else that smalldocs says is news
KNOWN = re.compile(r"(warning: )?(unknown key format-links|execute\.enabled is ignored|format commonmark is not built"
                   r"|format\.html\.html-math-method is ignored|nbs/[\w/]+\.ipynb: output-file is not read)")


def run(command, root, **env):
    "Run one of the tools beside this Python, in `root`"
    tool = str(Path(sys.executable).with_name(command[0]))
    p = subprocess.run([tool, *command[1:]], cwd=root, env={**os.environ, **env}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if p.returncode: sys.exit(f"{' '.join(command)} failed:\n{(p.stdout + p.stderr)[-3000:]}")
    return p.stdout + p.stderr


def build(root=ROOT):
    "The folder with the finished site of the repository at `root`"
    with tempfile.TemporaryDirectory() as tmp:  # nbdev would go and install Quarto where it finds none; a stand-in says there is one
        path = os.environ.get("PATH", os.defpath)
        if not shutil.which("quarto"):
            (Path(tmp)/"quarto").write_text("#!/bin/sh\nexit 0\n")
            (Path(tmp)/"quarto").chmod(0o755)
            path = tmp + os.pathsep + path
        run(["nbdev-proc-nbs", "--force"], root, PATH=path)
    shutil.rmtree(root/"_proc/_docs", ignore_errors=True)
    for line in run(["smalldocs", "render", "_proc"], root).strip().splitlines():
        if not KNOWN.match(line): print(line)
    return root/"_proc/_docs"


def main(): print(f"The site is built; open {build()/'index.html'}")


if __name__ == "__main__": main()
