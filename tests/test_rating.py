"Agreement, strengths and correlations against independent libraries; the rating file under every fault; Label Studio there and back"
import json, os, random, signal, sqlite3, subprocess, sys
from itertools import combinations
from pathlib import Path
import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import cohen_kappa_score
from ftcourse import rating
from ftcourse.rating import (Screen, agreement, bradley_terry, cohen_kappa, fleiss_kappa, krippendorff_alpha, new_study, open_study,
                             spearman, told_apart, within_tau)
from humans import ROOT as DATA, needs_e2e

REPO = Path(__file__).resolve().parent.parent
FEW = dict(resamples=50)
LEVELS = ("nominal", "ordinal", "interval")
quick = settings(max_examples=60, deadline=None, derandomize=True)


def long_form(matrix):
    "Rows of a (raters, items) matrix with nan for holes"
    return [dict(rater=f"r{u}", item=i, rating=int(v)) for u, line in enumerate(matrix) for i, v in enumerate(line) if not np.isnan(v)]


@st.composite
def matrices(draw, holes=True):
    raters, items, k = draw(st.integers(2, 5)), draw(st.integers(2, 12)), draw(st.integers(2, 5))
    cell = st.sampled_from([*range(1, k + 1), *([np.nan] if holes else [])])
    return np.array(draw(st.lists(st.lists(cell, min_size=items, max_size=items), min_size=raters, max_size=raters)), float)


# Agreement

@quick
@given(matrices(), st.sampled_from(LEVELS))
def test_alpha_equals_krippendorff(m, level):
    paired = m[:, (~np.isnan(m)).sum(0) >= 2]
    if paired.size == 0 or len(np.unique(paired[~np.isnan(paired)])) < 2 or (~np.isnan(m)).any(1).sum() < 2: return
    ours = krippendorff_alpha(long_form(m), level, **FEW).value
    assert abs(ours - krippendorff.alpha(m, level_of_measurement=level)) < 1e-10


@quick
@given(matrices(holes=False), st.sampled_from(rating.WEIGHTS))
def test_kappa_equals_scikit_learn(m, kind):
    a, b = m[0].astype(int).tolist(), m[1].astype(int).tolist()
    if len(set(a + b)) < 2: return
    ours = cohen_kappa(a, b, kind=kind, **FEW).value
    assert abs(ours - cohen_kappa_score(a, b, weights=None if kind == "none" else kind)) < 1e-10


@quick
@given(matrices(holes=False))
def test_fleiss_equals_statsmodels(m):
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa as theirs
    if len(np.unique(m)) < 2: return
    assert abs(fleiss_kappa(long_form(m), **FEW).value - theirs(aggregate_raters(m.T.astype(int))[0])) < 1e-10


@needs_e2e
@pytest.mark.parametrize("level", LEVELS)
def test_alpha_on_real_ratings(level):
    "Ranks that three people gave the five texts of a screen"
    screens = {}
    for r in real("quality"): screens.setdefault((r["item"], r["rater"]), []).append(r)
    rows = [dict(rater=rater, item=(item, r["system"]), rating=float(k)) for (item, rater), rs in screens.items()
            for r, k in zip(rs, rating.ranks([x["rating"] for x in rs]))]
    t = rating.rating_table(rows)
    m = np.where(t.codes < 0, np.nan, np.array([*t.labels, np.nan])[t.codes])
    ours = krippendorff_alpha(rows, level, **FEW)
    assert abs(ours.value - krippendorff.alpha(m, level_of_measurement=level)) < 1e-10
    assert 0 < ours.low <= ours.value <= ours.high < 1


@quick
@given(matrices())
def test_order_of_raters_and_items_does_not_matter(m):
    rows = long_form(m)
    if len({r["rater"] for r in rows}) < 2: return
    other = [dict(r, rater=r["rater"][::-1], item=-r["item"]) for r in random.Random(1).sample(rows, len(rows))]
    try: a = agreement(rows, **FEW)
    except ValueError:
        with pytest.raises(ValueError): agreement(other, **FEW)
        return
    b = agreement(other, **FEW)
    assert {n: round(s.value, 9) for n, s in a.scores.items()} == {n: round(s.value, 9) for n, s in b.scores.items()}
    assert all(s.value <= 1 + 1e-12 for s in a.scores.values())


