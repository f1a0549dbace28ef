"What lesson 07b adds to `ftcourse.metrics`, against sacreBLEU, NLTK, official figures and the papers' formulas"
import itertools, json, math, random, socket, subprocess, sys, time
from collections import Counter
from functools import partial
import nltk, nltk.corpus
import numpy as np
import pytest
import sacrebleu
from hypothesis import assume, given, settings, strategies as st
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import corpus_nist
from sacrebleu.metrics import CHRF, TER
from ftcourse import metrics
from ftcourse.metrics import (NIST_REFS, as_evaluate, bits_per_byte, bleu, caption_words, chrf,
    chrf_words, cider, entity_finder, entity_score, information, json_f1, json_fields, meteor,
    meteor_pairs, nist, perplexity, rouge, ter, ter_edits, token_f1, tokenize_13a, wordnet_synonyms)
from humans import CIDER, NIST, ROOT, needs_e2e, outputs, references, streams, systems, tables
from test_metrics import quick, rows, texts

stem = PorterStemmer().stem
WORDS = "the cat sat on a mat and ran to 12 days within return returned returning . ,".split()
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join)
sentence_rows = st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)),
                         min_size=1, max_size=4)


def columns(pairs): return [h for h, _ in pairs], [r for _, r in pairs]


def tail(signature): return signature.split("|version")[0]


# chrF

@needs_e2e
def test_chrf_equals_sacrebleu_on_real_outputs():
    "Each row's counts, so each row's choice among its references too"
    refs, checked = references(), 0
    for order, names in ((2, systems()[::3]), (0, systems()[1::8])):
        theirs = CHRF(word_order=order, references=streams(refs))
        for system in names:
            hyps = outputs(system)
            ours, stats = chrf(hyps, refs, order), theirs._extract_corpus_statistics(hyps, None)
            assert np.array_equal(ours.stats, np.array(stats)), system
            assert abs(ours.value - theirs._aggregate_and_compute(stats).score) < 1e-9
            checked += len(hyps)
    assert checked == 10*630


@quick
@given(rows, st.sampled_from([0, 1, 2]), st.booleans(), st.sampled_from([1, 2, 3]))
def test_chrf_equals_sacrebleu_on_anything(pairs, order, lowercase, beta):
    hyps, refs = columns(pairs)
    ours = chrf(hyps, refs, order, beta=beta, lowercase=lowercase)
    theirs = CHRF(word_order=order, beta=beta, lowercase=lowercase)
    assert abs(ours.value - theirs.corpus_score(hyps, streams(refs)).score) < 1e-9
    for h, r, s in zip(hyps, refs, ours.rows()):
        assert abs(s - theirs.sentence_score(h, r).score) < 1e-9


@quick
@given(texts)
def test_chrf_words(text): assert chrf_words(text) == CHRF()._remove_punctuation(text)


def test_large_alphabets_are_renumbered():
    "With 3,000 different characters six of them don't fit into 63 bits"
    rng = random.Random(0)
    hyps = ["".join(chr(0x4e00 + rng.randrange(3000)) for _ in range(60)) for _ in range(60)]
    refs = [h[:30] + h[35:] for h in hyps]
    theirs = sacrebleu.corpus_chrf(hyps, [refs]).score
    assert abs(chrf(hyps, refs).value - theirs) < 1e-9 and 20 < theirs < 95


# TER

@needs_e2e
def test_ter_equals_sacrebleu_on_every_system():
    refs, theirs, checked = references(), TER(), 0
    for k, system in enumerate(systems()):
        at = range(k, 630, 90)
        hyps, rows_ = [outputs(system)[i] for i in at], [refs[i] for i in at]
        ours, stats = ter(hyps, rows_), theirs._extract_corpus_statistics(hyps, streams(rows_))
        assert np.abs(ours.stats - np.array(stats)).max() < 1e-9, system   # each row's edits and length
        assert abs(ours.value - theirs._aggregate_and_compute(stats).score) < 1e-9
        checked += sum(map(len, rows_))
    assert checked > 1000   # pairs of a reply and a reference


