"`ftcourse.analysis`: swapping against sacreBLEU's, corrections, seeds, power, slices, facts, browser, leaks, judges"
import re, shutil, sys
from itertools import combinations
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from ftcourse.analysis import (Slice, both_orders, browser_html, by_length, compare_all, detectable,
    fact_errors, figures, judge_pairs, leaks, over_seeds, paired_seeds, rows_needed, rows_of,
    save_browser, slices, swap_p, worst)
from ftcourse.corpora import info, load
from ftcourse.evaluation import bootstrap, draws, holm, paired, scoreboard
from ftcourse.metrics import Score, accuracy, bleu, fact_recall, rouge, ter
from humans import needs_e2e, outputs, references, streams

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
from setup import BROWSERS  # noqa: E402

BROWSER = next((b for b in map(shutil.which, BROWSERS) if b), None)
in_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome: apt install chromium")
NAMES = ("slug", "tgen", "harv", "tnt2", "adapt")
SEED = 12345   # sacreBLEU's own


@pytest.fixture(scope="module")
def e2e(): return {n: bleu(outputs(n), references(), lowercase=True) for n in NAMES}


def paired_test(kind, n, named=None, refs=None):
    named = named or [(n, outputs(n)) for n in NAMES]
    metric = BLEU(lowercase=True, force=True, references=streams(refs or references()))
    return [r.p_value for r in PairedTest(named, {"BLEU": metric}, None, test_type=kind, n_samples=n)()[1]["BLEU"][1:]]


def coins(right, n, seed):
    rng = np.random.default_rng(seed)
    return accuracy(["a"]*n, ["a" if x else "b" for x in rng.random(n) < right])


def share_error(p, n): return 4*np.sqrt(max(p*(1 - p), .001)/n)   # four standard errors of a share


# approximate randomisation

@needs_e2e
def test_swapping_equals_sacrebleus_with_its_seed(e2e):
    theirs = paired_test("ar", 2000)
    ours = [swap_p(e2e["slug"], e2e[n], trials=2000, seed=SEED) for n in NAMES[1:]]
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert .001 < min(theirs[:3]) < max(theirs[:3]) < 1   # not only ends of the scale


@needs_e2e
def test_swapping_with_another_seed_is_within_its_sampling_error(e2e):
    for n, p in zip(NAMES[1:], paired_test("ar", 2000)):
        ours = swap_p(e2e["slug"], e2e[n], trials=2000, seed=3)
        assert abs(ours - p) <= 5*np.sqrt(2*max(p*(1 - p), .0005)/2000), (n, p, ours)


@needs_e2e
def test_bootstrap_equals_sacrebleus_with_its_seed(e2e):
    for n, p in zip(NAMES[1:], paired_test("bs", 1000)):
        x, y = draws(e2e["slug"], e2e[n], resamples=1000, seed=SEED)
        d = abs(x - y)   # their statistic
        ours = (1 + (d - d.mean() > abs(e2e["slug"].value - e2e[n].value)).sum())/1001
        assert ours == pytest.approx(p, abs=1e-12), n


@needs_e2e
def test_swapping_and_bootstrap_tell_the_same_story(e2e):
    "Two tests that share nothing but the rows, on every pair of five real systems"
    for a, b in combinations(NAMES, 2):
        s, p = swap_p(e2e[a], e2e[b], trials=4000), paired(e2e[a], e2e[b], resamples=4000).p
        error = np.sqrt((4*(p/2)*(1 - p/2) + s*(1 - s))/4000)   # ours is a share, doubled
        assert abs(s - p) < .015 + 4*error and (s < .05) == (p < .05), (a, b, s, p)


def test_swapping_equals_scoring_the_swapped_replies():
    refs = [["a b c d e"], ["the cat sat on it"], ["x y z w"]]*4
    a, b = ["a b c d", "the cat sat", "x y w"]*4, ["b c d e f", "cat sat on it", "z"]*4
    x, y = bleu(a, refs), bleu(b, refs)
    swap = np.random.default_rng(0).integers(2, size=(300, 12), dtype=bool)
    far = 0
    for s in swap:
        one = bleu([q if w else p for p, q, w in zip(a, b, s)], refs).value
        two = bleu([p if w else q for p, q, w in zip(a, b, s)], refs).value
        far += abs(one - two) >= abs(x.value - y.value) - 1e-9
    assert swap_p(x, y, trials=300) == pytest.approx((1 + far)/301)


