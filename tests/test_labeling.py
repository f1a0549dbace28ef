"Lesson 05b: config and tasks out, every kind of export in, majority and log; real exports of a Label Studio server; the tool that runs it"
import json, os, random, signal, subprocess, sys, time
import xml.etree.ElementTree as ET
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import labelstudio  # noqa: E402
from ftcourse.formats import read as read_rows  # noqa: E402
from ftcourse.labeling import FLAG, Labeling, disagreements, majority, ratings, row_ids  # noqa: E402

SERVER = ROOT/"tests"/"labelstudio"
LABELS = ["Till", "Lookout", 'Q&A "fast"', "<b>Porch</b>"]


def row(text="Where is my refund?", output="Till", **more): return dict(instruction="Name the queue.", input=text, output=output, task="route", **more)


def entry(label, name="label"): return dict(from_name=name, to_name="input", type="choices", value={"choices": [label]})


def exported(work, said, **change):
    "An export in which person `n` said `said[n]`, one label a row or None"
    return [dict(id=40 + i, annotations=[{**dict(id=10*i + n, completed_by=n, result=[] if x[i] is None else [entry(x[i])], was_cancelled=x[i] is None,
                                                 updated_at=f"2026-01-0{n}T00:00:00Z", lead_time=2.), **change} for n, x in said.items()], **t)
            for i, t in enumerate(work.tasks())]


# Names of rows

@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["x", "y", "", "x\ny"]), st.sampled_from("pq")), min_size=1, max_size=12), st.randoms())
@settings(max_examples=60, deadline=None)
def test_names_are_unique_and_survive_sorting(triples, rnd):
    rows = [dict(zip(("instruction", "input", "output"), t)) for t in triples]
    ids = row_ids(rows)
    assert len(set(ids)) == len(rows)
    mixed = rows[:]; rnd.shuffle(mixed)
    assert sorted(ids) == sorted(row_ids(mixed))
    by_text = {}
    for r, x in zip(rows, ids): by_text.setdefault(x.split("-")[0], set()).add(tuple(r.values()))
    assert all(len(v) == 1 for v in by_text.values())


def test_a_field_cannot_slip_into_another():
    assert len(set(row_ids([dict(instruction="a", input="b c", output="d"), dict(instruction="a b", input="c", output="d")]))) == 2


# What goes out

@given(st.lists(st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zs", "Zl", "Zp", "Cn")), min_size=1).filter(lambda s: s[0] != "$" and s != FLAG),
                min_size=1, max_size=5, unique=True))
@settings(max_examples=100, deadline=None)
def test_any_label_survives_xml(labels):
    try: work = Labeling([row()], labels)
    except ValueError as e: assert "control" in str(e); return
    page = ET.fromstring(work.config())
    assert [c.get("value") for c in page.iter("Choice")] == [*labels, FLAG]


@pytest.mark.parametrize("work", [Labeling([row()], LABELS), Labeling([row()], []), Labeling([row()], [f"label {i}" for i in range(77)])], ids=["labels", "answers", "many"])
def test_page_asks_only_of_what_it_shows(work):
    page = ET.fromstring(work.config())
    shown = {t.get("name"): t.get("value")[1:] for t in page.iter("Text")}
    asks = [t for t in page if t.get("toName")]
    assert asks and {t.get("toName") for t in asks} <= set(shown) and len({t.get("name") for t in asks}) == len(asks)
    needs = {*shown.values(), *(t.get("value")[1:] for t in page.iter("TextArea"))}
    assert all(needs <= set(t["data"]) for t in work.tasks())
    assert "HyperText" not in work.config()
    assert [t.get("layout") for t in page.iter("Choices")][0] == {1: None, 4: "inline", 77: "select"}[len(work.labels) or 1]


def test_labels_are_found_or_given():
    assert Labeling([row(output=x) for x in "ab"*8]).labels == ["a", "b"]
    assert Labeling([row(output=f"A long answer number {i}") for i in range(9)]).labels == []


