"`ftcourse.metrics` against sacreBLEU, rouge-score and scikit-learn, on real and made-up outputs"
import csv, random, subprocess, sys
import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings, strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from sklearn.metrics import accuracy_score, confusion_matrix
from sklearn.metrics import precision_recall_fscore_support as sk_prf
from ftcourse import metrics
from ftcourse.metrics import (AVERAGES, ROUGE_KINDS, SMOOTH, TOKENIZERS, accuracy, bleu, bleu_stats,
    confusion, exact_match, f1, fact_recall, lcs_length, lcs_positions, per_class, plainly,
    precision, recall, rouge, rouge_prf, rouge_tokens, show_matches, states, tokenize_13a)
from humans import OFFICIAL, ROOT, needs_e2e, outputs, references, streams, systems

VOCABULARY = "the cat sat on a mat . , 3.50 -5 £20 it's Ünïcode 中文 x-y &amp; <b> … \n".split(" ")
words = st.sampled_from(VOCABULARY)
texts = st.one_of(st.lists(words, max_size=14).map(" ".join), st.text(max_size=30))
rows = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=6)
quick = settings(max_examples=150, deadline=None)


def test_no_torch():
    "Scoring must not need torch, nor wait for it"
    code = "import sys, ftcourse.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# BLEU

@needs_e2e
@pytest.mark.parametrize("system", OFFICIAL)
def test_bleu_is_the_official_one(system):
    ours = bleu(outputs(system), references(), lowercase=True)
    assert round(ours.value/100, 4) == OFFICIAL[system]


@needs_e2e
def test_bleu_equals_sacrebleu_on_every_system():
    refs, checked = references(), 0
    for lowercase in (True, False):
        theirs = BLEU(lowercase=lowercase, force=True, references=streams(refs))
        for system in systems():
            hyps = outputs(system)
            stats = theirs._extract_corpus_statistics(hyps, None)
            ours = bleu(hyps, refs, lowercase=lowercase)
            assert np.array_equal(ours.stats, np.array(stats)), system   # each sentence's counts
            assert abs(ours.value - theirs.corpus_score(hyps, None).score) < 1e-9
            checked += len(hyps)
    assert checked == 2*21*630


@needs_e2e
@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("tokenize", TOKENIZERS)
def test_bleu_settings(smooth, tokenize):
    hyps, refs = outputs("chen")[:100], references()[:100]
    ours = bleu(hyps, refs, tokenize=tokenize, smooth=smooth)
    theirs = sacrebleu.corpus_bleu(hyps, streams(refs), smooth_method=smooth, tokenize=tokenize,
                                   force=True)
    assert abs(ours.value - theirs.score) < 1e-9


@quick
@given(rows, st.sampled_from(list(TOKENIZERS)), st.booleans(),
       st.sampled_from(list(SMOOTH)), st.booleans())
def test_bleu_equals_sacrebleu_on_anything(pairs, tokenize, lowercase, smooth, effective):
    hyps, refs = [h for h, _ in pairs], [r for _, r in pairs]
    ours = bleu(hyps, refs, tokenize, lowercase, smooth, effective)
    theirs = BLEU(tokenize=tokenize, lowercase=lowercase, smooth_method=smooth,
                  effective_order=effective, force=True)
    assert abs(ours.value - theirs.corpus_score(hyps, streams(refs)).score) < 1e-9
    for h, r, s in zip(hyps, refs, ours.rows()):
        assert abs(s - theirs.sentence_score(h, r).score) < 1e-9


@quick
@given(texts)
def test_tokenizers_equal_sacrebleus(text):
    for name, ours in TOKENIZERS.items():
        assert ours(text.rstrip()) == BLEU(tokenize=name).tokenizer(text.rstrip()).split()