@needs_e2e
def test_ter_beyond_the_band():
    "Five replies glued together: longer than Tercom's band of 25 words, where the table counts"
    flat, refs = ([" ".join(outputs(s)[i+k:i+k+5]) for i in (0, 100)] for s, k in (("tgen", 0), ("slug", 1)))
    assert max(len(t.split()) for t in refs) > 60
    assert abs(ter(flat, refs).value - sacrebleu.corpus_ter(flat, [refs]).score) < 1e-9
    few = [r.split()[0] for r in refs]
    for a, b in ((few, refs), (refs, few)):
        assert abs(ter(a, b).value - sacrebleu.corpus_ter(a, [b]).score) < 1e-9


@quick
@given(st.one_of(rows, sentence_rows), st.booleans())
def test_ter_equals_sacrebleu_on_anything(pairs, lowercase):
    hyps, refs = columns(pairs)
    theirs = TER(case_sensitive=not lowercase)
    ours = ter(hyps, refs, lowercase)
    assert abs(ours.value - theirs.corpus_score(hyps, streams(refs)).score) < 1e-9
    for h, r, s in zip(hyps, refs, ours.rows()):
        assert abs(s - theirs.sentence_score(h, r).score) < 1e-9


@quick
@given(st.lists(st.sampled_from("abcd"), max_size=30), st.lists(st.sampled_from("abcde"), min_size=1, max_size=30))
def test_distance(a, b):
    t = [*range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1): row.append(min(t[j-1] + (x != y), t[j] + 1, row[j-1] + 1))
        t = row
    assert metrics._distance(a, metrics._places(b), len(b)) == t[-1]
    assert ter_edits(a, b) <= t[-1]   # a move never makes it worse


# signatures

def test_signatures_say_what_sacrebleus_say():
    hyps, refs = ["a b c", "d"], ["a b", "d e"]
    for ours, theirs in (
        (chrf(hyps, refs), CHRF()), (chrf(hyps, refs, 2), CHRF(word_order=2)),
        (chrf(hyps, refs, lowercase=True), CHRF(lowercase=True)), (ter(hyps, refs), TER()),
        (ter(hyps, refs, lowercase=False), TER(case_sensitive=True)),
        *((bleu(hyps, refs, t, smooth=s), sacrebleu.metrics.BLEU(tokenize=t, smooth_method=s))
          for t in metrics.TOKENIZERS for s in metrics.SMOOTH)):
        theirs.corpus_score(hyps, [refs])
        assert tail(ours.signature) == tail(str(theirs.get_signature()))
    assert "nrefs:var" in chrf(hyps, [["a"], ["d", "e"]]).signature
    assert "alg:meteor-2007|modules:exact+stem" in meteor(hyps, refs, stem=stem).signature
    assert "match:any" in nist(hyps, refs).signature and "alg:cider-d" in cider(hyps, refs).signature


# METEOR

class Sets:
    "Looks like NLTK's WordNet reader; knows the synonyms it was given"
    def __init__(self, known): self.known = known
    def synsets(self, word):
        lemma = lambda name: type("Lemma", (), {"name": lambda self: name})()
        found = [lemma(n) for n in self.known.get(word, ())]
        return [type("Synset", (), {"lemmas": lambda self: found})()]


class Same:
    def stem(self, word): return word


SYNONYMS = {"cat": ["mat", "the"], "sat": ["ran"], "return": ["ran", "cat"], "a": ["the"]}


def nltk_meteor(hyps, refs, stemmer=Same(), known=(), **kw):
    return 100*np.array([meteor_score([tokenize_13a(r) for r in row], tokenize_13a(h), stemmer=stemmer,
                                      wordnet=Sets(dict(known)), **kw) for h, row in zip(hyps, refs)])