def test_no_peeking_unless_asked():
    work = Labeling([row(), row("x", "not a label of ours")], LABELS)
    assert not any("output" in t["data"] or "predictions" in t for t in work.tasks()) and '"Till"' not in json.dumps(work.tasks())
    shown = work.tasks(predictions=True)
    assert shown[0]["predictions"][0]["result"][0]["value"] == {"choices": ["Till"]} and "predictions" not in shown[1]


def test_files_are_whole(tmp_path, monkeypatch):
    work = Labeling([row("你好 🙂 <script>")], LABELS)
    out = work.write(tmp_path/"new"/"folder")
    assert json.loads((out/"tasks.json").read_text(encoding="utf-8")) == work.tasks() and (out/"config.xml").read_text() == work.config()
    assert sorted(p.name for p in out.iterdir()) == ["config.xml", "tasks.json"]
    before = (out/"tasks.json").read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"): Labeling([row("other")], LABELS).write(out)
    assert (out/"tasks.json").read_bytes() == before and sorted(p.name for p in out.iterdir()) == ["config.xml", "tasks.json"]


@pytest.mark.parametrize("rows, labels, says", [
    ([], None, "no rows to label"), ([row()], ["a", "a"], "stands twice"), ([row()], ["a "], "spaces around"), ([row()], ["a\nb"], "line break"), ([row()], ["a\x07"], "control"),
    ([row()], [""], "is no text"), ([row()], [3], "is no text"), ([row()], ["$x"], "name of a column"), ([row()], [FLAG], "give yours another name"),
    ([row(), row(None)], LABELS, "row 1: 'input' is None"), ([row(["a"])], LABELS, "row 0: 'input' is"), ([row("a\0b")], LABELS, "row 0: 'input' holds"),
    ([row("\ud83d")], LABELS, "row 0: 'input' holds"), ([dict(input="x", output="y")], LABELS, "'instruction' is None")])
def test_bad_rows_and_labels(rows, labels, says):
    with pytest.raises(ValueError, match=says): Labeling(rows, labels)


# What comes back

@pytest.fixture
def work(): return Labeling([row(f"message {i}", LABELS[i % 4]) for i in range(6)], LABELS)


def test_round_trip_shuffled(work):
    said = {1: [LABELS[0]]*6, 2: [LABELS[i % 2] for i in range(5)] + [None]}
    tasks = json.loads(json.dumps(exported(work, said)))
    random.Random(0).shuffle(tasks)
    back = work.read(tasks, {1: "anna"})
    assert [(a.row, a.annotator, a.value) for a in back] == [(i, who, x[i]) for i in range(6) for who, x in (("anna", said[1]), ("user 2", said[2]))]


def test_rows_in_another_order_take_the_same_answers(work):
    tasks = exported(work, {1: [LABELS[(i + 1) % 4] for i in range(6)]})
    other = Labeling(work.rows[::-1], LABELS)
    assert sorted(other.merge(other.read(tasks)).rows["output"]) == sorted(work.merge(work.read(tasks)).rows["output"])
    assert {(r["input"], r["output"]) for r in other.merge(other.read(tasks)).rows} == {(r["input"], r["output"]) for r in work.merge(work.read(tasks)).rows}


@pytest.mark.parametrize("by, names, who", [(7, None, "user 7"), (7, {7: "anna"}, "anna"), ({"id": 3, "email": "b@example.org"}, None, "b@example.org"),
    ({"id": 3, "email": "b@example.org"}, {"b@example.org": "ben"}, "ben"), ("c@example.org", None, "c@example.org"), ({"id": 3}, {3: "ben"}, "ben")])
def test_annotators(work, by, names, who):
    tasks = exported(work, {1: [LABELS[0]]*6}, completed_by=by)
    assert {a.annotator for a in work.read(tasks, names)} == {who}


def test_the_later_word_counts(work):
    tasks = exported(work, {1: [LABELS[0]]*6, 2: [LABELS[1]]*6}, completed_by=1)
    for order in (1, -1):
        for t in tasks: t["annotations"] = t["annotations"][::order]
        assert {a.value for a in work.read(tasks)} == {LABELS[1]}