def test_swapping_counts_ties():
    "sacreBLEU gives a system against itself p = 1/(n + 1): it counts larger differences only"
    s = coins(.5, 100, 0)
    assert swap_p(s, s, trials=500) == 1
    assert paired_test("ar", 500, [("a", ["x y z w"]*9), ("b", ["x y z w"]*9)], [["x y z w v"]]*9) == [1/501]


def test_exact_p_of_few_rows():
    "Six rows, all for a: of 64 swaps only 2 are as far, so p is 1/32"
    a, b = accuracy([1]*6, [1]*6), accuracy([1]*6, [0]*6)
    assert swap_p(a, b, trials=20_000) == pytest.approx(1/32, abs=share_error(1/32, 20_000))


def test_false_alarms_of_swapping_stay_at_five_percent():
    calls = 0
    for t in range(500):
        hard = np.random.default_rng(t).random(150)
        a, b = (accuracy(["x"]*150, ["x" if r > h else "y" for r, h in
                zip(np.random.default_rng([t, 7, i]).random(150), hard)]) for i in (1, 2))
        calls += swap_p(a, b, trials=200, seed=t) <= .05
    assert calls/500 <= .05 + share_error(.05, 500)


# many comparisons

@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_equals_closed_testing(ps):
    sets = [s for k in range(1, len(ps) + 1) for s in combinations(range(len(ps)), k)]
    closed = [max(min(1, len(s)*min(ps[i] for i in s)) for s in sets if j in s) for j in range(len(ps))]
    assert holm(ps) == pytest.approx(closed, abs=1e-12)
    assert (holm(ps) >= ps).all() and (holm(ps) <= np.minimum(1, np.array(ps)*len(ps)) + 1e-12).all()


@pytest.mark.parametrize("ps", [[.1, np.nan], [-.1], [1.2]])
def test_holm_wants_p_values(ps):
    with pytest.raises(ValueError, match="from 0 to 1"): holm(ps)


def test_holm_of_nothing(): assert len(holm([])) == 0


@needs_e2e
def test_compare_all(e2e):
    table = compare_all(e2e, trials=2000)
    assert len(table) == 10 and all(d.value >= 0 and d.p_holm >= d.p for d in table)
    assert sum(d.verdict == "better" for d in table if d.b == "adapt") == 4   # far below the rest
    assert all(d.verdict == "no difference shown" for d in table if {d.a, d.b} == {"slug", "tgen"})
    assert [d.p_holm for d in table] == pytest.approx(holm([d.p for d in table]))
    with pytest.raises(ValueError, match="give at least 200"): compare_all(e2e, trials=100)
    with pytest.raises(ValueError, match="two or more"): compare_all({"slug": e2e["slug"]})


# seeds

def seeded(n_seeds, rows, spread, rng):
    "A method whose models differ by `spread` (a share), on rows of different difficulty: scores, truth"
    hard = rng.random(rows)
    def one():
        skill = rng.normal(0, spread)
        return accuracy([1]*rows, [int(x > h - skill) for x, h in zip(rng.random(rows), hard)])
    return [one() for _ in range(n_seeds)]


@pytest.mark.parametrize("n, spread", [(3, .0), (3, .08), (5, .08)])
def test_seed_intervals_cover_the_method(n, spread):
    inside = naive = 0
    for t in range(300):
        found = seeded(n, 150, spread, np.random.default_rng(t))
        s, one = over_seeds(found, 400, seed=t), bootstrap(found[0], 400, seed=t)
        inside += s.low <= 50 <= s.high   # by symmetry the method is right in half of all rows
        naive += one.low <= 50 <= one.high
    assert inside/300 >= .95 - share_error(.95, 300), inside/300
    if spread: assert naive < inside - 20, (naive, inside)


def test_seed_false_alarms():
    calls = 0
    for t in range(300):
        rng = np.random.default_rng(t)
        both = seeded(6, 120, .06, rng)
        calls += paired_seeds(both[:3], both[3:], resamples=400, seed=t).verdict != "no difference shown"
    assert calls/300 <= .05 + share_error(.05, 300), calls/300


def test_seeds_that_agree_leave_the_interval_of_the_rows():
    s = coins(.6, 200, 0)
    a, b = over_seeds([s, s, s], seed=4), bootstrap(s, 2000, seed=4)
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))


