"`tools/course.py` as a learner runs it: bundled data, an own file, and every way of giving it the wrong thing"
import json, os, random, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
import pytest
from ftcourse import corpora

root = Path(__file__).resolve().parent.parent
COURSE = root/"tools"/"course.py"
TINY = dict(FTCOURSE_TRAIN_ROWS="24", FTCOURSE_TEST_ROWS="6", FTCOURSE_VALID_ROWS="6", FTCOURSE_MAX_NEW_TOKENS="8",
            FTCOURSE_SHOTS="2", FTCOURSE_PLAIN="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
pytest.importorskip("nbformat")
pytest.importorskip("matplotlib")


def surroundings(**more):
    keep = {k: v for k, v in os.environ.items() if not k.startswith("FTCOURSE_") or k == "FTCOURSE_CACHE"}
    return {**keep, **TINY, **{k: str(v) for k, v in more.items()}}


def course(runs, *args, **env):
    return subprocess.run([sys.executable, str(COURSE), "--profile", "test", *args], capture_output=True, text=True, timeout=300,
                          env=surroundings(FTCOURSE_RUNS=runs, **env), cwd=runs)


def own_file(folder, head="mail_text;queue", n=60, name="mails.csv"):
    "A shop's export: 60 messages in four queues, semicolons, a byte-order mark, Windows line ends"
    rows = [r for r in corpora.load("desk", "train") if r["task"] == "route"]
    queues = sorted({r["output"] for r in rows})[:4]
    rows = [r for r in rows if r["output"] in queues]
    random.Random(0).shuffle(rows)
    cell = lambda t: '"' + t.replace('"', '""') + '"'
    text = "\r\n".join([head, *(f"{cell(r['input'])};{cell(r['output'])}" for r in rows[:n])])
    (folder/name).write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    return folder/name


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    d = tmp_path_factory.mktemp("desk")
    return d, course(d)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    d = tmp_path_factory.mktemp("own")
    own_file(d)
    return d, course(d, "--data", str(d/"mails.csv"), "--input", "mail_text", "--output", "queue")


BOTH = [("desk", "desk"), ("own", "mails")]

@pytest.fixture(params=BOTH, ids=lambda p: p[0])
def ran(request):
    d, r = request.getfixturevalue(request.param[0])
    assert r.returncode == 0, r.stdout[-1500:] + r.stderr[-1500:]
    return d/request.param[1], r


# ---------- runs that succeed

def test_it_says_what_it_does_and_where_the_report_is(ran):
    folder, r = ran
    said = re.findall(r"^── (.*?)  \(\d+ s\)$", r.stdout, re.M)
    assert said[0] == "The question" and said[-1] == "The report" and len(said) >= 6
    assert f"Open the report: {folder.resolve()/'report.html'}" in r.stdout and "Traceback" not in r.stdout + r.stderr
    assert "tokens/s" in r.stdout and "peak memory" in r.stdout and "training: " in r.stderr


def test_scores_json_has_the_schema(ran):
    folder, _ = ran
    s = json.loads((folder/"scores.json").read_text(encoding="utf-8"))
    assert {"zero-shot", "2-shot", "tuned"} <= set(s["systems"])
    assert len({tuple(m) for m in s["systems"].values()}) == 1
    for metrics in s["systems"].values():
        assert metrics
        for name, m in metrics.items():
            assert {"value", "low", "high", "signature"} <= set(m) and m["signature"]
            assert 0 <= m["low"] <= m["value"] <= m["high"] <= 100, (name, m)
    t = s["train"]
    assert t["rows"] == 24 and all(t[k] > 0 for k in ("tokens_per_s", "seconds", "peak_bytes", "adapter_bytes", "tokens"))
    assert t["tokens_per_s"] == pytest.approx(t["tokens"]/t["seconds"], rel=.01)
    assert t["peak_bytes"] > 200e6 and t["request_tokens"]["tuned"] < t["request_tokens"]["2-shot"]


def test_adapter_beside_it(ran):
    folder, _ = ran
    s = json.loads((folder/"scores.json").read_text(encoding="utf-8"))
    files = list((folder/"adapter").iterdir())
    assert {f.name for f in files} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(f.stat().st_size for f in files) == s["train"]["adapter_bytes"]
    assert not [f for f in folder.rglob("*") if f.name.endswith(".tmp")]


class Page(HTMLParser):
    "What a page would load or run"
    def __init__(self, text): super().__init__(); self.loads, self.bad, self.text = [], [], ""; self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag in ("script", "iframe", "object", "embed", "base"): self.bad.append(tag)
        self.bad += [k for k in a if k.startswith("on")]
        self.loads += [v for k, v in a.items() if k in ("src", "srcset", "data", "poster") or k == "href" and tag in ("link", "image", "use")]
        if tag == "a" and (a.get("href") or "").strip().lower().startswith(("javascript:", "data:")): self.bad.append(a["href"])
    def handle_data(self, data): self.text += data


def test_the_report_stands_alone(ran):
    page = (ran[0]/"report.html").read_text(encoding="utf-8")
    p = Page(page)
    assert not p.bad and all(v.startswith(("data:", "#")) for v in p.loads)
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:|#)", page)
    assert "tuned" in p.text and "zero-shot" in p.text and len(page) < 3_000_000


def test_no_path_of_this_machine_in_what_is_shared(ran):
    folder, _ = ran
    for f in ("report.html", "scores.json"):
        text = (folder/f).read_text(encoding="utf-8")
        for p in (str(folder), str(folder.parent), str(root), str(Path.home()), "/tmp/"): assert p not in text, f"{p} in {f}"


def test_own_columns_are_a_label_task(own):
    d, r = own
    assert r.returncode == 0, r.stderr[-800:]
    s = json.loads((d/"mails"/"scores.json").read_text(encoding="utf-8"))
    assert any("f1" in m.lower() or "accuracy" in m.lower() for m in s["systems"]["tuned"])


# ---------- runs that must stop with a sentence

def split_file(f, rows): f.write_text("question,answer,split\n" + "".join(f"{a},{b},{s}\n" for a, b, s in rows)); return f

def cases(d):
    "name → (arguments, environment, words that the sentence holds)"
    def put(name, data): (d/name).write_bytes(data if isinstance(data, bytes) else data.encode()); return str(d/name)
    words = "tent boot sack coat lamp stove rope map hat sock".split()
    good = [(f"{a} {b} please", f"Here is the {a} with {b}", "train") for a in words for b in words[:4]]
    yes_no = [(q, "yes" if i % 2 else "no", s) for i, (q, _, s) in enumerate(good)]
    tests = [(f"any {w} left", f"No {w}", "test") for w in words]
    return {
        "no such file": (["--data", str(d/"nowhere.csv")], {}, ["nowhere.csv"]),
        "no such corpus": (["--data", "dsk"], {}, ["'dsk'", "desk, desk_threads, e2e, banking77, legal"]),
        "empty": (["--data", put("empty.csv", "")], {}, ["empty.csv is empty"]),
        "header only": (["--data", put("head.csv", "question,answer\n")], {}, ["head.csv", "no rows"]),
        "no answer": (["--data", put("gap.csv", "question,answer\na,b\nc,\n")], {}, ["row 3", "empty"]),
        "mixed columns": (["--data", put("mix.jsonl", '{"input":"a","output":"b"}\n{"q":"a","output":"b"}\n')], {}, ["row 2", "mixed columns"]),
        "not utf-8": (["--data", put("latin.csv", "question,answer\nGröße,1\n".encode("latin-1"))], {}, ["line 2", "not UTF-8"]),
        "cut json": (["--data", put("cut.json", '[{"input": "a"')], {}, ["cut.json", "not JSON"]),
        "spreadsheet": (["--data", put("mails.xlsx", b"PK\x03\x04")], {}, [".xlsx"]),
        "unknown columns": (["--data", str(own_file(d, name="odd.csv"))], {}, ["mail_text, queue", "INPUT="]),
        "misspelt column": (["--data", str(d/"odd.csv"), "--input", "mail", "--output", "queue"], {}, ["no column 'mail'"]),
        "too few rows": (["--data", put("few.csv", "question,answer\na,b\nc,d\n")], {}, ["too few"]),
        "label unseen": (["--data", str(split_file(d/"unseen.csv", yes_no + [("any left", "maybe", "test")]))], {}, ["'maybe'", "never occurs in training"]),
        "a leak": (["--data", str(split_file(d/"leak.csv", good + [(good[0][0].upper(), "x y z", "test")]))], {}, ["stands in training too"]),
        "only training rows": (["--data", str(split_file(d/"onlytrain.csv", good))], {}, ["test"]),
        "unknown profile": (["--profile", "gpu"], {}, ["No profile 'gpu'"]),
        "unknown setting": ([], {"FTCOURSE_EPOCHS": "two"}, ["epochs = 'two'"]),
        "unknown model": ([], {"FTCOURSE_MODEL": "SmolLM9"}, ["SmolLM9", "SmolLM2-135M-Instruct"]),
        "hub model, no network": ([], {"FTCOURSE_MODEL": "Qwen3-0.6B"}, ["Qwen/Qwen3-0.6B", "network"]),
        "corpus that is nowhere": (["--data", "e2e"], {"FTCOURSE_CACHE": str(d/"cache"), "FTCOURSE_DATA": str(d)}, ["e2e", "FTCOURSE_DATA"]),
        "long training row": (["--data", str(split_file(d/"long.csv", [*good, ("word "*50_000, "too long", "train")] + tests))], {}, ["tokens", "max_length"]),
        "long test row": (["--data", str(split_file(d/"longtest.csv", [*good, *tests, ("word "*50_000, "too long", "test")]))],
                          {"FTCOURSE_TEST_ROWS": "0"}, ["tokens", "max_length"]),
    }


FORKS = """
import json, os, resource, runpy, signal, sys
course, todo, out = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3]
import matplotlib, nbformat, ftcourse.corpora, ftcourse.evaluation, ftcourse.formats, ftcourse.lora, ftcourse.prompting, ftcourse.training
for i, (args, env) in enumerate(todo):
    pid = os.fork()   # one import of the libraries for all of them
    if not pid:
        os.setpgrp(); signal.alarm(60)
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))   # what goes wrong here shall not take the machine with it
        fd = os.open(f"{out}/{i}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(fd, 1); os.dup2(fd, 2)
        os.environ.update(env)
        sys.argv = [course, "--profile", "test", *args]
        code = 0
        try: runpy.run_path(course, run_name="__main__")
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1 if e.code else 0
            if isinstance(e.code, str): sys.stderr.write(e.code + "\\n")
        except BaseException:
            import traceback
            traceback.print_exc(); code = 1
        sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
    print(i, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "Every case in a process of its own: name → (exit code, what it said)"
    if not hasattr(os, "fork"): pytest.skip("needs fork")
    d = tmp_path_factory.mktemp("bad")
    todo = cases(d)
    (d/"todo.json").write_text(json.dumps([(a, e) for a, e, _ in todo.values()]))
    r = subprocess.run([sys.executable, "-c", FORKS, str(COURSE), str(d/"todo.json"), str(d)], capture_output=True, text=True,
                       env=surroundings(FTCOURSE_RUNS=d/"runs"))
    codes = dict(map(int, l.split()) for l in r.stdout.splitlines())
    assert len(codes) == len(todo), r.stderr[-2000:]
    return d, {n: (codes[i], (d/f"{i}.txt").read_text()) for i, n in enumerate(todo)}, {n: w for n, (_, _, w) in todo.items()}


@pytest.mark.parametrize("case", [
    "no such file", "no such corpus", "empty", "header only", "no answer", "mixed columns", "not utf-8", "cut json", "spreadsheet",
    "unknown columns", "misspelt column", "too few rows", "label unseen", "a leak", "only training rows", "unknown profile",
    "unknown setting", "unknown model", "hub model, no network", "corpus that is nowhere", "long training row", "long test row"])
def test_bad_input_is_one_sentence_and_no_training(stopped, case):
    d, said, wanted = stopped
    code, text = said[case]
    assert code > 0 and "Traceback" not in text, text[-1500:]
    last = text[text.index("Stopped: "):]
    assert all(w in last for w in wanted[case]), last[:600]
    assert len(last.strip().splitlines()) == 2 and len(last) < 700, last[:900]   # the sentence, and how to see more
    assert "training:" not in text and not list((d/"runs").glob("*"))


@pytest.mark.parametrize("case", ["long training row", "long test row", "no answer", "label unseen"])
def test_bad_rows_are_found_before_the_model_is_asked(stopped, case):
    "Not after minutes of prompting"
    assert "answering" not in stopped[1][case][1] and "shots: " not in stopped[1][case][1]


def test_help(tmp_path):
    r = course(tmp_path, "--help")
    assert r.returncode == 0 and all(w in r.stdout for w in ("--data", "--input", "--output", "--instruction", "--profile"))


def test_an_interruption_is_a_sentence(tmp_path):
    code = ("import runpy, sys, nbformat\n"
            "def stop(*a, **k): raise KeyboardInterrupt\n"
            "nbformat.read = stop\nsys.argv = ['course.py']\nrunpy.run_path(" + repr(str(COURSE)) + ", run_name='__main__')")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=surroundings(FTCOURSE_RUNS=tmp_path))
    assert r.returncode == 1 and "Stopped. Nothing half-written is left" in r.stderr and "Traceback" not in r.stderr
