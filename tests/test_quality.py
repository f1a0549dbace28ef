"The audit: MinHash and confident learning beside their libraries, recall on planted defects, cleaning, hostile and bad input"
import json, random
from itertools import combinations
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings, strategies as st
from ftcourse import corpora, quality as q

needs_bank = pytest.mark.skipif(not q.Path(corpora._places(corpora.info("banking77"), "train.csv")[0]).is_file(), reason="needs banking77")


@pytest.fixture(scope="module")
def train(): return q.check_rows(corpora.load("desk", "train"))

@pytest.fixture(scope="module")
def test(): return q.check_rows(corpora.load("desk", "test"))


def sets(text, k=4):
    t = q.plain(text).ljust(k)
    return {t[i:i+k] for i in range(len(t) - k + 1)}

def jaccard(a, b): return len(a & b)/len(a | b)

texts = st.lists(st.text(max_size=30), min_size=2, max_size=8)


# MinHash and bands

@settings(max_examples=60, deadline=None)
@given(texts)
def test_shingles_are_those_of_the_texts(some):
    h, at = q.shingles(some)
    assert len(at) == len(some) + 1 and at[-1] == len(h)
    own = [set(h[a:b]) for a, b in zip(at, at[1:])]
    for (a, x), (b, y) in combinations(zip(some, own), 2): assert abs(jaccard(x, y) - jaccard(sets(a), sets(b))) < 1e-9


@settings(max_examples=40, deadline=None)
@given(texts)
def test_pair_jaccard_is_exact(some):
    pairs = np.array(list(combinations(range(len(some)), 2)))
    want = [jaccard(sets(some[i]), sets(some[j])) for i, j in pairs]
    assert np.allclose(q.pair_jaccard(some, pairs), want) and np.allclose(q.pair_jaccard(some, pairs[::-1]), want[::-1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_the_estimate_is_within_its_error(seed, common, left, right):
    rng = random.Random(seed)
    def words(n): return ["".join(rng.choices("abcdefghij", k=4)) for _ in range(n)]
    c = words(common + 1)
    a, b = (" ".join(c + words(n)) for n in (left, right))
    true, perms = jaccard(sets(a), sets(b)), 512
    sig = q.minhash([a, b], perms=perms, seed=seed)
    assert abs((sig[0] == sig[1]).mean() - true) <= 6*(true*(1 - true)/perms)**.5 + 1e-9


@settings(max_examples=30, deadline=None)
@given(texts, st.randoms(use_true_random=False))
def test_a_signature_depends_on_nothing_but_its_text(some, rnd):
    order = rnd.sample(range(len(some)), len(some))
    whole = q.minhash(some)
    assert (q.minhash([some[i] for i in order]) == whole[order]).all()
    assert (q.minhash(some, block=1) == whole).all() and (q.minhash(some[:1]) == whole[:1]).all()


def test_permutations_are_permutations():
    a, b = q.permutations(64)
    assert (a % 2 == 1).all() and len(set(a.tolist())) == 64
    x = np.arange(2**16, dtype=np.uint32) * np.uint32(65537)
    assert len(np.unique(x*a[0] + b[0])) == len(x) == len(np.unique(q._mix(x)))


@pytest.mark.parametrize("t", [.3, .5, .7, .9, 1.])
def test_bands_keep_their_promise(t):
    n, r = q.bands(t)
    assert n*r <= 128 and 1 - (1 - t**r)**n >= .98


def test_near_pairs_against_all_pairs(train):
    some = [q.asked(r) for r in train[:350]]
    own = [sets(t) for t in some]
    for t in (.5, .7):
        want = {(i, j) for i, j in combinations(range(len(some)), 2) if jaccard(own[i], own[j]) >= t}
        pairs, alike = q.near_pairs(some, t)
        got = set(map(tuple, pairs.tolist()))
        assert got <= want and len(got) >= .95*len(want) and (alike >= t).all()


def test_no_pairs(): assert len(q.near_pairs(["one text"])[0]) == len(q.near_pairs(["one text", "quite another"])[0]) == 0


def test_many_equal_texts_are_no_trouble():
    pairs, _ = q.near_pairs(["the same text again"]*5000)
    assert 4999 <= len(pairs) < 50_000 and set(pairs[:, 1].tolist()) == set(range(1, 5000))


def test_minhash_equals_datasketch(train):
    datasketch = pytest.importorskip("datasketch")
    inverse = {c: pow(c, -1, 2**32) for c in (0x85EBCA6B, 0xC2B2AE35)}
    def unmix(x):
        x = int(x); x ^= x >> 16
        x = x*inverse[0xC2B2AE35] % 2**32; x ^= x >> 13 ^ x >> 26
        x = x*inverse[0x85EBCA6B] % 2**32
        return x ^ x >> 16
    for x in (0, 1, 2**32 - 1, 123456789): assert int(q._mix(np.array([unmix(x)], np.uint32))[0]) == x
    some = [q.asked(r) for r in train[::5]]
    sig = q.minhash(some)
    for t, s in zip(some, sig):
        m = datasketch.MinHash(num_perm=128, permutations=q.permutations(), scheme="affine32", hashfunc=unmix)
        m.update_batch(q.shingles([t])[0])
        assert m.hashvalues.tolist() == s.tolist()


# Wrong labels

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(6, 80))
def test_confident_learning_equals_cleanlab(seed, k, n):
    cleanlab = pytest.importorskip("cleanlab")
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(k), rng.integers(k, size=n)]
    p = rng.dirichlet(np.ones(k)*.5, len(y)); p[np.arange(len(y)), y] += rng.random(len(y)); p /= p.sum(1, keepdims=True)
    theirs = cleanlab.filter.find_label_issues(y, p, filter_by="confident_learning", n_jobs=1, min_examples_per_class=0)
    assert q.confident_errors(p, y).tolist() == theirs.tolist()
    assert np.allclose(q.self_confidence(p, y), cleanlab.rank.get_self_confidence_for_each_label(y, p))