@needs_e2e
def test_meteor_equals_nltk_on_real_outputs():
    refs, checked = references(), 0
    for system, at in (("tgen", slice(None)), *((s, slice(0, 630, 15)) for s in systems())):
        hyps, rows_ = outputs(system)[at], refs[at]
        assert np.abs(meteor(hyps, rows_).rows() - nltk_meteor(hyps, rows_)).max() < 1e-9
        checked += len(hyps)
    hyps, rows_ = outputs("slug")[:100], refs[:100]
    theirs = nltk_meteor(hyps, rows_, PorterStemmer())
    assert np.abs(meteor(hyps, rows_, stem=stem).rows() - theirs).max() < 1e-9
    assert meteor(hyps, rows_, stem=stem).value > meteor(hyps, rows_).value   # the module does something
    assert checked > 1400


@quick
@given(st.one_of(rows, sentence_rows), st.booleans(), st.booleans())
def test_meteor_equals_nltk_on_anything(pairs, stems, synonyms):
    hyps, refs = columns(pairs)
    known = SYNONYMS if synonyms else {}
    ours = meteor(hyps, refs, stem=stem if stems else None,
                  synonyms=(lambda w: known.get(w, ())) if synonyms else None)
    theirs = nltk_meteor(hyps, refs, PorterStemmer() if stems else Same(), known)
    assert np.abs(ours.rows() - theirs).max() < 1e-9


@quick
@given(sentences, sentences, st.floats(.1, .9), st.floats(.1, 4), st.floats(0, 1))
def test_meteor_constants(h, r, alpha, beta, gamma):
    ours = meteor([h], [r], alpha=alpha, beta=beta, gamma=gamma).value
    assert abs(ours - nltk_meteor([h], [[r]], alpha=alpha, beta=beta, gamma=gamma)[0]) < 1e-9


LEXNAMES = ("adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
            "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
            "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state noun.substance "
            "noun.time verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption verb.contact "
            "verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl").split()


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    "NLTK's reader over a real WordNet: the one NLTK has, or Debian's two packages with the one list that they leave out"
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    try: return WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)
    except LookupError: pass
    for command in ("apt-get download wordnet-base wordnet-sense-index", "for d in *.deb; do dpkg -x $d . || exit 1; done"):
        if subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True).returncode:
            pytest.skip(f"no WordNet, and `{command}` failed: python -m nltk.downloader wordnet")
    data, part = tmp_path/"corpora"/"wordnet", dict(noun=1, verb=2, adj=3, adv=4)
    data.parent.mkdir()
    (tmp_path/"usr/share/wordnet").rename(data)
    (data/"lexnames").write_text("".join(f"{i:02}\t{n}\t{part[n.split('.')[0]]}\n" for i, n in enumerate(LEXNAMES)))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])   # NLTK opens files below its own path only
    return WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)


@needs_e2e
@pytest.mark.filterwarnings("ignore:The multilingual functions")
def test_meteor_with_a_real_wordnet_equals_nltk(wordnet):
    synonyms = wordnet_synonyms(wordnet)
    assert "place" in synonyms("located") and not any("_" in w for w in synonyms("turn"))
    refs = references()[:150]
    for system in ("tgen", "slug"):
        hyps = outputs(system)[:150]
        theirs = 100*np.array([meteor_score([tokenize_13a(r) for r in row], tokenize_13a(h), wordnet=wordnet)
                               for h, row in zip(hyps, refs)])
        ours = meteor(hyps, refs, stem=stem, synonyms=synonyms)
        assert np.abs(ours.rows() - theirs).max() < 1e-9
        assert ours.value > meteor(hyps, refs, stem=stem).value and "modules:exact+stem+synonym" in ours.signature


def test_without_a_wordnet_the_error_says_what_to_do(monkeypatch):
    from nltk.corpus.util import LazyCorpusLoader
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
    with pytest.raises(LookupError, match="nltk.downloader wordnet"): wordnet_synonyms()


def test_meteor_of_the_thread():
    "nltk#2655: NLTK gave .6838, where WordNet pairs located and place"
    hyp = "Alimentum is located in the city centre. It is not family-friendly."
    ref = "There is a place in the city centre, Alimentum, that is not family-friendly."
    s = meteor([hyp], [ref], synonyms=lambda w: {"place"} if w == "located" else ())
    assert round(s.value/100, 4) == .6838
    assert meteor_pairs("a b a".split(), "a c a b".split()) == [(0, 0), (1, 3), (2, 2)]