@quick
@given(rows)
def test_bleu_properties(pairs):
    hyps, refs = [h for h, _ in pairs], [r for _, r in pairs]
    score, order = bleu(hyps, refs), random.Random(0).sample(range(len(hyps)), len(hyps))
    assert -1e-9 <= score.value <= 100 + 1e-9
    moved = bleu([hyps[i] for i in order], [refs[i] for i in order])
    assert abs(score.value - moved.value) < 1e-9                   # the order of rows is nothing
    more = bleu(hyps, [r + [h] for h, r in zip(hyps, refs)])   # the reply itself as a reference
    assert np.all(more.stats[:, 2:6] >= score.stats[:, 2:6])        # can only add matches
    if any(len(tokenize_13a(h)) > 3 for h in hyps): assert more.value == pytest.approx(100)


def test_bleu_of_identical_texts_and_of_nothing():
    texts = ["The parcel is on its way to you.", "No, it can't be returned after 40 days."]
    assert bleu(texts, texts).value == pytest.approx(100)
    assert bleu(["", ""], texts).value == 0
    assert bleu(texts, ["", ""]).value == 0
    begins = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"   # as sacreBLEU writes it
    assert bleu(texts, texts).signature.startswith(begins)
    assert "nrefs:var" in bleu(texts, [["a"], ["a", "b"]]).signature


def test_bleu_nearest_length_prefers_the_shorter():
    assert bleu_stats("a b c d", ["a b c d e f", "a b"], "13a", False)[:2] == [4, 2]


# ROUGE

@needs_e2e
def test_rouge_equals_rouge_score_on_real_outputs():
    scorer, checked = RougeScorer(["rouge1", "rouge2", "rougeL"]), 0
    for system in ("tgen", "chen", "adapt", "sheff2"):
        hyps, refs = outputs(system), references()
        theirs = [scorer.score_multi(r, h) for h, r in zip(hyps, refs)]
        for kind in ("1", "2", "L"):
            for part, attr in (("precision", "precision"), ("recall", "recall"), ("f", "fmeasure")):
                expected = np.array([100*getattr(t[f"rouge{kind}"], attr) for t in theirs])
                assert np.abs(rouge(hyps, refs, kind, part).rows() - expected).max() < 1e-9
        checked += len(hyps)
    assert checked >= 2500


@needs_e2e
def test_rouge_lsum_on_real_texts_of_several_lines():
    def lines(text): return text.replace(". ", ".\n")
    hyps = [*map(lines, outputs("tgen")[:300])]
    refs = [[*map(lines, r)] for r in references()[:300]]
    assert sum("\n" in h for h in hyps) > 50
    scorer = RougeScorer(["rougeLsum"])
    theirs = [100*scorer.score_multi(r, h)["rougeLsum"].fmeasure for h, r in zip(hyps, refs)]
    assert np.abs(rouge(hyps, refs, "Lsum").rows() - theirs).max() < 1e-9


@quick
@given(texts, texts, st.booleans())
def test_rouge_equals_rouge_score_on_anything(hyp, ref, stem):
    from nltk.stem.porter import PorterStemmer
    theirs = RougeScorer([f"rouge{k}" for k in ROUGE_KINDS], use_stemmer=stem).score(ref, hyp)
    for kind in ROUGE_KINDS:
        ours = rouge_prf(hyp, ref, kind, PorterStemmer().stem if stem else None)
        assert np.abs(np.array(ours) - np.array(theirs[f"rouge{kind}"])).max() < 1e-12, kind


@quick
@given(rows, st.sampled_from(["1", "2"]), st.booleans(), st.booleans())
def test_rouge_of_many_rows_at_once(pairs, kind, stem, small):
    "Counted for all rows together, and also where the numbers have to be kept small"
    from nltk.stem.porter import PorterStemmer
    hyps, refs = [h for h, _ in pairs], [r for _, r in pairs]
    scorer = RougeScorer([f"rouge{kind}"], use_stemmer=stem)
    theirs = [scorer.score_multi(r, h)[f"rouge{kind}"] for h, r in zip(hyps, refs)]
    with pytest.MonkeyPatch.context() as m:
        if small: m.setattr(metrics, "_LARGEST", 1)
        ours = rouge(hyps, refs, kind, stem=PorterStemmer().stem if stem else None)
    assert np.abs(ours.stats[:, :3] - np.array(theirs)).max() < 1e-12