@needs_e2e
def test_seeds_of_any_metric(e2e):
    found = [e2e[n] for n in ("slug", "tgen", "harv")]
    s = over_seeds(found)
    assert s.value == pytest.approx(np.mean([f.value for f in found]))
    assert s.low < min(f.value for f in found) and s.high > s.value
    d = paired_seeds(found[:2], [e2e["adapt"], e2e["tnt2"]], ("a", "b"))
    assert d.value == pytest.approx(np.mean([f.value for f in found[:2]]) - (e2e["adapt"].value + e2e["tnt2"].value)/2)


def test_errors_of_seeds():
    a = coins(.5, 50, 0)
    with pytest.raises(ValueError, match="one seed tells nothing"): over_seeds([a])
    with pytest.raises(ValueError, match="same rows"): over_seeds([a, coins(.5, 51, 0)])
    with pytest.raises(ValueError, match="same rows"): paired_seeds([a, a], [coins(.5, 51, 0)]*2)


# power

@needs_e2e
def test_rows_needed_keep_their_promise(e2e):
    "The 630 rows are the world; test sets of the size asked for show the true difference in 80%"
    a, b = e2e["slug"], e2e["harv"]
    n, shown, rng = rows_needed(a, b, a.value - b.value), 0, np.random.default_rng(0)
    for t in range(150):
        rows = rng.integers(a.n, size=n)
        x, y = (Score("b", s.stats[rows], s.fn) for s in (a, b))
        shown += paired(x, y, resamples=200, seed=t).verdict == "better"
    assert abs(shown/150 - .8) <= .03 + share_error(.8, 150), (n, shown/150)
    assert detectable(a, b, n) == pytest.approx(a.value - b.value, rel=.01)


def test_rows_needed_agree_with_the_formula_for_accuracy():
    a, b = coins(.6, 400, 0), coins(.65, 400, 1)
    d = np.mean(a.stats[:, 0] != b.stats[:, 0]) - ((a.value - b.value)/100)**2
    assert rows_needed(a, b, 5) == pytest.approx(d*(100*(1.959964 + .841621)/5)**2, rel=.08)
    assert rows_needed(a, b, 2.5) == pytest.approx(4*rows_needed(a, b, 5), abs=4)
    assert detectable(a, b, 1600) == pytest.approx(detectable(a, b)/2)


@pytest.mark.parametrize("call, says", [
    (lambda a: rows_needed(a, coins(.6, 50, 1), 0), "points above zero"),
    (lambda a: rows_needed(a, coins(.6, 50, 1), float("nan")), "points above zero"),
    (lambda a: rows_needed(a, a, 1), "score alike in every row"),
    (lambda a: detectable(a, coins(.6, 50, 1), power=80), "power=80"),
    (lambda a: detectable(a, coins(.6, 51, 1)), "same rows"),
])
def test_errors_of_power(call, says):
    with pytest.raises(ValueError, match=says): call(coins(.5, 50, 0))


# slices

def test_slices():
    good = [1]*60 + [1, 0]*20
    found = slices(accuracy([1]*100, good), ["easy"]*60 + ["hard"]*40)
    assert [s.name for s in found] == ["hard", "easy"]
    hard, easy = found
    assert (hard.n, hard.value, hard.rest, hard.verdict) == (40, 50, 100, "worse than the rest")
    assert easy.verdict == "better than the rest" and easy.high == 100
    assert easy.low == pytest.approx(100*.025**(1/60))   # Clopper and Pearson; not [100, 100]
    assert hard.p_holm == pytest.approx(2*min(hard.p, easy.p)) or hard.p_holm >= hard.p
    assert "hard" in str(found) and "<td" in found._repr_html_()


def test_all_right_in_a_small_slice_proves_nothing():
    "21 right rows beside 90% right ones: a bootstrap of that slice would be certain"
    s = accuracy([1]*121, [1]*21 + [int(i % 10 > 0) for i in range(100)])
    found = slices(s, ["new"]*21 + ["old"]*100)
    assert all(x.verdict == "no difference shown" for x in found)


def test_a_cost_is_sorted_and_judged_the_other_way_round():
    refs = [f"the parcel number {i} is on its way to you" for i in range(80)]
    half = [r if i % 2 else "no idea" for i, r in enumerate(refs)]
    scores = {"half": ter(half, refs), "right": ter(refs, refs), "wrong": ter(["no idea"]*80, refs)}
    table = compare_all(scores)
    assert [(d.a, d.b, d.verdict) for d in table] == [("right", "half", "better"), ("right", "wrong", "better"), ("half", "wrong", "better")]
    first, second = slices(scores["half"], ["odd" if i % 2 else "even" for i in range(80)])
    assert (first.name, first.verdict, second.verdict) == ("even", "worse than the rest", "better than the rest")