def spoil(work, **change): return exported(work, {1: [LABELS[0]]*6}, **change)[:1]


@pytest.mark.parametrize("change, says", [
    (dict(result=[entry("Tills")]), "task 40, annotation 1: the label 'Tills' is none of Till, Lookout"), (dict(result=[entry("Till", "mood")]), "ignore=.'mood'"),
    (dict(result=[{**entry("x"), "value": {"choices": ["Till", "Lookout"]}}]), "'label' has 2 answers"), (dict(result=[entry("Till"), entry("Lookout")]), "answered twice"),
    (dict(result=[]), "no 'label' among the answers .there are none"), (dict(result=None), "no 'label'"), (dict(result=[{**entry("x"), "value": {}}]), "no 'label'"),
    (dict(completed_by=None), "nobody knows who said it"), (dict(result=[{"type": "relation", "from_id": "a"}]), "has a control 'None'")])
def test_bad_annotations(work, change, says):
    with pytest.raises(ValueError, match=says): work.read(spoil(work, **change))


def test_bad_annotations_that_were_skipped_are_skipped(work):
    assert [a.value for a in work.read(spoil(work, was_cancelled=True, result=[]))] == [None]
    assert [a.value for a in work.read(spoil(work, was_cancelled=True))] == [None], "a label that was chosen before the skip is no vote"


def test_added_controls_may_be_ignored(work):
    more = spoil(work, result=[entry("Till"), dict(from_name="notes", to_name="input", type="textarea", value={"text": ["hm", "ha"]})])
    with pytest.raises(ValueError, match="notes"): work.read(more)
    assert [a.value for a in work.read(more, ignore=["notes"])] == ["Till"]


@pytest.mark.parametrize("text, says", [("[{]", "line 1, column 3: not JSON"), ('{"a": 1}', "a dict, not a list"), ('[{"data": {"row": "x"}}]', "what goes in, not what comes out"),
    ("[7]", "task 0 is neither"), ('[{"id": 5, "data": {"row": "x"}, "annotations": []}]', "task 5: no row here is called 'x'"),
    ('[{"id": 5, "data": {}, "annotations": []}]', "no row here is called None"), ('[{"id": 6, "annotation_id": 1, "annotator": 1, "label": "Till"}]', "task 6, annotation 1: no row here")])
def test_bad_files(work, tmp_path, text, says):
    (tmp_path/"export.json").write_text(text)
    with pytest.raises(ValueError, match=says): work.read(tmp_path/"export.json")


def test_an_answer_about_a_row_that_was_changed_since_is_refused(work):
    tasks = exported(work, {1: [LABELS[0]]*6})
    changed = Labeling([{**r, "input": r["input"] + "!"} for r in work.rows], LABELS)
    with pytest.raises(ValueError, match="were the rows changed"): changed.read(tasks)


def test_answers_improved():
    work = Labeling([dict(instruction="Answer.", input=f"q{i}", output=f"A{i}") for i in range(3)], [])
    def said(text, stars=None, flag=None):
        found = [dict(from_name="answer", value={"text": text}), dict(from_name="quality", value={"rating": stars}), dict(from_name="flag", value={"choices": [flag]})]
        return [f for f, v in zip(found, (text, stars, flag)) if v is not None]
    def export(*results): return [dict(id=i, annotations=[dict(id=i, completed_by=1, result=r)], **t) for i, (r, t) in enumerate(zip(results, work.tasks()))]
    back = work.read(export(said(["A0"], 5), said("Better\nanswer 🙂", 2), said(None, None, FLAG)))
    assert [(a.value, a.quality) for a in back] == [("A0", 5), ("Better\nanswer 🙂", 2), (FLAG, None)]
    merged = work.merge(back)
    assert merged.rows["output"] == ["A0", "Better\nanswer 🙂"] and [e["action"] for e in merged.log] == ["changed", "dropped"]
    for bad, says in ((said([" "]), "no 'answer'"), (said([""]), "no 'answer'"), (said(["a", "b"]), "has 2 answers")):
        with pytest.raises(ValueError, match=says): work.read(export(bad))