@needs_bank
def test_confident_learning_equals_cleanlab_on_banking77():
    cleanlab = pytest.importorskip("cleanlab")
    import cleanlab.filter
    rows = corpora.load("banking77", "train", n=500)
    names, y = np.unique(rows["output"], return_inverse=True)
    p = q.label_probs(q.text_features(rows["input"]), y, folds=3)
    p /= p.sum(1, keepdims=True)
    mine = q.confident_errors(p, y)
    assert mine.any() and mine.tolist() == cleanlab.filter.find_label_issues(y, p, filter_by="confident_learning", n_jobs=1).tolist()


def test_no_row_is_judged_by_a_model_that_saw_it():
    y = np.repeat([0, 1, 2], 21)
    fold = q.folds_of(y)
    for k in range(3): assert np.ptp(np.bincount(fold[y == k], minlength=5)) <= 1
    x = np.eye(len(y))   # every row has a feature of its own: only a model that saw it could know its label
    from scipy.sparse import csr_matrix
    p = q.label_probs(csr_matrix(x), y)
    assert (q.self_confidence(p, y) < .4).all()


# Recall on planted defects, by which the audit is promised

PROMISED = {"empty": .95, "duplicate": .95, "near": .95, "leak": .95, "format": .95, "personal": 1.}

@pytest.mark.parametrize("kind", PROMISED)
def test_recall(kind, train, test):
    checks, got = q._checkers(test, .7, 0, q.rough_tokens, q.REGIONS), []
    for seed in (0, 1, 2):
        planted = q.plant(train, kind, .05, seed, test)
        got.append(q.hits(checks[kind](planted.rows), planted))
    print(kind, [f"recall {h.recall:.3f}, precision {h.precision:.2f}" for h in got])
    assert min(h.recall for h in got) >= PROMISED[kind] and min(h.precision for h in got) >= .6