# NIST

@needs_e2e
@pytest.mark.parametrize("system", NIST)
def test_nist_is_the_official_one(system):
    assert round(nist(outputs(system), references()).value, 4) == NIST[system]


def nltk_nist(hyps, refs):
    cut = [[tokenize_13a(r.lower()) for r in row] for row in refs]
    return corpus_nist(cut, [tokenize_13a(h.lower()) for h in hyps])


@needs_e2e
def test_nist_equals_nltk_on_real_outputs():
    refs, at = references()[:105], slice(105)
    for system in ("tgen", "chen", "zhang"):
        assert abs(nist(outputs(system)[at], refs, match="best").value - nltk_nist(outputs(system)[at], refs)) < 1e-9


@quick
@given(sentence_rows)
def test_nist_equals_nltk_on_anything(pairs):
    hyps, refs = columns(pairs)
    assume(max(len(tokenize_13a(h)) for h in hyps) >= 5)   # NLTK divides by the number of 5-grams
    assert abs(nist(hyps, refs, match="best").value - nltk_nist(hyps, refs)) < 1e-9


@quick
@given(rows, st.sampled_from(NIST_REFS))
def test_nist_properties(pairs, match):
    hyps, refs = columns(pairs)
    s = nist(hyps, refs, match=match)
    assert s.value >= 0 and np.isfinite(s.value)
    order = random.Random(0).sample(range(len(hyps)), len(hyps))
    moved = nist([hyps[i] for i in order], [refs[i] for i in order], match=match)
    assert abs(moved.value - s.value) < 1e-9
    assert all(b >= 0 for b in information([tokenize_13a(r) for row in refs for r in row]).values())


# CIDEr, from the paper's equations, with vectors over a fixed list of n-grams

def paper_cider(hyps, refs, n=4, sigma=6.):
    "Vedantam et al. 2015, section 3 and, with `sigma`, section 7's D; straight, with dense vectors"
    cut = [[caption_words(r) for r in row] for row in refs]
    hs, scores = [caption_words(h) for h in hyps], np.zeros(len(hyps))
    def grams(t, k): return [tuple(t[i:i+k]) for i in range(len(t) - k + 1)]
    for k in range(1, n + 1):
        index = {g: i for i, g in enumerate(sorted({g for t in [*hs, *itertools.chain(*cut)] for g in grams(t, k)}))}
        documents = np.zeros(len(index))
        for row in cut:
            for g in {g for t in row for g in grams(t, k)}: documents[index[g]] += 1
        weight = np.log(len(cut)/np.maximum(1, documents))
        def g_k(t):
            v = np.zeros(len(index))
            for g in grams(t, k): v[index[g]] += 1
            return v*weight
        for i, (h, row) in enumerate(zip(hs, cut)):
            a = g_k(h)
            for r in row:
                b = g_k(r)
                size = np.linalg.norm(a)*np.linalg.norm(b)
                if not size: continue
                near = np.exp(-((len(h) - len(r))**2)/(2*sigma**2)) if sigma else 1
                scores[i] += near * ((np.minimum(a, b) if sigma else a) @ b)/size/len(row)
    return 10*scores/n


@needs_e2e
@pytest.mark.parametrize("sigma", [6., None])
def test_cider_is_the_papers_formula(sigma):
    at = slice(0, 630, 7)
    hyps, refs = outputs("tgen")[at], references()[at]
    assert np.abs(cider(hyps, refs, sigma=sigma).rows() - paper_cider(hyps, refs, sigma=sigma)).max() < 1e-9
    scrambled = hyps[7:] + hyps[:7]
    assert np.abs(cider(scrambled, refs, sigma=sigma).rows() - paper_cider(scrambled, refs, sigma=sigma)).max() < 1e-9


@needs_e2e
@pytest.mark.parametrize("system", CIDER)
def test_cider_is_the_published_one_but_for_the_tokeniser(system):
    assert abs(cider(outputs(system), references()).value - CIDER[system]) < 1e-3