def test_perfect_and_opposed():
    a, b = [1, 2, 3, 1, 2, 3], [3, 2, 1, 3, 2, 1]
    rows = long_form(np.array([a, a], float))
    found = agreement(rows)
    assert {n for n, s in found.scores.items() if s.value == 1 and s.low == 1} == set(found.scores) and len(found.scores) == 7
    assert cohen_kappa(a, b, kind="quadratic").value == pytest.approx(-1)


def test_texts_have_no_order_unless_it_is_given():
    words = ["poor", "fair", "good", "excellent"]
    marks = np.random.default_rng(0).integers(0, 4, 60)
    other = np.clip(marks + np.random.default_rng(1).integers(-1, 2, 60), 0, 3)
    a, b = ([words[i] for i in m] for m in (marks, other))
    rows = [dict(rater=r, item=i, rating=v) for r, vs in (("x", a), ("y", b)) for i, v in enumerate(vs)]
    for f in (lambda **k: cohen_kappa(a, b, kind="quadratic", **k), lambda **k: krippendorff_alpha(rows, "ordinal", **k)):
        with pytest.raises(ValueError, match="nobody said in which order"): f()
        assert f(labels=words).value > .6
    assert cohen_kappa(a, b, kind="quadratic", labels=words).value == pytest.approx(cohen_kappa(list(marks), list(other), kind="quadratic").value)
    left = agreement(rows).left_out
    assert set(left) == {"kappa, linear", "kappa, quadratic", "alpha, ordinal"} and not agreement(rows, words).left_out
    with pytest.raises(ValueError, match="row 0: the rating '90' is text"):
        rating.told_apart([dict(rater="x", item=0, thing=t, rating=v) for t, v in (("a", "90"), ("b", "100"))])


def test_groups_widen_the_interval():
    rng = np.random.default_rng(0)
    a = rng.integers(3, size=60)
    b = np.where(rng.random(60) < .7, a, rng.integers(3, size=60))
    rows = [dict(rater=w, item=(i, c), rating=int(v[i])) for w, v in (("x", a), ("y", b)) for i in range(60) for c in range(8)]
    def width(s): return s.high - s.low
    copies = agreement(rows)["kappa"]
    grouped = agreement(rows, groups={r["item"]: r["item"][0] for r in rows})["kappa"]
    truth = cohen_kappa(a.tolist(), b.tolist())
    assert copies.value == pytest.approx(grouped.value) == pytest.approx(truth.value)
    assert width(copies) < .5*width(grouped) and width(grouped) == pytest.approx(width(truth), rel=.2)


def test_who_disagrees_with_whom():
    rng = np.random.default_rng(1)
    a = rng.integers(1, 5, size=80)
    m = np.array([a, a, np.where(rng.random(80) < .5, a, 5 - a)], float)
    found = agreement(long_form(m))
    assert [(p["a"], p["b"]) for p in found.pairs()][-1] == ("r0", "r1") and found.pairs()[-1]["kappa"] == 1
    assert all("r2" in (p["a"], p["b"]) for p in found.pairs()[:2])
    worst = found.disagreements(3)
    assert len(worst) == 3 and all(d["said"]["r0"] == d["said"]["r1"] != d["said"]["r2"] for d in worst)
    ax = found.plot()
    assert ax.get_xlabel() == "rater"


@pytest.mark.parametrize("rows, says", [
    ([], "no ratings"),
    ([dict(rater="a", item=1, rating=float("nan"))], "row 0: the rating of item 1 by 'a' is nan. Leave the row out"),
    ([dict(rater="a", item=1, rating=None)], "is None"),
    ([dict(rater="a", rating=1)], "row 0 has no 'item'"),
    ([dict(rater="a", item=i, rating=1) for i in range(3)], "only 'a' has rated.*second person"),
    ([dict(rater="a", item=1, rating=1), dict(rater="a", item=1, rating=2)], "only 'a'"),
    ([dict(rater="b", item=1, rating=1), dict(rater="a", item=1, rating=1), dict(rater="a", item=1, rating=2)], "row 2.*before, as 1"),
    ([dict(rater="b", item=1, rating=1), dict(rater="a", item=2, rating=2)], "no item was rated by two raters"),
    ([dict(rater=r, item=i, rating="fine") for r in "ab" for i in range(5)], "all ratings are the same"),
], ids=["empty", "nan", "none", "no-item", "one-rater", "one-rater-twice", "twice", "nothing-shared", "one-class"])
def test_bad_ratings(rows, says):
    with pytest.raises(ValueError, match=says): agreement(rows)