# Together

VOTES = st.lists(st.lists(st.sampled_from([*LABELS, FLAG, None]), min_size=6, max_size=6), min_size=1, max_size=5)

@given(VOTES, st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_majority_merge_and_log_agree(said, least):
    work = Labeling([row(f"message {i}", LABELS[i % 4]) for i in range(6)], LABELS)
    back = work.read(exported(work, dict(enumerate(said, 1))))
    for v in majority(back, least):
        votes = [x[v.row] for x in said if x[v.row] is not None]
        assert sorted(map(str, v.votes.values())) == sorted(votes)
        best = [w for w in set(votes) if votes.count(w) >= least and all(votes.count(w) > votes.count(o) for o in set(votes) - {w})]
        assert ([v.value] if v.value else []) == best and v.tied == (bool(votes) and not best)
        assert len(v.dissent) == (sum(x != v.value for x in votes) if best else 0)
    kept, thinned = work.merge(back, "keep", least), work.merge(back, "drop", least)
    assert kept.log and {e["row"] for e in kept.log} == {e["row"] for e in thinned.log} or not kept.log and not thinned.log
    assert len(kept.rows) + kept.count("dropped") == 6 and thinned.count("tied") == 0 and len(thinned.rows) == len(kept.rows) - kept.count("tied")
    after = {r["input"]: r["output"] for r in kept.rows}
    for i, r in enumerate(work.rows):   # nothing changes without a record, and each record tells the truth
        e = next((e for e in kept.log if e["row"] == i), None)
        assert after.get(r["input"]) == (r["output"] if e is None else e["after"])
        if e: assert e["before"] == r["output"] and (e["action"] == "changed") == (e["after"] not in (None, r["output"])) and e["id"] == work.ids[i]


def test_nobody_looked(work):
    merged = work.merge([])
    assert merged.rows["output"] == [r["output"] for r in work.rows] and merged.log == []
    with pytest.raises(ValueError, match="choose one of keep, drop"): work.merge([], "toss")


def test_stale_columns_stay_behind():
    work = Labeling([row(references=["Till"], facts=[])], LABELS)
    assert work.merge([]).rows.column_names == ["instruction", "input", "output", "task"]


def test_all_rows_dropped_is_an_empty_set(work):
    gone = work.merge(work.read(exported(work, {1: [FLAG]*6})))
    assert len(gone.rows) == 0 and gone.count("dropped") == 6


def test_merged_files_are_read_by_lesson_04(work, tmp_path):
    out = work.merge(work.read(exported(work, {1: [LABELS[2]]*6}))).write(tmp_path/"done")
    assert read_rows(out/"train.json")["output"] == [LABELS[2]]*6
    log = json.loads((out/"log.json").read_text(encoding="utf-8"))
    assert len(log) == 5 and log[0]["votes"] == {"user 1": LABELS[2]}


def test_disagreements_name_rows_and_words(work):
    back = work.read(exported(work, {1: [LABELS[0]]*6, 2: [LABELS[0], LABELS[1], LABELS[1], LABELS[0], None, FLAG]}), {1: "anna", 2: "ben"})
    d, = disagreements(back)
    assert d == dict(first="anna", second="ben", both=5, differ=3, rows=[1, 2, 5], often=[(("Lookout", "Till"), 2), (("Till", FLAG), 1)])


def test_agreement_equals_the_libraries():
    "`ratings` into lesson 08b's coefficients, and those against scikit-learn, statsmodels and krippendorff"
    import krippendorff, numpy as np
    from sklearn.metrics import cohen_kappa_score
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa as theirs
    from ftcourse.rating import cohen_kappa, fleiss_kappa, krippendorff_alpha
    rng = random.Random(1)
    work = Labeling([row(f"message {i}", "Till") for i in range(60)], LABELS)
    said = {n: [rng.choice(LABELS) if rng.random() < .3 else LABELS[i % 4] for i in range(60)] for n in (1, 2, 3)}
    r, quick = ratings(work.read(exported(work, said))), dict(resamples=10)
    codes = np.array([[LABELS.index(x) for x in said[n]] for n in said])
    assert cohen_kappa(said[1], said[2], **quick).value == pytest.approx(cohen_kappa_score(said[1], said[2]), abs=1e-12)
    assert fleiss_kappa(r, **quick).value == pytest.approx(theirs(aggregate_raters(codes.T)[0]), abs=1e-12)
    said[3][:20] = [None]*20
    holes = ratings(work.read(exported(work, said)))
    codes = codes.astype(float); codes[2, :20] = np.nan
    assert len(holes) == 160 and krippendorff_alpha(holes, **quick).value == pytest.approx(krippendorff.alpha(codes, level_of_measurement="nominal"), abs=1e-12)


# A real server's exports (`python tools/labelstudio.py --save` wrote them)

def real():
    import importlib.util
    spec = importlib.util.spec_from_file_location("test_server", SERVER/"test_server.py")
    m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
    return m


def persons(tasks): return dict(zip(sorted({a["completed_by"] for t in tasks for a in t["annotations"]}), ("anna", "ben")))


def test_real_export_of_labels():
    m, tasks = real(), json.loads((SERVER/"route.json").read_text(encoding="utf-8"))
    work = Labeling(m.ROWS, m.LABELS)
    back = work.read(SERVER/"route.json", persons(tasks))
    assert {(a.row, a.annotator): a.value for a in back} == {(i, n): x for n, xs in m.SAID.items() for i, x in enumerate(xs) if x != "-"}
    flat = work.read(SERVER/"route_min.json", persons(tasks))
    assert [a for a in back if a.value is not None and (a.row, a.annotator, a.value, a.at) not in {(b.row, b.annotator, b.value, b.at) for b in flat}] == []
    assert len(flat) == sum(a.value is not None for a in back)
    assert work.merge(back).rows.to_list() == [{**r, "output": o} for r, o in zip([r for i, r in enumerate(m.ROWS) if i != 5],
        ["Till", "Lookout", "Lookout", 'Q&A "fast"', "Till", "Lookout", "Till", "Till"])]


def test_real_export_of_answers():
    m, tasks = real(), json.loads((SERVER/"answers.json").read_text(encoding="utf-8"))
    work = Labeling(m.ANSWERS, [])
    for name in ("answers.json", "answers_min.json"):
        back = work.read(SERVER/name, persons(tasks))
        assert [(a.row, a.annotator, a.quality) for a in back] == [(0, "anna", 5), (1, "anna", 2), (1, "ben", 3), (2, "ben", 1)] and back[3].value == FLAG
        assert back[1].value == back[2].value == 'Better: "yes" & <b>no</b>\nfor 40 days.'


def test_real_export_of_answers_given_by_hand():
    "What a person did on the page in a browser: one prediction changed, one left, one row not seen"
    m, tasks = real(), json.loads((SERVER/"by_hand.json").read_text(encoding="utf-8"))
    work = Labeling(m.ROWS[:3], m.LABELS)
    assert [(a.row, a.value) for a in work.read(tasks)] == [(0, m.LABELS[3]), (1, "Till")] and work.read(tasks)[0].seconds > 0
    assert [e["action"] for e in work.merge(work.read(tasks)).log] == ["changed"]


def test_our_pretence_has_what_a_real_annotation_has(work):
    real_one = json.loads((SERVER/"route.json").read_text(encoding="utf-8"))[0]
    ours = exported(work, {1: [LABELS[0]]*6})[0]
    assert set(ours) <= set(real_one) and set(ours["annotations"][0]) <= set(real_one["annotations"][0])
    assert set(ours["annotations"][0]["result"][0]) <= set(real_one["annotations"][0]["result"][0])


def test_server_tests_run_when_asked_for_only():
    from types import SimpleNamespace
    import conftest
    def left_out(path, *args): return bool(conftest.pytest_ignore_collect(ROOT/path, SimpleNamespace(args=args)))
    server = "tests/labelstudio/test_server.py"
    assert left_out(server, "tests") and left_out(server, str(ROOT/"tests")) and left_out(server, "tests/test_labeling.py")
    assert not left_out(server, "tests/labelstudio") and not left_out(server, f"{ROOT/server}::test_tokens") and not left_out("tests/test_labeling.py", "tests")


# The tool, with a program that plays the server

PLAYS = """#!{python}
import http.server, json, sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{{"status": "UP"}}')
    def log_message(self, *a): pass
assert sys.argv[sys.argv.index("--internal-host") + 1] == "127.0.0.1"
{before}
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), H).serve_forever()
"""


def fake(folder, before=""):
    (folder/"bin").mkdir(parents=True); (folder/"empty").mkdir()
    (folder/"bin/label-studio").write_text(PLAYS.format(python=sys.executable, before=before)); (folder/"bin/label-studio").chmod(0o755)
    return folder


def gone(url, seconds=5):
    end = time.time() + seconds
    while time.time() < end:
        try: labelstudio.Client(url).call("GET", "/health")
        except OSError: return True
        time.sleep(.05)


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")


def test_server_ends_with_the_block(tmp_path):
    with pytest.raises(KeyError, match="on the way"):
        with labelstudio.server(fake(tmp_path/"venv")) as who:
            assert labelstudio.Client(who["url"]).call("GET", "/health")["status"] == "UP" and not gone(who["url"], .2)
            raise KeyError("on the way")
    assert gone(who["url"])


def test_server_that_ignores_the_request_to_end(tmp_path, monkeypatch):
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    real_wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", lambda self, timeout=None: real_wait(self, timeout and .5))
    with labelstudio.server(fake(tmp_path/"venv", deaf)) as who: pass
    assert gone(who["url"])


@needs_linux
def test_server_ends_even_if_the_tool_is_killed(tmp_path):
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT/'tools')!r}); import labelstudio, pathlib\n"
            f"with labelstudio.server(pathlib.Path({str(fake(tmp_path/'venv'))!r})) as who: print(who['url'], flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as p:
        url = p.stdout.readline().strip()
        assert url.startswith("http") and not gone(url, .2)
        p.send_signal(signal.SIGKILL)
    assert gone(url)