def test_rouge_stems_each_word_once():
    asked = []
    def stem(word): asked.append(word); return word[:4]
    s = rouge(["walking walked", "walking on"], ["walks walked", "walker on"], "1", stem=stem)
    assert s.value == 100 and sorted(asked) == ["walked", "walker", "walking", "walks"]


@quick
@given(rows)
def test_rouge_properties(pairs):
    hyps, refs = [h for h, _ in pairs], [r for _, r in pairs]
    for kind in ROUGE_KINDS:
        s = rouge(hyps, refs, kind).rows()
        assert np.all((s >= 0) & (s <= 100 + 1e-9))
        more = rouge(hyps, [r + ["the cat"] for r in refs], kind).rows()
        assert np.all(more >= s)   # the best of more references
        same = rouge(hyps, hyps, kind).rows()
        enough = np.array([len(rouge_tokens(h)) > 1 for h in hyps])
        assert np.allclose(same[enough], 100)


@quick
@given(st.lists(st.sampled_from("abc"), max_size=70),
       st.lists(st.sampled_from("abcd"), max_size=70))
def test_lcs(a, b):
    t = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            t[i, j] = t[i-1, j-1] + 1 if x == y else max(t[i-1, j], t[i, j-1])
    assert lcs_length(a, b) == lcs_length(b, a) == t[-1, -1] == len(lcs_positions(a, b))


# labels

label_rows = st.integers(1, 40).flatmap(lambda n: st.tuples(
    st.lists(st.sampled_from("abcde"), min_size=n, max_size=n),
    st.lists(st.sampled_from("abcdefg"), min_size=n, max_size=n)))


def assert_equal_to_sklearn(y_true, y_pred):
    labels = sorted(set(y_true))
    for average in AVERAGES:
        theirs = sk_prf(y_true, y_pred, average=average, labels=labels, zero_division=0)
        for ours, x in zip((precision, recall, f1), theirs):
            assert abs(ours(y_true, y_pred, average).value/100 - x) <= 1e-12
    theirs = sk_prf(y_true, y_pred, average=None, labels=labels, zero_division=0)
    for label, *x in zip(labels, *theirs):
        p = per_class(y_true, y_pred)[label]
        assert np.abs(np.array([p["precision"], p["recall"], p["f1"]])/100 - x[:3]).max() <= 1e-12
        assert p["n"] == x[3]
    assert abs(accuracy(y_true, y_pred).value/100 - accuracy_score(y_true, y_pred)) <= 1e-12
    known = confusion(y_true, y_pred).counts[:, :-1]
    assert np.array_equal(known, confusion_matrix(y_true, y_pred, labels=labels))


@pytest.mark.filterwarnings("ignore:A single label was found")
@quick
@given(label_rows)
def test_labels_equal_sklearn_on_anything(columns): assert_equal_to_sklearn(*columns)


@pytest.mark.skipif(not (ROOT/"banking77").is_dir(), reason="needs banking77: set FTCOURSE_DATA")
def test_labels_equal_sklearn_on_banking77():
    "3,080 real labels; predictions by a nearest-neighbour rule, 5% of them labels nobody knows"
    def read(split):
        with open(ROOT/"banking77"/f"{split}.csv", encoding="utf-8") as f: return [*csv.DictReader(f)]
    test, train, rng = read("test"), read("train")[::10], random.Random(0)
    pool = [(set(r["text"].lower().split()), r["category"]) for r in train]
    def guess(text):
        w = set(text.lower().split())
        return max(pool, key=lambda p: len(p[0] & w)/len(p[0] | w))[1]
    y_true = [r["category"] for r in test]
    y_pred = ["no such intent" if rng.random() < .05 else guess(r["text"]) for r in test]
    assert len(y_true) == 3080
    assert_equal_to_sklearn(y_true, y_pred)