def test_bad_labels_and_levels():
    rows = [dict(rater=r, item=i, rating=v) for r in "ab" for i, v in enumerate(["good", "bad", "godo"])]
    with pytest.raises(ValueError, match="row 2: 'a' rated item 2 as 'godo'; the labels are 'good', 'bad'"): agreement(rows, ["good", "bad"])
    with pytest.raises(ValueError, match="interval alpha takes numbers"): krippendorff_alpha(rows, "interval")
    with pytest.raises(ValueError, match="level='ratio': choose one of nominal"): krippendorff_alpha(rows, "ratio")
    with pytest.raises(ValueError, match="kind='cubic'"): cohen_kappa([1, 2], [1, 2], kind="cubic")
    with pytest.raises(ValueError, match="2 ratings against 3"): cohen_kappa([1, 2], [1, 2, 3])
    assert set(agreement(rows[:3] + rows[4:]).left_out) == {"Fleiss' kappa", "kappa, linear", "kappa, quadratic", "alpha, ordinal"}
    assert set(agreement(rows[:3] + rows[4:], sorted({r["rating"] for r in rows})).left_out) == {"Fleiss' kappa"}


# Strengths

def play(theta, n, seed):
    rng, names = np.random.default_rng(seed), [f"s{i}" for i in range(len(theta))]
    for _ in range(n):
        i, j = rng.choice(len(theta), 2, replace=False)
        p = 1/(1 + np.exp(theta[j] - theta[i]))
        u = rng.random()
        yield names[i], names[j], None if u < .1 else names[i] if (u - .1)/.9 < p else names[j]


@pytest.mark.parametrize("seed", range(4))
def test_strengths_and_errors_equal_statsmodels(seed):
    "A binomial GLM with a column for each system but the first knows nothing of our Newton steps"
    import statsmodels.api as sm
    s = bradley_terry(play([0, .4, -.8, 1.1, .2], 400, seed))
    pairs = [(i, j) for i, j in combinations(range(5), 2) if s.wins[i, j] + s.wins[j, i]]
    X = np.array([[(c == i)*1. - (c == j) for c in range(1, 5)] for i, j in pairs])
    theirs = sm.GLM(np.array([[s.wins[i, j], s.wins[j, i]] for i, j in pairs]), X, family=sm.families.Binomial()).fit(tol=1e-12)
    assert np.allclose(s.value[1:] - s.value[0], theirs.params, atol=1e-7)
    for c in range(1, 5):
        d = s._unit(f"s{c}", "s0")
        assert np.sqrt(d @ s.cov @ d) == pytest.approx(theirs.bse[c - 1], rel=1e-5)
        assert np.allclose(s.interval(d), theirs.conf_int()[c - 1], atol=1e-5)


def test_intervals_keep_their_promise():
    theta, inside = np.array([.5, 0, -.5]), 0
    for seed in range(300):
        low, high = (s := bradley_terry(play(theta, 150, seed))).interval(s._unit("s0", "s2"))
        inside += low <= 1. <= high   # ties of one in ten pull a little to the middle
    assert .88 <= inside/300 <= .99


def test_drawing_groups_equals_the_information_where_rows_are_independent():
    games = list(play([.5, 0, -.5], 600, 0))
    a, b = bradley_terry(games), bradley_terry(games, groups=range(600))
    assert np.allclose(a.value, b.value)
    for n in a.names: assert np.allclose(a.interval(a._unit(n)), b.interval(b._unit(n)), atol=.06)
    with pytest.raises(ValueError, match="600 comparisons but 3 groups"): bradley_terry(games, groups=[1, 2, 3])


def test_a_clean_sweep_has_no_strength():
    sweep = [("new", "old", "new")]*10
    with pytest.raises(ValueError, match="no finite value.*prior=.5"): bradley_terry(sweep)
    share, low, high = bradley_terry(sweep, prior=.5).versus("new", "old")
    assert .5 < low < share < high < 1 and share == pytest.approx(10.5/11)
    with pytest.raises(ValueError, match="never met"): bradley_terry([("a", "b", "a"), ("b", "a", "b"), ("c", "d", "c"), ("c", "d", "d")])
    with pytest.raises(ValueError, match="comparison 1: the winner 'x' is neither"): bradley_terry([("a", "b", "a"), ("a", "b", "x")])
    with pytest.raises(ValueError, match="'a' against itself"): bradley_terry([("a", "a", "a")])
    with pytest.raises(ValueError, match="no comparisons"): bradley_terry([])
    with pytest.raises(KeyError, match="no system 'z'"): bradley_terry(sweep, prior=1).versus("z", "old")