def test_server_that_dies_says_why(tmp_path):
    with pytest.raises(labelstudio.Stop, match=r"ended with 3(.|\n)*out of luck"):
        with labelstudio.server(fake(tmp_path/"venv", "print('out of luck', flush=True); sys.exit(3)")): pass


def test_server_that_never_comes_up(tmp_path):
    with pytest.raises(labelstudio.Stop, match="was not up after 1 s"):
        with labelstudio.server(fake(tmp_path/"venv", "import time; time.sleep(60)"), seconds=1): pass


def test_nothing_is_sent_out():
    env = labelstudio.environment("somewhere")
    assert env["COLLECT_ANALYTICS"] == env["LATEST_VERSION_CHECK"] == "0" and env["SENTRY_DSN"] == "" and env["HTTPS_PROXY"].startswith("http://127.0.0.1")
    assert not [k for k in env if k.startswith(("PYTHON", "FTCOURSE"))]


def test_full_disk_stops_the_install(tmp_path, monkeypatch):
    import collections, shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda p: collections.namedtuple("u", "total used free")(9e9, 8e9, 1e9))
    with pytest.raises(labelstudio.Stop, match="3 GB of disk"): labelstudio.install(tmp_path/"venv")
    assert not (tmp_path/"venv").exists()


def test_ready_environment_is_not_made_again(tmp_path, monkeypatch):
    import hashlib
    want = hashlib.sha256(repr((labelstudio.PIN, sys.version_info[:2], str(tmp_path))).encode()).hexdigest()
    (tmp_path/".stamp").write_text(want)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran something"))
    assert labelstudio.install(tmp_path) == 0