def test_recall_of_wrong_labels(train):
    routes, got = [r for r in train if r["task"] == "route"], []
    for seed, share in ((0, .05), (1, .1)):
        planted = q.plant(routes, "label", share, seed)
        got.append(q.hits(q.wrong_labels(planted.rows), planted))
    print("label", [f"recall {h.recall:.3f}, precision {h.precision:.2f}" for h in got])
    assert min(h.recall for h in got) >= .8 and min(h.precision for h in got) >= .6


@pytest.mark.parametrize("kind", ["conflict", "topic", "length"])
def test_recall_of_the_rest(kind, train, test):
    planted = q.plant(train, kind, .05, 3, test)
    got = q.hits(q._checkers(test, .7, 0, q.rough_tokens, q.REGIONS)[kind](planted.rows), planted)
    assert got.recall >= .8 and got.precision >= .6, got


def test_plants_are_told_apart(train, test):
    for kind in q.PLANTS:
        p = q.plant(train, kind, .02, 0, test)
        assert p.rows == q.plant(train, kind, .02, 0, test).rows and len(p.truth) in (len(train)*2//100, round(.02*len(train)), round(.02*len(test)), round(.02*656))
        same = [i for i, r in enumerate(train) if p.rows[i] == r]
        assert set(range(len(train))) - set(same) <= p.truth


@pytest.mark.parametrize("kind", q.PERSONAL)
def test_no_personal_data_is_missed(kind):
    rng = random.Random(7)
    for _ in range(150):
        text = q._personal({"input": "Hello."}, rng, kind)["input"]
        assert q.spans(text), text
        assert not q.spans(q.mask(text)), text


@pytest.mark.parametrize("text", ["order LM378453", "tracking JD0002987654321098", "2026-05-31", "it cost £1,234.50", "10.0.0.1", "meet at noon. Dot left",
    "the secret is to wax it", "a 2024/2025 catalogue", "4539 1488 0343 6468", "GB83 WEST 1234 5698 7654 32", "size 38-40-42", ""])
def test_no_false_alarm(text): assert q.spans(text) == []


def test_masking_keeps_the_rest_and_ignores_disguises():
    assert q.mask("x jo\u200b@ex12.org y") == "x [EMAIL] y"
    assert q.mask("x jo＠ex12.org, y") == "x [EMAIL], y"
    assert q.mask("Ring 020 7946 0123, 2 times") == "Ring [PHONE], 2 times"
    assert q.mask("GB82 WEST 1234 5698 7654 32 IS MINE") == "[IBAN] IS MINE"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_spans_are_in_order_and_inside(text):
    got = q.spans(text)
    assert all(0 <= a < b <= len(text) for a, b, _ in got) and all(x[1] <= y[0] for x, y in zip(got, got[1:]))


# Contrast pairs, conflicts, formats

def row(question, answer, task="t"): return {"instruction": "Reply.", "input": question, "output": answer, "task": task}


def test_a_contrast_pair_is_no_copy():
    a, b = "My tent came 12 days ago and I never used it, can it go back?", "My tent came 60 days ago and I never used it, can it go back?"
    assert q.near_duplicates([row(a, "Yes, gladly. Here is a label."), row(b, "I'm sorry, that is too late for us.")]) == []
    assert [f.row for f in q.near_duplicates([row(a, "Yes, gladly. Here is a label."), row(b, "Yes, gladly. Here is a label!")])] == [1]


def test_one_of_a_chain_of_copies_is_always_kept():
    base = "please tell me where my parcel with the blue tent is now since i wait for it"
    rows = [row(base[:len(base) - 3*i], "On its way.") for i in range(12)]
    dropped = {f.row: f.other for f in q.near_duplicates(rows) if f.action == "drop"}
    assert dropped and all(other not in dropped for other in dropped.values())


def test_conflicts_by_majority_and_by_hand():
    rows = [row("Open?", "Yes, until 6."), row("open? ", "Until 6, yes: from 9."), row("Open?", "Yes, until 6!"), row("Open?", "No.")]
    assert {(f.row, f.action) for f in q.conflicts(rows)} == {(1, "look"), (3, "look")}     # two wordings of a text may both be right
    assert {f.action for f in q.conflicts(rows[2:])} == {"look"}
    labels = [row(f"mail {i//4}", "Till") for i in range(40)] + [row("mail 0", "Boomerang"), row("mail 1", "Boomerang")]
    assert {(f.row, f.action) for f in q.conflicts(labels)} == {(40, "drop"), (41, "drop")}
    assert q.conflicts([row("Open?", "Yes, until 6."), row("Open?", "Yes! We are here until 6.")]) == []


def test_texts_that_say_other_numbers_are_no_copies():
    asks = [f"My order came to £{n}, what do I pay to have it brought to the house?" for n in (88, 74)]
    says = [f"Delivery costs £{n} for an order of that size, and the courier rings before." for n in ("0", "3.50")]
    assert q.near_duplicates([row(*x) for x in zip(asks, says)]) == []
    assert [f.row for f in q.near_duplicates([row(asks[0], says[0]), row(asks[1], says[0])])] == [1]


def test_two_instructions_over_the_same_messages_are_two_questions():
    asks = ["Is the writer angry? yes or no", "Does the writer ask for money? yes or no"]
    rows = [dict(instruction=a, input=f"message number {i} about a tent", output="yes" if (i + j) % 2 else "no", task="t")
            for i in range(20) for j, a in enumerate(asks)]
    assert q.duplicates(rows) == q.conflicts(rows) == q.near_duplicates(rows[:2]) == []
    assert len(q.duplicates(rows + rows[:3])) == 3


@pytest.mark.parametrize("usual,rare", [("spam", "not spam"), ("1", "-1"), ("C", "C++"), ("<=50K", ">50K"), ("👍", "👎"), ("A", "A-"),
                                        ("billing", "billing dispute"), ("12", "1 2"), ("true", "untrue")])
def test_labels_that_resemble_each_other_stay_apart(usual, rare):
    rows = [row(f"question {i}", usual) for i in range(200)] + [row(f"other {i}", rare) for i in range(15)]
    assert q.inconsistent(rows) == []


@pytest.mark.parametrize("odd", ["spam", "Spam.", '"Spam"', "Label: Spam", '{"label": "Spam"}', "**Spam**", " Spam "])
def test_labels_in_another_dress_are_mended(odd):
    rows = [row(f"question {i}", "Spam") for i in range(200)] + [row(f"other {i}", odd) for i in range(2)]
    assert {f.value for f in q.inconsistent(rows)} == {"Spam"}


@pytest.mark.parametrize("answer", ['"Kipper" or "Drover"', "**Kipper** and **Drover**", "'Tis true, and 'twas"])
def test_quotes_inside_an_answer_are_no_wrapping(answer):
    assert q.unwrap(answer) == answer and q.style(answer)["wrapping"] == "nothing"


@pytest.mark.parametrize("answer", ["See https://larkmoor.example/returns", "Write to desk@larkmoor.example", "Gladly 🙂"])
def test_no_stop_is_put_behind_an_address_or_a_face(answer):
    rows = [row(f"question {i}", f"Yes, number {i} is on its way.") for i in range(40)] + [row("other", answer)]
    found = [f for f in q.inconsistent(rows) if f.row == 40]
    assert [(f.action, f.value) for f in found] == [("look", None)]


@pytest.mark.parametrize("text", ["Log: 2024-05-31 12:30", "since 2026-03-04 09:15", "am 31.05.2024 12:30 Uhr", "on 31/05/2024 1230"])
def test_a_date_with_its_time_is_no_phone(text): assert q.spans(text) == [] and q.mask(text) == text


def test_unwrap():
    for t in ('{"answer": "Till"}', '["Till"]', '"Till"', "**Till**", "Answer: Till", "```\nTill```", ' "Answer: **Till**" \n'): assert q.unwrap(t) == "Till"
    for t in ('{"a": "x", "b": "y"}', "[1, 2]", "Till", "", "[" * 5000): assert q.unwrap(t) == t


def test_no_style_no_blame():
    mixed = [row(f"q{i}", ("Yes, it is so" if i % 2 else "Yes, it is so.") + " "*0 + "") for i in range(40)]
    assert not [f for f in q.inconsistent([{**r, "output": f"{r['output'][:8]} {i}{r['output'][8:]}"} for i, r in enumerate(mixed)])]


# The report and the cleaning

@pytest.fixture(scope="module")
def dirty(train, test):
    rows = train[::3]
    for n, kind in enumerate(q.PLANTS): rows = q.plant(rows, kind, .03, n, test).rows
    return rows


@pytest.fixture(scope="module")
def report(dirty, test): return q.audit(dirty, test, corpus="desk")


def test_every_check_says_something(report):
    assert {f.check for f in report.findings} == set(q.CHECKS) == set(report.seconds)
    said = repr(report)
    assert all(c in said for c in q.CHECKS) and "Apache-2.0" in said and "unknown" in repr(q.audit(report.rows, checks=["empty"]))


def test_an_audit_changes_nothing(dirty, test):
    before = json.dumps(dirty)
    q.audit(dirty, test, checks=["empty", "format", "personal"]).clean()
    assert json.dumps(dirty) == before


@pytest.mark.parametrize("actions", [{}, {"label": "mend", "topic": "drop"}, {c: "drop" for c in q.CHECKS if c != "near"}, {c: "look" for c in q.CHECKS}], ids=["as told", "other", "drop all", "look"])
def test_no_row_is_lost_or_changed_in_silence(report, actions, tmp_path):
    done = report.clean(**actions)
    gone = {e["row"] for e in done.log if e["action"] == "drop"}
    assert sorted(gone | set(done.kept)) == list(range(len(report.rows))) and not gone & set(done.kept)
    touched = {(e["row"], e["field"]): e for e in done.log if e["action"] == "mend"}
    for i, r in zip(done.kept, done.dataset):
        for f in r:
            if r[f] != report.rows[i].get(f): assert touched[i, f]["after"] is not None
    for (i, f), e in touched.items():
        if i in done.kept: assert done.dataset[done.kept.index(i)][f] == [x for x in done.log if (x["row"], x["field"]) == (i, f)][-1]["after"]
    lines = done.save_log(tmp_path/"log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(l) for l in lines] == done.log and all({"row", "field", "check", "reason", "action"} <= set(e) for e in done.log)
    if set(actions.values()) == {"look"}: assert not done.log and len(done.dataset) == len(report.rows)


def test_copies_that_mending_makes_go_into_the_log():
    rows = [row(f"question {chr(97 + i)} of many?", "Till" if i % 2 else "Porch") for i in range(20)] + [row("question b of many?", '"Till"')]
    done = q.audit(rows, checks=["duplicate", "format"]).clean()
    assert done.kept == list(range(20)) and [e["action"] for e in done.log if e["row"] == 20] == ["mend", "drop"]
    assert len(q.audit(rows, checks=["format"]).clean(duplicate="look").dataset) == 21


def test_the_log_and_the_page_hold_no_secret(report):
    done = report.clean()
    hit = {f.row: q.spans(report.rows[f.row][f.field]) for f in report.by("personal")}
    secrets = [report.rows[i]["input"][a:b] for i, found in hit.items() for a, b, _ in found]
    page, log = q.report_html(report, 10**6), json.dumps([e for e in done.log if e["check"] == "personal"])
    assert secrets and not [s for s in secrets if len(s) > 9 and (s in page or s in log)]


def test_hostile_text_is_shown_and_never_run(tmp_path):
    bad = "<script>alert(1)</script><img src=x onerror=alert(2)>\x00\u202e & \"'"
    rows = [row(bad, bad, bad), row(bad, bad, bad), row("", bad, bad)]
    r = q.audit(rows, test=[row(bad, "y")])
    page = r.save_html(tmp_path/"page.html").read_text(encoding="utf-8")
    assert r.by("duplicate") and "<script" not in page + r._repr_html_() and "<img" not in page and "&lt;script&gt;" in page
    assert len(r.clean(leak="look").dataset) == 1
    assert list(tmp_path.iterdir()) == [tmp_path/"page.html"]


def test_one_huge_row_and_one_that_is_nothing(train):
    rows = train[:60] + [row("tent " * 100_000, "Till"), row("\u200b", "")]
    r = q.audit(rows)
    assert 60 in {f.row for f in r.findings} and 61 in {f.row for f in r.by("empty")}
    assert len(r._repr_html_()) < 300_000


def test_plots(report):
    import matplotlib; matplotlib.use("agg")
    ax = report.plot()
    assert ax.get_xlabel() == "rows (%)" and len(ax.get_yticklabels()) == len(q.CHECKS)
    ax = q.plot_map(report.rows, most=60)
    assert ax.get_xlabel() and ax.get_legend()


# Bad input

@pytest.mark.parametrize("data, says", [
    ([], "has no rows"), ("mails.csv", "formats.read"), ([{"input": "a", "output": "b"}], r"dataset\[0\] has no field 'instruction'"),
    ([row("a", "b"), row("a", ["b"])], r"dataset\[1\]: 'output' holds a list.*json.dumps"), ([row("a", 3)], "holds a int"), ([row("a\ud800", "b")], r"dataset\[0\]: 'input' holds half a character.*UTF-8"), (["a"], r"dataset\[0\] is a str"),
    ({"input": "a"}, "not rows")])
def test_bad_rows(data, says):
    with pytest.raises(ValueError, match=says): q.audit(data)


def test_bad_requests(report, train):
    for ask, says in ((lambda: q.audit(train[:3], checks=["nonsense"]), "there are empty"), (lambda: report.clean(nonsense="drop"), "write drop, mend or look"),
                      (lambda: report.clean(label="burn"), "write drop"), (lambda: q.plant(train, "nonsense"), "there are duplicate"), (lambda: q.plant(train, "near", 2), "at most 1"),
                      (lambda: q.plant(train, "leak"), "test="), (lambda: q.audit(train[:3], corpus="deks"), "there are desk"), (lambda: q.bands(0), "above 0"),
                      (lambda: q.audit(train[:3], [{"x": 1}]), r"test\[0\] has no field"), (lambda: q.plot_map(train[:5]), "a dozen"),
                      (lambda: q.audit([row("", "")]*3).clean(), "No row would be left"),
                      (lambda: q.plant([row(f"q{i}", f"a{i}") for i in range(30)], "label"), "no row has a task with labels")):
        with pytest.raises(ValueError, match=says): ask()


def test_a_missing_package_is_named_before_the_work(monkeypatch, train):
    monkeypatch.setattr(q, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="'personal' needs phonenumberslite and detect-secrets: pip install.*leave it out"): q.audit(train[:3], checks=["personal"])
    assert q.audit(train[:3], checks=["empty", "format"]).findings == []


def test_missing_values_are_empty_fields():
    rows = Dataset.from_list([row("a?", "b"), row("a", None), row(None, "c")])
    assert {(f.row, f.field) for f in q.audit(rows, checks=["empty"]).findings} == {(1, "output"), (2, "input")}


def test_tiny_and_single_class_sets():
    assert q.audit([row("a?", "b.")]).findings == []
    one = q.audit([row(f"question number {i}?", "Till") for i in range(60)], checks=["label", "format", "topic"])
    assert not one.by("label")