@quick
@given(sentence_rows, st.sampled_from([6., None]))
def test_cider_properties(pairs, sigma):
    hyps, refs = columns(pairs*2)
    s = cider(hyps, refs, sigma=sigma)
    assert np.all((s.rows() >= 0) & (s.rows() <= 10 + 1e-9))
    assert np.abs(s.rows() - paper_cider(hyps, refs, sigma=sigma)).max() < 1e-9
    assert abs(cider(hyps[::-1], refs[::-1], sigma=sigma).value - s.value) < 1e-9


# token F1

@quick
@given(texts, texts)
def test_token_f1(h, r):
    import re, string
    def normalise(s):   # as in SQuAD's evaluate-v2.0
        s = "".join(c for c in s.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split()).split()
    a, b = normalise(h), normalise(r)
    both = sum((Counter(a) & Counter(b)).values())
    if not a or not b: expected = float(a == b)
    elif not both: expected = 0
    else: p, q = both/len(a), both/len(b); expected = 2*p*q/(p + q)
    assert abs(token_f1([h], [r]).value - 100*expected) < 1e-9
    assert abs(token_f1([r], [h]).value - 100*expected) < 1e-9


# JSON

values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from(["a", "b c", ""])),
                      lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.sampled_from("klm"), x, max_size=3)),
                      max_leaves=8)
forms = st.dictionaries(st.sampled_from(["order", "items", "sent"]), values, min_size=1, max_size=3)


@quick
@given(forms, forms)
def test_json_f1(a, b):
    def leaves(x, path=()):
        if isinstance(x, dict) and x: return [l for k, v in x.items() for l in leaves(v, (*path, k))]
        if isinstance(x, list) and x: return [l for v in x for l in leaves(v, (*path, "[]"))]
        return [(path, json.dumps(x))]
    x, y = leaves(a), leaves(b)
    right = sum(min(x.count(l), y.count(l)) for l in set(x))
    s = json_f1([f"Here: {json.dumps(a)} so."], [b])
    assert s.stats.tolist() == [[right, len(x), len(y)]]
    assert abs(s.value - 100*2*right/(len(x) + len(y))) < 1e-9
    assert json_f1([json.dumps(a)], [json.dumps(a)]).value == 100
    assert 0 <= json_f1([json.dumps(a)], [b], "precision").value <= 100


def test_json_that_is_broken_or_odd():
    want = {"order": "K-1", "items": ["tent", "mat"], "gift": True}
    assert json_f1(['{"order": "K-1", "items": ["mat", "tent"], "gift": true}'], [want]).value == 100
    assert json_f1(['{"order": "K-1", "items": ["mat", "tent"], "gift": 1}'], [want]).value == 75
    assert json_f1(['```json\n{"order": "K-1"}\n```'], [want]).stats.tolist() == [[1, 1, 4]]
    for broken in ("", "no", '{"order": "K-1"', "[" * 100_000, "5", "null"):
        assert json_f1([broken], [want]).stats.tolist() == [[0, 0, 4]], broken
    assert json_fields('["a", "a"]') == Counter({("[]", "str", "a"): 2})
    assert json_f1(['{"n": 1}'], ['{"n": 1.0}']).value == 100 and json_f1(['{"n": "1"}'], [{"n": 1}]).value == 0


# entities

KB = {"Rime": (), "Rime sleeping bag": ("Rime bag",), "45 days": ("six and a half weeks",), "£3": (), "£3.50": ()}


def test_entities():
    find = entity_finder(KB)
    assert find("A RIME sleeping bag, forty-five days") == {"Rime sleeping bag", "45 days"}
    assert find("the Rime bag for £3.50") == {"Rime sleeping bag", "£3.50"}
    assert find("145 days, Rimes, £3.505, 45 daysies") == set()
    wanted = [["45 days", "£3"], ["Rime"]]
    s = entity_score(["45 days or £3.50", ""], wanted, KB)
    assert s.stats.tolist() == [[1, 2, 2], [0, 0, 1]] and abs(s.value - 40) < 1e-9
    assert entity_score(["Rime"], [["Rime"]], ["Rime"], "precision").value == 100