# Correlations

@quick
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=30))
def test_spearman_equals_scipy(pairs):
    x, y = map(list, zip(*pairs))
    if len(set(x)) < 2 or len(set(y)) < 2: return
    assert abs(spearman(x, y, resamples=20).value - scipy_stats.spearmanr(x, y).statistic) < 1e-10


def test_within_tau_equals_scipy_screen_by_screen():
    "Without ties of the rater, Kendall's tau-a of each screen, averaged"
    rng, rows, score = np.random.default_rng(0), [], {}
    taus = []
    for item in range(40):
        x, y = rng.permutation(5), rng.permutation(5)
        rows += [dict(rater=f"r{item % 7}", item=item, thing=(item, k), rating=float(x[k])) for k in range(5)]
        score |= {(item, k): y[k] for k in range(5)}
        taus.append(scipy_stats.kendalltau(x, y).statistic)
    pairs = told_apart(rows)
    found = within_tau(pairs, [np.sign(score[b] - score[w]) for b, w, *_ in pairs])
    assert found.value == pytest.approx(np.mean(taus)) and found.low < found.value < found.high and found.n == 400


def test_bad_numbers():
    with pytest.raises(ValueError, match="number 1 is nan"): spearman([1, float("nan"), 2], [1, 2, 3])
    with pytest.raises(ValueError, match="2 numbers against 2"): spearman([1, 2], [1, 2])
    with pytest.raises(ValueError, match="row 1: 'a' gave 'y' the rating nan"):
        told_apart([dict(rater="a", item=1, thing="x", rating=1.), dict(rater="a", item=1, thing="y", rating=float("nan"))])
    with pytest.raises(ValueError, match="no pairs"): within_tau([], [])


def real(question):
    import csv
    with open(DATA/"e2e_humans/ratings.csv", encoding="utf-8") as f:
        return [dict(r, rating=float(r["rating"]), thing=(r["mr"], r["system"])) for r in csv.DictReader(f) if r["question"] == question]


@needs_e2e
def test_real_ratings_give_the_published_winner():
    "Dušek, Novikova and Rieser 2019: the winning system is Slug; and a rater's own scale does not matter"
    best = {}
    for question in ("quality", "naturalness"):
        rows = real(question)
        pairs = told_apart(rows)
        assert all(b[0] == w[0] for b, w, *_ in pairs), "compared across tables"
        s = bradley_terry([(b[1], w[1], b[1]) for b, w, *_ in pairs], groups=[p[3] for p in pairs], resamples=100)
        best[question] = {r["name"] for r in s.rows()[:2]}
        assert len(s.names) == 21 and all(r["low"] < r["value"] < r["high"] for r in s.rows())
        assert told_apart([dict(r, rating=r["rating"]*(10 if r["rater"] < "r080" else .1)) for r in rows]) == pairs
    assert best["quality"] & best["naturalness"] == {"slug"}


# The rating file

SYSTEMS = {"tuned-secret": [f"alpha reply {i}" for i in range(20)], "base-secret": [f"beta reply {i}" for i in range(20)]}
ROWS = [dict(input=f"question {i}") for i in range(20)]
RUBRIC = {"correct": ["no", "partly", "yes"], "tone": [1, 2, 3, 4, 5]}


@pytest.fixture
def study(tmp_path): return new_study(tmp_path/"ratings.db", SYSTEMS, ROWS)


def finish(study, rater, choose=lambda item: "a"):
    "All of a rater's items, in one transaction"
    study._save([(rater, i, c, choose(i) if study.kind == "pairwise" else v[i % 3], study.swapped(rater, i), 1., f"2026-01-01T00:00:{i:02}Z")
                 for i in study.order(rater) for c, v in study.criteria.items()])


def test_file_is_durable(study):
    with rating._transaction(study.path, 5) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",) and db.execute("PRAGMA synchronous").fetchone() == (2,)


PROGRAM = """
import sys, time
from ftcourse.rating import open_study
study, rater, pause = open_study(sys.argv[1]), sys.argv[2], float(sys.argv[3])
for n, i in enumerate(study.order(rater), 1):
    study.save(rater, i, "preference", ["a", "b", "tie"][i % 3])
    print(n, flush=True)
    time.sleep(pause)
"""


def another(study, rater, pause=.005):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(study.path), rater, str(pause)], stdout=subprocess.PIPE, text=True, cwd=REPO)