@quick
@given(label_rows)
def test_label_properties(columns):
    y_true, y_pred = columns
    for average in AVERAGES:
        assert 0 <= f1(y_true, y_pred, average).value <= 100 + 1e-9
        assert f1(y_true, y_true, average).value == pytest.approx(100)
    assert f1(y_true[::-1], y_pred[::-1]).value == pytest.approx(f1(y_true, y_pred).value)
    mended = [y_true[0], *y_pred[1:]]   # one more right answer can't lower the accuracy
    assert accuracy(y_true, mended).value >= accuracy(y_true, y_pred).value


def test_an_invented_label_is_wrong_and_no_class():
    y = ["Till"]*5 + ["Porch"]*5
    assert f1(y, ["Tills", *y[1:]]).value > 90
    assert confusion(y, ["Tills", *y[1:]]).counts[1].tolist() == [0, 4, 1]


def test_statistics_resample_like_rows():
    "Score of resampled rows == score of resampled statistics: what a bootstrap rests on"
    rng = np.random.default_rng(0)
    y_true, y_pred = rng.choice(list("abcd"), 200).tolist(), rng.choice(list("abcde"), 200).tolist()
    pick = rng.integers(200, size=200)
    for metric in (accuracy, f1, precision, recall):
        s = metric(y_true, y_pred)
        again = metric([y_true[i] for i in pick], [y_pred[i] for i in pick])
        assert float(s.fn(s.stats[pick].sum(0))) == pytest.approx(again.value)


# facts

def test_facts():
    assert plainly("Forty-five  DAYS") == plainly("45 days") == plainly("forty five days")
    assert plainly("£1,250,000") == "£1250000" and plainly("5–7") == "5-7"
    assert states("You have 45 days.", "45 days") and states("You have forty-five days", "45 days")
    for reply, fact in (("You have 45 days.", "5 days"), ("It is £3.50.", "£3"), ("1.30 pm", "30"),
                        ("2.5 kg", "5 kg"), ("everyone", "one")):
        assert not states(reply, fact), (reply, fact)
    s = fact_recall(["45 days, £3.50.", "no"], [["45 days", "£3.50"], ["free", "no"]])
    assert s.value == 75 and s.rows().tolist() == [100, 50]
    assert fact_recall(["x", "a b"], [[], ["a b"]]).value == 100


@quick
@given(texts)
def test_a_text_states_itself(text):
    if plainly(text).strip(" ."): assert states(text, text)


def test_exact_match(): assert exact_match(["a ", "b"], [["x", "a"], ["c"]]).value == 50


def test_bundled_references_state_their_facts():
    from ftcourse.corpora import load
    found = [r for r in load("desk", "test") if r["task"] == "answer"]
    assert fact_recall([r["output"] for r in found], [r["facts"] for r in found]).value == 100


# errors name row, field and remedy