def test_small_slices_get_no_verdict():
    found = slices(coins(.5, 50, 0), ["a"]*45 + ["b"]*5)
    assert all(s.verdict == "too few rows" and s.low is None for s in found)
    alone = slices(coins(.5, 50, 0), ["a"]*50)
    assert alone[0].verdict == "too few rows" and alone[0].n == 50


def test_innocent_slices_are_rarely_accused():
    rng, calls = np.random.default_rng(0), 0
    for t in range(200):
        keys = rng.integers(6, size=180)
        calls += any(s.verdict not in ("no difference shown", "too few rows")
                     for s in slices(coins(.6, 180, t), keys, resamples=300, seed=t))
    assert calls/200 <= .05 + share_error(.05, 200), calls/200


def test_slice_names_are_escaped():
    page = slices(coins(.5, 60, 0), ["<script>x</script>"]*30 + ["b"]*30)._repr_html_()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_errors_of_slices():
    with pytest.raises(ValueError, match="3 keys for 50 rows"): slices(coins(.5, 50, 0), [1, 2, 3])
    with pytest.raises(ValueError, match="row 1: None is not text"): by_length(["a b", None])
    with pytest.raises(ValueError, match="no texts"): by_length([])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 5))
def test_length_slices(lengths, parts):
    names = by_length(["w "*n for n in lengths], parts)
    assert len(names) == len(lengths) and len(set(names)) <= parts
    for n, name in zip(lengths, names):
        low, high = map(int, re.findall(r"\d+", name))
        assert low <= n <= high


# worst rows and facts

@pytest.fixture(scope="module")
def desk(): return [dict(r) for r in load("desk", "test")]


@pytest.fixture(scope="module")
def board(desk):
    rng = np.random.default_rng(0)
    tuned = [r["output"] if x < .8 else "Porch, in 999 days" for r, x in zip(desk, rng.random(len(desk)))]
    return scoreboard({"zero": ["no idea"]*len(desk), "tuned": tuned}, desk, info("desk").tasks)


def test_worst_rows_are_the_worst(board, desk):
    for metric in ("answer/bleu", "answer/rouge_l", "route/accuracy"):
        found, s = worst(board, "tuned", metric, 8), board["tuned"][metric]
        assert all(desk[i]["task"] == metric.split("/")[0] for i, _ in found)
        assert [v for _, v in found] == pytest.approx(sorted(s.rows())[:8])
        assert all(s.rows()[rows_of(board, metric).index(i)] == pytest.approx(v) for i, v in found)
    a, b = (worst(board, "zero", "route/accuracy", 5, seed=s) for s in (0, 1))
    assert a != b and a == worst(board, "zero", "route/accuracy", 5)


def test_worst_leaves_out_rows_without_facts(board, desk):
    found = worst(board, "tuned", "answer/fact_recall", 10_000)
    assert {i for i, _ in found} == {i for i, r in enumerate(desk) if r["facts"]} - {
        i for i, r in enumerate(desk) if r["task"] != "answer"}
    with pytest.raises(KeyError, match="there are: zero, tuned"): worst(board, "tunde", "answer/bleu")


def test_right_answers_have_no_fact_errors(desk):
    answers = [r for r in desk if r["task"] == "answer"]
    for k in (0, -1): assert fact_errors([r["references"][k] for r in answers], answers) == []


def test_fact_errors_agree_with_fact_recall(desk):
    answers = [r for r in desk if r["task"] == "answer"]
    said = [r["output"] for r in answers[1:] + answers[:1]]
    missing = sum(len(e.missing) for e in fact_errors(said, answers))
    s = fact_recall(said, [r["facts"] for r in answers])
    assert missing == s.stats[:, 1].sum() - s.stats[:, 0].sum() > 0