def test_no_rating_is_lost_on_kill(study):
    p = another(study, "anna", .2)
    for line in p.stdout:
        if int(line) == 7: p.send_signal(signal.SIGKILL); break
    said = [7, *map(int, p.stdout)][-1]
    p.wait()
    assert p.returncode == -signal.SIGKILL
    with rating._transaction(study.path, 5) as db: assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    again = new_study(study.path, SYSTEMS, ROWS)
    kept = again.ratings()
    assert len(kept) in (said, said + 1) and {r["item"] for r in kept} == set(again.order("anna")[:len(kept)])
    assert all(r["rating"] == ["a", "b", "tie"][r["item"] % 3] for r in kept)
    assert Screen(again, "anna").item == again.order("anna")[len(kept)]


def test_raters_write_at_the_same_time(study):
    other = another(study, "r0")
    assert other.stdout.readline() == "1\n"   # it is at work
    for i in study.order("r1"): study.save("r1", i, "preference", "tie")
    assert other.wait(60) == 0
    assert study.done("r0") == study.done("r1") == (20, 20) and len(study.ratings()) == 40


def test_all_or_none(study):
    rows = [("anna", 0, "preference", "a", False, None, "t"), ("anna", 1, "preference", "left", False, None, "t")]
    with pytest.raises(ValueError, match="item 1, preference: 'left' is not one of 'a', 'tie', 'b'"): study._save(rows)
    assert study.ratings() == []


@pytest.mark.parametrize("args, says", [
    (("", 0, "preference", "a"), "rater ''"), ((None, 0, "preference", "a"), "rater None"), (("anna", 99, "preference", "a"), "items 0 to 19"),
    (("anna", 0, "taste", "a"), "asks for preference"), (("anna", 0, "preference", float("nan")), "nan is not one of"), (("anna", 0, "preference", 1), "1 is not one of")])
def test_bad_rating(study, args, says):
    with pytest.raises(ValueError, match=says): study.save(*args)