def test_listing_everything_costs_precision():
    everything, wanted = " and ".join(KB), [["45 days"]]*3
    p, r = (entity_score([everything]*3, wanted, KB, part).value for part in ("precision", "recall"))
    assert r == 100 and p <= 25


@needs_e2e
def test_entities_of_e2e_systems():
    "A system that leaves facts out by design has the lowest recall; the baseline names nearly all"
    import re
    asked = [[v for k, v in re.findall(r"(\w+)\[([^\]]*)\]", mr) if k in ("name", "near", "food", "area")] for mr in tables()]
    names = {v for row in asked for v in row}
    recall = {s: entity_score(outputs(s), asked, names, "recall").value for s in systems()}
    assert recall["tgen"] > 95 > 90 > recall["chen"]
    human = [r[0] for r in references()]
    assert entity_score(human, asked, names, "precision").value > 90


# perplexity

def test_perplexity_is_the_models_loss():
    import torch
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(7, 50, 100, generator=g, dtype=torch.double), torch.randint(100, (7, 50), generator=g)
    lp = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert abs(perplexity(list(lp)).value - math.exp(loss)) < 1e-9
    texts = ["é"*50]*7
    assert abs(bits_per_byte(list(lp), texts).value - loss*350/math.log(2)/(7*100)) < 1e-9


@quick
@given(st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=9), min_size=1, max_size=5))
def test_perplexity_properties(lps):
    s = perplexity(lps)
    assert s.value >= 1 and np.all(s.rows() >= 1)
    assert abs(s.value - perplexity(lps[::-1]).value) <= 1e-9*s.value
    sure = [[0.]*len(x) for x in lps]
    assert perplexity(sure).value == 1 and bits_per_byte(sure, ["a"]*len(lps)).value == 0
    joined = [[sum(x)] for x in lps]   # other tokens, same probability of the text
    texts = ["some text"]*len(lps)
    assert abs(bits_per_byte(lps, texts).value - bits_per_byte(joined, texts).value) < 1e-9
    assert perplexity([*lps, [-math.inf]]).value == math.inf


# properties of all that compare texts

TEXT = {"chrf": chrf, "chrf++": partial(chrf, word_order=2), "meteor": meteor, "token_f1": token_f1,
        "bleu": bleu, "rouge": rouge}


@quick
@given(rows, st.sampled_from(sorted(TEXT)))
def test_bounds_order_and_more_references(pairs, name):
    hyps, refs = columns(pairs)
    metric, order = TEXT[name], random.Random(0).sample(range(len(hyps)), len(hyps))
    s = metric(hyps, refs)
    assert -1e-9 <= s.value <= 100 + 1e-9 and np.all(s.rows() <= 100 + 1e-9)
    assert abs(metric([hyps[i] for i in order], [refs[i] for i in order]).value - s.value) < 1e-9
    if name == "bleu": return   # the length it is held against may change with a new reference
    more = metric(hyps, [[*r, "the cat"] for r in refs])
    assert np.all(more.rows() >= s.rows() - 1e-9)


@quick
@given(rows)
def test_ter_properties(pairs):
    hyps, refs = columns(pairs)
    s = ter(hyps, refs)
    assert s.value >= 0 and abs(ter(hyps[::-1], refs[::-1]).value - s.value) < 1e-9
    assert ter(hyps, hyps).value == 0
    assert np.all(ter(hyps, [[*r, "the cat"] for r in refs]).stats[:, 0] <= s.stats[:, 0])


@quick
@given(st.lists(texts, min_size=1, max_size=5))
def test_identity(hyps):
    assume(any("".join(h.split()) for h in hyps))
    assert chrf(hyps, hyps).value == pytest.approx(100)
    assert chrf(hyps, hyps, 2).value == pytest.approx(100)
    assert token_f1(hyps, hyps).value == 100 and ter(hyps, hyps).value == 0
    assert meteor(hyps, hyps).value < 100   # its penalty spares not even a copy