def test_invented_figures():
    row = dict(output="Within forty days, for £1,000.", input="Order 1234 please", facts=["40 days"])
    assert fact_errors(["For order 1234 you have 40 days; it costs £1000."], [row]) == []
    e, = fact_errors(["You have 14 days, until 8:30."], [row])
    assert (e.row, e.missing, e.invented) == (0, ["40 days"], ["14", "8:30"])
    assert figures("Forty-five at 3.50 and 1,000.") == {"45", "3.50", "1000"}
    with pytest.raises(ValueError, match="2 replies for 1 rows"): fact_errors(["a", "b"], [row])
    with pytest.raises(ValueError, match="row 0: the reply is None"): fact_errors([None], [row])


# the page of outputs

NASTY = ['<script>window.hacked = 1</script>', '"><img src=x onerror="window.hacked=1">', "'; alert(1) //",
         "</div></main><svg onload=window.hacked=1>", "&lt;b&gt; \u2028 \x00 {}", "a\n\nb   c"]


@pytest.fixture(scope="module")
def page(tmp_path_factory, desk):
    rows = [{**r, "input": NASTY[i % 6] + " " + r["input"]} if i < 12 else r for i, r in enumerate(desk)]
    said = [NASTY[i % 6] if i < 12 else r["output"] for i, r in enumerate(desk)]
    b = scoreboard({NASTY[0]: said, "right": [r["output"] for r in desk]}, rows, info("desk").tasks)
    groups = dict(channel=["letter" if "\n" in r["input"] else NASTY[1] for r in rows],
                  length=by_length([r["input"] for r in rows]))
    path = save_browser(tmp_path_factory.mktemp("browser")/"outputs.html", b, NASTY[1], **groups)
    return path, rows, groups


def test_the_page_is_whole_and_escaped(page):
    text = page[0].read_text("utf-8")
    assert text.count("<script>") == 1 and "<img" not in text and "<svg" not in text
    assert not re.search(r'(?:src|href|url\()\s*=?\s*["\']?(?:https?:)?//', text)
    assert text.count('class="row"') == len(page[1])
    assert not re.search(r'data-marks="[^"]*[^\d "]', text)   # numbers only


def test_errors_of_the_page(board):
    with pytest.raises(ValueError, match="length has 2 values for 308 rows"): browser_html(board, length=[1, 2])


def test_order_of_the_page(board):
    some = [i for i, _ in worst(board, "tuned", "answer/bleu", 3)]
    found = re.findall(r"<h3>answer, row (\d+)</h3>", browser_html(board, order=some))
    assert list(map(int, found)) == some


@pytest.fixture
def tab(page):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=BROWSER, args="--no-sandbox --disable-gpu --no-first-run --disable-background-networking".split())
        t = b.new_page(viewport=dict(width=1200, height=900))
        t.errors, t.asked = [], []
        t.on("pageerror", lambda e: t.errors.append(str(e)))
        t.on("console", lambda m: m.type == "error" and t.errors.append(m.text))
        t.on("request", lambda r: t.asked.append(r.url))
        t.goto(page[0].as_uri())
        yield t
        b.close()


@in_browser
def test_the_page_in_a_browser(tab, page):
    "From the disk: search, menus, both together, nothing from outside, no script of a customer's"
    path, rows, groups = page
    def seen(): return tab.locator(".row:visible").count()
    def count(): return int(tab.locator("#count").inner_text().split()[0])
    assert tab.errors == [] and tab.asked == [path.as_uri()]
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("h1").inner_text() == NASTY[1]
    assert seen() == count() == len(rows)
    menus = {s.locator("xpath=..").inner_text().split("\n")[0]: s for s in tab.locator(".tools select").all()}
    assert set(menus) == {"task", "wrong", "channel", "length"}
    for value in dict.fromkeys(groups["length"]):
        menus["length"].select_option(label=value)
        assert seen() == count() == groups["length"].count(value)
    menus["length"].select_option(label="all")
    menus["channel"].select_option(label=NASTY[1])   # a menu entry may be called anything
    assert count() == groups["channel"].count(NASTY[1])
    menus["channel"].select_option(label="all")
    menus["wrong"].select_option(label=NASTY[0])
    assert count() == 12
    tab.locator("#find").fill("<SCRIPT> window.hacked")
    assert seen() == count() >= 2 and "<script>" in tab.locator(".row:visible").first.inner_text()
    tab.locator("#find").fill("no such words anywhere")
    assert seen() == count() == 0
    assert tab.evaluate("window.hacked") is None and tab.errors == []


@in_browser
def test_the_page_on_a_phone(tab):
    tab.set_viewport_size(dict(width=390, height=800))
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert tab.locator("#find").is_visible()