def test_locked_file(study):
    screen = Screen(study, "anna")
    holder = sqlite3.connect(study.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    study.wait = .05
    with pytest.raises(TimeoutError, match="locked by another program, so nothing was saved"): study.save("anna", 0, "preference", "a")
    first = screen.item
    screen.press("1")
    assert screen.note.startswith("NOT SAVED.") and screen.item == first and screen.done == 0
    holder.close()
    screen.press("1")
    assert screen.note == "Saved." and screen.item != first and study.done("anna") == (1, 20)


def test_damaged_file(study, tmp_path):
    finish(study, "anna")
    raw = bytearray(study.path.read_bytes())
    raw[:2000] = os.urandom(2000)
    (tmp_path/"bad.db").write_bytes(raw)
    with pytest.raises(ValueError, match="damaged or no rating file.*recover"): open_study(tmp_path/"bad.db")
    with pytest.raises(ValueError, match="damaged"): new_study(tmp_path/"bad.db", SYSTEMS, ROWS)
    (tmp_path/"text.db").write_text("rater,item\n"*500)
    with pytest.raises(ValueError, match="damaged or no rating file"): open_study(tmp_path/"text.db")
    sqlite3.connect(tmp_path/"other.db").execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(ValueError, match="holds no study"): open_study(tmp_path/"other.db")
    with pytest.raises(FileNotFoundError): open_study(tmp_path/"none.db")
    with pytest.raises(OSError, match="can't be written.*Is the folder there"): new_study(tmp_path/"no"/"folder.db", SYSTEMS, ROWS)


def test_another_study_in_the_file(study):
    for change in (dict(seed=1), dict(n=5), dict(kind="rubric", criteria=RUBRIC)):
        with pytest.raises(ValueError, match="another study"): new_study(study.path, SYSTEMS, ROWS, **change)
    with pytest.raises(ValueError, match="another study"): new_study(study.path, {**SYSTEMS, "base-secret": ["other"]*20}, ROWS)
    assert new_study(study.path, SYSTEMS, ROWS, raters=["anna", "ben"]).raters == open_study(study.path).raters == ["anna", "ben"]


@pytest.mark.parametrize("change, says", [
    (dict(systems={"a": ["x"]*20}), "compares two and more"), (dict(systems={"a": ["x"]*20, "b": ["y"]*19}), "'b' has 19 replies for 20 rows"),
    (dict(systems={"a": ["x"]*20, "b": [None]*20}), "system 'b', row 0"), (dict(systems={"a": ["x"]*20, "b": [b"y"]*20}), "b'y', not text"),
    (dict(systems={"a": ["x"]*20, "b": ["x "]*20}), "replies are all equal"), (dict(kind="stars"), "kind='stars'"), (dict(kind="rubric"), "needs criteria"),
    (dict(kind="rubric", criteria={"c": ["only"]}), "2 to 9"), (dict(kind="rubric", criteria={"c": [1, 1]}), "different"), (dict(kind="rubric", criteria={"c": [1., 2.]}), "1.0 is neither")])
def test_bad_study(tmp_path, change, says):
    with pytest.raises(ValueError, match=says): new_study(tmp_path/"x.db", **{"systems": SYSTEMS, "dataset": ROWS, **change})


def test_order_and_sides_are_drawn_for_each_rater(study):
    orders = {r: study.order(r) for r in ("anna", "ben", "carl")}
    assert len({tuple(o) for o in orders.values()}) == 3 and all(sorted(o) == list(range(20)) for o in orders.values())
    sides = [study.swapped(f"r{k}", i) for k in range(100) for i in range(20)]
    assert .45 < np.mean(sides) < .55
    assert open_study(study.path).order("anna") == orders["anna"]


def test_names_stay_hidden_and_text_stays_text(tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">&amp;'
    s = new_study(tmp_path/"e.db", {"tuned-secret": [evil]*3, "base-secret": ["fine"]*3}, [dict(input=evil)]*3)
    shown = s.card("anna", 0)
    assert "<script" not in shown and "<img" not in shown and shown.count("&lt;script&gt;") == 2 and "&amp;amp;" in shown
    screen = Screen(s, "<b>anna</b>")
    screen.widget()
    screen.press("<i>")
    screen._draw()
    page = screen.head.value + screen.text.value + screen.foot.value + "".join(b.description for b in screen.buttons.children)
    assert "secret" not in page and "<b>anna" not in page and "<i>" not in page and "<script" not in page
    while screen.item is not None: screen.press("1")
    with pytest.raises(ValueError, match="nobody has rated"): new_study(tmp_path/"f.db", SYSTEMS, ROWS).votes()


def test_results_wait_for_everybody(tmp_path):
    s = new_study(tmp_path/"r.db", SYSTEMS, ROWS, raters=["anna", "ben"])
    finish(s, "anna", lambda i: "a")
    with pytest.raises(ValueError, match="left: ben 20"): s.strengths()
    with pytest.raises(ValueError, match="'carl' is not among"): s.rate("carl")
    assert len(s.votes(unblind=True)) == 20
    finish(s, "ben", lambda i: ["a", "b", "tie"][i % 3])
    share, low, high = s.strengths().versus("tuned-secret", "base-secret")
    wins = 20 + 7 + 3   # anna's; ben's; half of ben's six ties
    assert share == pytest.approx((wins + .5)/41) and low < share < high
    assert s.agreed()["alpha, nominal"].value == pytest.approx(krippendorff.alpha(
        np.array([[0]*20, [[0, 2, 1][i % 3] for i in range(20)]], float), level_of_measurement="nominal"))


def test_rubric(tmp_path):
    s = new_study(tmp_path/"r.db", SYSTEMS, ROWS, kind="rubric", criteria=RUBRIC)
    screen = Screen(s, "anna")
    given = {}
    while screen.item is not None:
        k = screen.item % 3
        given.setdefault(s.items[screen.item]["systems"][0], []).append(k + 1)
        screen.press(str(k + 1)), screen.press("5")
    assert s.done("anna") == (40, 40) and len(s.ratings()) == 80
    marks = s.marks()
    for name, ks in given.items():
        assert marks["correct"][name].value == pytest.approx(np.mean(ks)) and marks["tone"][name].value == 5
    with pytest.raises(ValueError, match="use `marks`"): s.votes()


# The screen, without a browser

def test_keys_one_at_a_time(study):
    screen = Screen(study, "anna")
    box = screen.widget()
    first = screen.item
    screen.keys.value = "1"
    assert study.done("anna") == (1, 20) and screen.keys.value == "" and screen.item != first
    second = screen.item
    screen.keys.value = "22"   # pressed twice before the next pair was there
    assert study.done("anna") == (1, 20) and screen.item == second and screen.keys.value == ""
    screen.keys.value = "x"
    assert screen.item == second and "No choice has the key" in screen.foot.value
    button = [b for b in screen.buttons.children if b.description.startswith("0")][0]
    button.click(), button.click()   # a double click: the second falls on a pair that nobody has read
    assert study.done("anna") == (2, 20) and "second click of two" in screen.foot.value
    assert [r["rating"] for r in study.ratings() if r["item"] == second] == ["tie"]
    screen.keys.value = "u"
    assert screen.item == second and study.done("anna") == (2, 20)
    screen.keys.value = "2"
    assert [r["rating"] for r in study.ratings() if r["item"] == second] == ["a" if study.swapped("anna", second) else "b"]
    assert len(box.children) == 4


def test_the_left_key_means_the_text_on_the_left(study):
    screen = Screen(study, "anna")
    for _ in range(20):
        item, shown = screen.item, study.card("anna", screen.item)
        alpha_left = shown.index("alpha") < shown.index("beta")
        screen.press("1")
        won = next(r["rating"] for r in study.ratings() if r["item"] == item)
        assert study.items[item]["texts"]["ab".index(won)].startswith("alpha" if alpha_left else "beta")
    assert screen.item is None
    screen.widget()
    assert "All done" in screen.text.value and not screen.buttons.children


# Label Studio

TASK_FIELDS = {"id", "data", "annotations", "predictions"}
ANNOTATION_FIELDS = {"id", "result", "was_cancelled", "ground_truth", "created_at", "updated_at", "lead_time", "result_count", "task", "completed_by"}


@pytest.mark.parametrize("kind", ["pairwise", "rubric"])
def test_round_trip(tmp_path, kind):
    more = dict(kind=kind, criteria=RUBRIC if kind == "rubric" else None)
    s = new_study(tmp_path/"a.db", SYSTEMS, ROWS, **more)
    for k, who in enumerate(("anna", "ben", "carl")): finish(s, who, lambda i: ["a", "b", "tie"][(i + k) % 3])
    tasks = json.loads(json.dumps(s.to_label_studio({"anna": 7, "ben": "ben@example.org", "carl": 12})))
    with pytest.raises(ValueError, match="no e-mail or number for 'ben'"): s.to_label_studio({"anna": 1})
    assert all(set(t) == TASK_FIELDS for t in tasks) and "secret" not in json.dumps(tasks)
    anns = [a for t in tasks for a in t["annotations"]]
    assert all(set(a) == ANNOTATION_FIELDS for a in anns) and len({a["id"] for a in anns}) == len(anns) == 3*len(s.items)
    assert all({"id", "from_name", "to_name", "type", "value"} == set(r) for a in anns for r in a["result"])
    (tmp_path/"export.json").write_text(json.dumps(tasks))
    back = new_study(tmp_path/"b.db", SYSTEMS, ROWS, **more)
    n = back.from_label_studio(tmp_path/"export.json", {7: "anna", "ben@example.org": "ben", 12: "carl"})
    def key(x): return {(r["rater"], r["item"], r["criterion"]): r["rating"] for r in x.ratings()}
    assert n == len(s.ratings()) == len(back.ratings()) and key(back) == key(s)
    assert back.agreed()["alpha, nominal"].value == s.agreed()["alpha, nominal"].value
    by_side = [r["value"] for a in anns for r in a["result"] if r["type"] == "pairwise"]
    if kind == "pairwise": assert {v["selected"] for v in by_side} == {"left", "right"} and s.strengths().rows() == back.strengths().rows()


def test_config_names_what_results_name(tmp_path):
    import xml.etree.ElementTree as ET
    for kind in ("pairwise", "rubric"):
        s = new_study(tmp_path/f"{kind}.db", SYSTEMS, ROWS, kind=kind, criteria={"is it <right> & short?": ["no", "yes"], "tone": [1, 2, 3, 4, 5]} if kind == "rubric" else None)
        finish(s, "anna", lambda i: ["a", "tie"][i % 2]) if kind == "pairwise" else [s.save("anna", i, c, v[0]) for i in range(40) for c, v in s.criteria.items()]
        config = ET.fromstring(s.label_studio_config())
        controls = {e.get("name"): e for e in config.iter() if e.get("toName")}
        objects = {e.get("name"): e.get("value")[1:] for e in config.iter("Text")}
        for t in s.to_label_studio():
            assert set(objects.values()) <= set(t["data"])
            for r in (r for a in t["annotations"] for r in a["result"]):
                e = controls[r["from_name"]]
                assert e.get("toName") == r["to_name"] and e.tag.lower() == r["type"] and set(r["to_name"].split(",")) <= set(objects)


def exported(study, item, result, **more):
    "A task as Label Studio's documentation shows an exported one"
    return [{"id": 41, "created_at": "2021-03-09T21:52:49.513742Z", "updated_at": "2021-03-09T22:16:08.746926Z", "project": 83, "data": study._data(item), "predictions": [],
             "annotations": [{"id": "1001", "result": result, "was_cancelled": False, "ground_truth": False, "created_at": "2021-03-09T22:16:08.728353Z",
                              "updated_at": "2021-03-09T22:16:08.728378Z", "lead_time": 4.288, "result_count": 0, "task": 41, "completed_by": 10, **more}]}]


def pick(side): return [{"id": "Dx_aB91ISN", "from_name": "preference", "to_name": "left,right", "type": "pairwise", "origin": "manual", "value": {"selected": side}}]


def test_documented_export_is_read(study):
    for item in range(6):
        assert study.from_label_studio(exported(study, item, pick("left"))) == 1
        r = next(r for r in study.ratings() if r["item"] == item)
        left = study._data(item)["left"]
        assert study.items[item]["texts"]["ab".index(r["rating"])] == left and r["rater"] == "user 10" and r["seconds"] == 4.288
    study.from_label_studio(exported(study, 7, pick("right"), completed_by={"id": 3, "email": "ben@example.org", "first_name": "Ben"}))
    assert "ben@example.org" in study.who()
    assert study.from_label_studio(exported(study, 8, [], was_cancelled=True)) == 0
    two = exported(study, 9, pick("left"), updated_at="2021-03-09T23:00:00Z")
    two[0]["annotations"] += exported(study, 9, pick("right"), updated_at="2021-03-09T22:00:00Z")[0]["annotations"]
    assert study.from_label_studio(two) == 1
    kept = next(r for r in study.ratings() if r["item"] == 9)
    assert study.items[9]["texts"]["ab".index(kept["rating"])] == study._data(9)["left"], "the later one counts"


def test_an_old_export_does_not_undo_a_newer_rating(study):
    study.save("anna", 3, "preference" if "preference" in study.criteria else next(iter(study.criteria)), "tie")     # now
    who = {10: "anna"}
    study.from_label_studio(exported(study, 3, pick("left")), who)                            # of 2021
    assert [r["rating"] for r in study.ratings() if r["item"] == 3] == ["tie"]
    study.from_label_studio(exported(study, 3, pick("left"), updated_at="2031-01-01T00:00:00Z"), who)
    assert [r["rating"] for r in study.ratings() if r["item"] == 3] in (["a"], ["b"])
    study.save("anna", 3, next(iter(study.criteria)), "tie")                                  # a click is always the last word
    assert [r["rating"] for r in study.ratings() if r["item"] == 3] == ["tie"]


@pytest.mark.parametrize("spoil, says", [
    (lambda t: t[0]["data"].update(study="0000"), "task 41 belongs to another study"), (lambda t: t[0]["data"].update(item=400), "task 41: no item 400"),
    (lambda t: t[0].pop("data"), "entry 0 is no task.*JSON-MIN"), (lambda t: t[0]["annotations"][0].update(completed_by=None), "completed_by is None"),
    (lambda t: t[0]["annotations"][0]["result"].append(dict(from_name="tie", value={"choices": ["tie"]})), "task 41, annotation 1001: user 10 gave 'preference' twice"),
    (lambda t: t[0]["annotations"][0]["result"][0]["value"].update(selected="middle"), "no answer of a pairwise study"),
    (lambda t: t[0]["annotations"][0]["result"][0].update(from_name="sentiment"), "'sentiment' with value")])
def test_bad_export(study, spoil, says):
    tasks = exported(study, 0, pick("left"))
    spoil(tasks)
    with pytest.raises(ValueError, match=says): study.from_label_studio(tasks)
    assert study.ratings() == []


def test_bad_rubric_export(tmp_path):
    s = new_study(tmp_path/"r.db", SYSTEMS, ROWS, kind="rubric", criteria=RUBRIC)
    for name, value, says in (("tone", {"rating": 6}, "one of 1, 2, 3, 4, 5 is expected"), ("correct", {"choices": ["no", "yes"]}, "one of 'no'"),
                              ("speed", {"rating": 1}, "criteria are correct, tone"), ("tone", {}, "is expected")):
        with pytest.raises(ValueError, match=says): s.from_label_studio(exported(s, 0, [dict(from_name=name, value=value)]))