@quick
@given(st.lists(st.sampled_from(WORDS), min_size=5, max_size=25), st.integers(1, 4))
def test_cutting_a_perfect_reply_never_helps(words, k):
    "From a copy of the reference. From a worse reply it may: cutting a wrong tail raises precision"
    whole, shorter = " ".join(words[:len(words) - k + 1]), " ".join(words[:len(words) - k])
    ref = " ".join(words)
    for name in ("chrf", "token_f1", "bleu", "rouge"):
        assert TEXT[name]([shorter], [ref]).value <= TEXT[name]([whole], [ref]).value + 1e-9, name
    assert ter([shorter], [ref]).value >= ter([whole], [ref]).value - 1e-9


@quick
@given(st.lists(st.text("abcdefg", min_size=1, max_size=4), min_size=3, max_size=20, unique=True), st.integers(1, 2))
def test_meteor_falls_with_each_word_if_no_word_stands_twice(words, k):
    a, b = (" ".join(words[:len(words) - x]) for x in (k - 1, k))
    assert meteor([b], [" ".join(words)]).value < meteor([a], [" ".join(words)]).value


def test_where_deletion_does_help():
    assert meteor(["a b c a"], ["a b c"]).value < meteor(["a b c"], ["a b c"]).value
    assert chrf(["right wrong"], ["right"]).value < chrf(["right"], ["right"]).value
    assert entity_score(["Rime sleeping bag"], [["Rime"]], KB, "recall").value == 0
    assert entity_score(["Rime"], [["Rime"]], KB, "recall").value == 100   # the longest name counts


# statistics add up

@needs_e2e
@pytest.mark.parametrize("name", ["chrf", "chrf++", "meteor", "token_f1", "ter"])
def test_resampled_statistics_are_resampled_rows(name):
    metric = TEXT.get(name, ter)
    hyps, refs, rng = outputs("slug")[:80], references()[:80], np.random.default_rng(0)
    s = metric(hyps, refs)
    for _ in range(3):
        pick = rng.integers(80, size=80)
        again = metric([hyps[i] for i in pick], [refs[i] for i in pick])
        assert float(s.fn(s.stats[pick].sum(0))) == pytest.approx(again.value, abs=1e-9)


@needs_e2e
def test_bootstrap_takes_them_all():
    from ftcourse.evaluation import bootstrap
    hyps, refs = outputs("tgen")[:60], references()[:60]
    scores = [m(hyps, refs) for m in (chrf, ter, meteor, nist, cider, token_f1)]
    scores += [perplexity([[-1., -.5], [-2.]]*9), json_f1(['{"a": 1}']*9, [{"a": 1}, {"a": 2}, {"a": 1}]*3)]
    for s in scores:
        b = bootstrap(s, resamples=200)
        assert b.low <= s.value <= b.high and b.low < b.high, s


# bad input

LONG = "all work and no play " * 50_000   # more than a megabyte


@pytest.mark.parametrize("metric", [chrf, partial(chrf, word_order=2), meteor, nist, token_f1, bleu, rouge,
                                    partial(rouge, kind="2"), partial(bleu, tokenize="intl")])
def test_a_megabyte_is_scored(metric):
    start = time.process_time()
    assert len(LONG) > 1e6 and metric([LONG, "a"], [LONG[:-9], "a"]).value > 0
    assert time.process_time() - start < 20