@pytest.mark.parametrize("call, says", [
    (lambda: bleu(["a"], [["a"], ["b"]]), "1 hyps but 2 refs"),
    (lambda: bleu([], []), "no rows"),
    (lambda: bleu(["a", None], ["a", "b"]), "row 1: hyps is None"),
    (lambda: bleu(["a", 3], ["a", "b"]), "row 1: hyps holds int"),
    (lambda: rouge(["a", "b"], ["a", None]), "row 1: refs is None"),
    (lambda: rouge(["a", "b"], [["a"], []]), "row 1: refs is an empty list"),
    (lambda: bleu(["a"], [["a", None]]), "row 0: refs holds None"),
    (lambda: bleu("a", "a"), "not one string"),
    (lambda: bleu(["a"], ["a"], tokenize="zh"), "choose one of 13a"),
    (lambda: bleu(["a"], ["a"], smooth="x"), "choose one of exp"),
    (lambda: rouge(["a"], ["a"], "L2"), "choose one of 1, 2, L"),
    (lambda: bleu([float("nan"), "a"], ["a", "b"]), "row 0: hyps is nan"),
    (lambda: rouge(["a", "b"], ["a", float("nan")]), "row 1: refs is nan. Fill it in"),
    (lambda: bleu(["a"], [b"abc"]), "row 0: refs holds b'abc', not text"),
    (lambda: rouge(["a"], [[b"a"]], "2"), "row 0: refs holds b'a', not text"),
    (lambda: bleu(["a"], [{"a": 1}]), "row 0: refs holds {'a': 1}, not text"),
    (lambda: rouge_prf("a", None, "1"), "row 0: refs is None"),
    (lambda: exact_match(["a"], [5]), "row 0: refs holds 5"),
    (lambda: accuracy(["a", float("nan")], ["a", "b"]), "row 1: y_true is nan. Fill it in"),
    (lambda: f1(["a", "b"], ["a", np.nan]), "row 1: y_pred is nan. Give the empty string"),
    (lambda: accuracy([1, 0], ["1", "0"]), "y_true holds int, y_pred holds str: no label can be"),
    (lambda: f1(["a", "b"], [b"a", b"b"]), "y_true holds str, y_pred holds bytes"),
    (lambda: per_class(["a"], [["a"]]), "row 0: y_pred is ['a'], and a label is one value"),
    (lambda: precision(["a"], ["a"], labels=[]), "row 0: y_true is 'a'"),
    (lambda: fact_recall([b"a"], [["a"]]), "row 0: hyps holds b'a', not text"),
    (lambda: fact_recall(["a", None], [["a"], ["a"]]), "row 1: hyps is None"),
    (lambda: fact_recall(["a", "b"], [["a"], ["b", None]]), "row 1: facts holds None"),
    (lambda: fact_recall(["a"], [5]), "row 0: facts holds 5"),
    (lambda: fact_recall(["a"], [b"45"]), "row 0: facts holds b'45'"),
    (lambda: fact_recall(["a"], [{"days": 45}]), "row 0: facts holds {'days': 45}"),
    (lambda: accuracy(["a"], []), "1 y_true but 0 y_pred"),
    (lambda: f1(["a", "b"], ["a", None]), "row 1: y_pred is None"),
    (lambda: f1(["a", "b"], ["a", "b"], average="mean"), "choose one of macro"),
    (lambda: f1(["a", "b"], ["a", "b"], labels=["a"]), "row 1: y_true is 'b'"),
    (lambda: confusion(["a", "b"], ["a", "b"], labels=["a"]), "row 1: y_true is 'b'"),
    (lambda: fact_recall(["a"], ["45 days"]), "write ['45 days']"),
    (lambda: fact_recall(["a"], [[]]), "no row has facts"),
    (lambda: fact_recall(["a"], [["."]]), "an empty fact"),
])
def test_errors(call, says):
    with pytest.raises(ValueError) as e: call()
    assert says in str(e.value)


def test_corner_cases_have_the_usual_values():
    "Documented values, as scikit-learn and rouge-score give them; not errors"
    one, other = ["a"]*4, ["b"]*4
    assert accuracy(one, one).value == f1(one, one).value == 100          # one class, all right
    assert accuracy(one, other).value == f1(one, other).value == 0        # a label nobody knows
    for average in AVERAGES:
        theirs = sk_prf(["a", "b"], ["z", "b"], average=average, labels=["a", "b"], zero_division=0)
        got = [fn(["a", "b"], ["z", "b"], average).value for fn in (precision, recall, f1)]
        assert np.allclose(got, 100*np.array(theirs[:3]))
    assert confusion(["a", "b"], ["z", "b"]).counts.tolist() == [[0, 0, 1], [0, 1, 0]]
    for kind in ROUGE_KINDS:
        assert rouge(["", "!", "a b"], ["a b", "a b", "a b"], kind).rows().tolist() == [0, 0, 100]
        assert rouge(["", "a b"], [["", "?"], [""]], kind).rows().tolist() == [0, 0]
    assert fact_recall(["", "45 days"], [["45 days"], []]).value == 0     # no facts: does not count
    assert exact_match(["", " "], [[""], ["a", ""]]).value == 100


def test_html_is_escaped():
    shown = show_matches("<script>alert(1)</script> & more", ["more"], tokenize="none")
    assert "<script" not in shown and "&lt;script&gt;" in shown and shown._repr_html_() == shown