# leaks

@pytest.fixture(scope="module")
def train(): return [dict(r) for r in load("desk", "train")]


def plain_words(row): return re.sub(r"[^\w\s]", " ", re.sub(r"\b[-'’]\b", "", row["input"].casefold())).split()


def test_two_hands_do_not_leak(desk, train): assert leaks(desk, train) == []


def test_planted_leaks_are_found(desk, train):
    long = [i for i, r in enumerate(desk) if len(r["input"].split()) >= 10][:40]
    ways = [str, lambda t: re.sub(r"[^\w\s]", "", t).upper(), lambda t: f"Fwd: see below.\n> {t}\nOK?",
            lambda t: "\n".join(t.split())]
    planted = [{**desk[i], "input": ways[k % 4](desk[i]["input"])} for k, i in enumerate(long)]
    found = {l.row: l for l in leaks(desk, train + planted)}
    assert set(found) == set(long)
    assert all(found[i].source == len(train) + k for k, i in enumerate(long))
    assert all(found[i].kind == ("passage" if k % 4 == 2 else "whole") for k, i in enumerate(long))
    assert all(l.passage in " ".join(plain_words(desk[i])) for i, l in found.items())


def test_half_a_row_and_less(desk):
    row = next(r for r in desk if len(r["input"].split()) >= 24)
    words = plain_words(row)
    for kept, is_leak in ((len(words)*3//4, True), (len(words)//3, False)):
        part = [dict(input=" ".join(words[:kept]) + " and then something else entirely, of course")]
        found = leaks([row], part, n=4)
        assert bool(found) == is_leak, kept
        if found: assert found[0].passage == " ".join(words[:kept])


@needs_e2e
def test_leaks_in_real_data():
    "banking77 has questions that stand on both sides, and short ones only leak whole"
    test, train = ([dict(r) for r in load("banking77", s)] for s in ("test", "train"))
    found = leaks(test, train)
    known = {tuple(plain_words(r)) for r in train}
    assert {l.row for l in found if l.kind == "whole"} == {i for i, r in enumerate(test) if tuple(plain_words(r)) in known}
    assert len({l.row for l in found if l.kind == "whole"}) > 0
    assert all(len(plain_words(test[l.row])) >= 8 for l in found if l.kind == "passage")
    assert len(found) < .05*len(test)


def test_errors_of_leaks(desk):
    with pytest.raises(ValueError, match="no test row has a field 'text'"): leaks(desk, desk, fields=("text",))


# judges

def judge(place, length, truth):
    "A judge of known habits: P(first) out of position, length and a word that marks the right answer"
    def prefer(requests):
        out = []
        for r in requests:
            a, b = re.search(r"Answer A: (.*)\n\nAnswer B: (.*)\n\nBetter", r[1]["content"], re.S).groups()
            x = place + length*(len(a) - len(b)) + truth*(("40 days" in a) - ("40 days" in b))
            out.append(1/(1 + np.exp(-x)))
        return out
    return prefer


def test_known_biases_are_measured(desk):
    asked = [r["input"] for r in desk[:30]]
    right, wrong = ["You have 40 days."]*30, ["You have 14 days."]*30
    fair = judge_pairs(judge(0, 0, 3), asked, right, wrong)
    assert (fair.first.value, fair.consistent.value, fair.prefers_a.value) == (50, 100, 100)
    first = judge_pairs(judge(5, 0, 1), asked, right, wrong)
    assert (first.first.value, first.consistent.value, first.prefers_a.value) == (100, 0, 100)
    long = judge_pairs(judge(0, .1, 0), asked, right, [w + " Thank you so much for writing." for w in wrong])
    assert long.prefers_a.value == 0 and long.consistent.value == 100
    there, back = both_orders(judge(2, 0, 1), asked, right, wrong)
    turned = both_orders(judge(2, 0, 1), asked, wrong, right)
    assert (there + back)/2 == pytest.approx(1 - (turned[0] + turned[1])/2)
    with pytest.raises(ValueError, match="2 questions, 1 and 2 answers"): judge_pairs(judge(0, 0, 1), ["a", "b"], ["x"], ["y", "z"])
    for p in (float("nan"), 1.2, -3.):   # no win for anybody
        with pytest.raises(ValueError, match="probabilities from 0 to 1"): judge_pairs(lambda r: [p]*len(r), ["q"], ["x"], ["y"])