@pytest.mark.parametrize("call, says", [
    (lambda: ter(["a", LONG], ["a", "b"]), "row 1: hyps has 250,000 words"),
    (lambda: ter(["a"], [["b", LONG]]), "row 0: refs has 250,000 words"),
    (lambda: rouge(["a", LONG + "\nso"], ["a", LONG], "Lsum"), "row 1: a line of 250,000 words"),
    (lambda: rouge([" ".join(map(str, range(200_000)))], [LONG]), "row 0: 200,000 words"),
    (lambda: chrf(["a"], [["a"], ["b"]]), "1 hyps but 2 refs"),
    (lambda: ter([], []), "no rows"),
    (lambda: chrf("a", "a"), "not one string"),
    (lambda: meteor(["a", None], ["a", "b"]), "row 1: hyps is None"),
    (lambda: nist(["a", b"b"], ["a", "b"]), "row 1: hyps holds bytes"),
    (lambda: token_f1(["a", "b"], ["a", float("nan")]), "row 1: refs"),
    (lambda: cider(["a", "b"], [["a"], []]), "row 1: refs is an empty list"),
    (lambda: cider(["a"], ["a"]), "1 row"),
    (lambda: chrf(["a"], [b"abc"]), "row 0: refs holds b'abc'"),
    (lambda: meteor(["a"], [{"a": 1}]), "row 0: refs holds {'a': 1}"),
    (lambda: nist(["a"], ["a"], match="all"), "choose one of any, best"),
    (lambda: meteor(["a"], ["a"], tokenize="zh"), "choose one of 13a"),
    (lambda: json_f1(["{}"], [{}]), "row 0: refs holds no JSON with fields"),
    (lambda: json_f1(["{}", "{}"], [{"a": 1}, 5]), "row 1: refs holds no JSON"),
    (lambda: json_f1([{"a": 1}], [{"a": 1}]), "row 0: hyps holds dict"),
    (lambda: json_f1(["{}"], [{"a": 1}], "f2"), "choose one of precision"),
    (lambda: entity_score(["a"], ["b"], ["b"]), "write ['b']"),
    (lambda: entity_score(["a"], [["b"]], ["a"]), "row 0: wanted has 'b'"),
    (lambda: entity_score(["a"], [[]], ["a"]), "no row wants a name"),
    (lambda: entity_finder([]), "kb is empty"),
    (lambda: entity_finder([" ."]), "an empty name"),
    (lambda: entity_finder(["45 days", "forty-five days"]), "can be written alike"),
    (lambda: entity_score([b"a"], [["a"]], ["a"]), "row 0: hyps holds bytes"),
    (lambda: bits_per_byte([[-1.]], [b"a"]), "row 0: texts holds bytes"),
    (lambda: perplexity([]), "no rows"),
    (lambda: perplexity([[-1.], []]), "row 1: logprobs has no tokens"),
    (lambda: perplexity([[-1.], [float("nan")]]), "row 1: logprobs holds NaN"),
    (lambda: perplexity([[2.5]]), "never above 0"),
    (lambda: bits_per_byte([[-1.], [-1.]], ["a"]), "2 logprobs but 1 texts"),
    (lambda: bits_per_byte([[-1.], [-1.]], ["a", ""]), "row 1: texts is empty"),
])
def test_errors(call, says):
    start = time.process_time()
    with pytest.raises(ValueError) as e: call()
    assert says in str(e.value) and time.process_time() - start < 10


def test_corner_cases_as_the_lesson_prints_them():
    for metric in (chrf, meteor, nist, token_f1):
        assert metric([""], ["a b"]).value == metric(["a b"], [""]).value == 0
    assert token_f1([""], [""]).value == 100 and chrf([""], [""]).value == meteor([""], [""]).value == 0
    assert [ter([a], [b]).value for a, b in (("", "a b"), ("a b", ""), ("", ""))] == [100, 100, 0]


# evaluate

def test_as_evaluate_needs_no_network(monkeypatch, tmp_path):
    import evaluate
    def no(*a, **k): raise AssertionError("a connection was asked for")
    monkeypatch.setattr(socket.socket, "connect", no)
    hyps, refs = ["a b c d e", "the cat sat"], [["a b c d", "a e"], ["the cat"]]
    module = as_evaluate(chrf, word_order=2)
    assert module.compute(predictions=hyps, references=refs)["chrf++"] == chrf(hyps, refs, 2).value
    both = evaluate.combine([as_evaluate(bleu), as_evaluate(ter), as_evaluate(token_f1)])
    found = both.compute(predictions=hyps, references=refs)
    for m in (bleu, ter, token_f1):
        assert found[m.__name__] == m(hyps, refs).value
        assert found[f"{m.__name__}_signature"] == m(hyps, refs).signature
    flat = [r[0] for r in refs]
    assert as_evaluate(meteor).compute(predictions=hyps, references=flat)["meteor"] == meteor(hyps, flat).value


def test_evaluate_is_not_needed_to_import():
    code = "import sys, ftcourse.metrics; sys.exit(bool({'evaluate', 'nltk', 'datasets', 'regex'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
