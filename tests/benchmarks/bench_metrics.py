"""How fast the metrics are beside the libraries they equal, on real outputs, equal numbers checked first; and the bootstrap.

    make bench                                            # this, then bench_memory.py and bench_training.py
    python tests/benchmarks/bench_metrics.py              # three rounds; `--rounds 5` for more
    python tests/benchmarks/bench_metrics.py --system chen

Every round starts cold on both sides: caches of tokens, n-grams and references are emptied. Times are CPU seconds of this
process, the least of the rounds; `ratio` is theirs divided by ours, and `wanted` what the course promises (–: nothing).

Then the paired bootstrap: two lists of 5,000 real replies (eight systems of the E2E challenge behind one another, against eight
others), four metrics, 1,000 resamples of each, in seconds of the clock. One resample of each is scored again from its texts, to
show that the sums give the same. The exit status is 1 where a promise is missed.
"""
import argparse, os, sys, time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]
import numpy as np
import sacrebleu
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
from sacrebleu.tokenizers.tokenizer_ter import TercomTokenizer
from ftcourse import metrics
from ftcourse.evaluation import draws, paired, resample_counts
from ftcourse.metrics import bleu, chrf, meteor, nist, rouge, ter, tokenize_13a
from humans import ROOT, outputs, references, streams

ROWS, RESAMPLES, SECONDS = 5000, 1000, 10   # the bootstrap's promise
SIDES = {"A": "tgen slug nle harv gong adapt chen tuda".split(),
         "B": "sheff1 sheff2 tnt1 tnt2 zhang zhaw2 tr1 tr2".split()}


class Nothing:
    "A WordNet that knows no word"
    def synsets(self, word): return []


def cold():
    for c in (metrics._reference, metrics._rouge_units, metrics._remembered): c.cache_clear()
    for c in (Tokenizer13a, TokenizerRegexp, TercomTokenizer): c.__call__.cache_clear()


def least(f, rounds):
    "Its value, and the least CPU seconds of `rounds` cold rounds"
    times = []
    for _ in range(rounds):
        cold()
        start = time.process_time()
        value = f()
        times.append(time.process_time() - start)
    return value, min(times)


def rouge_theirs(hyps, refs, kinds, stemmer):
    scorer = RougeScorer([f"rouge{k}" for k in kinds], use_stemmer=stemmer)
    found = [scorer.score_multi(r, h) for h, r in zip(hyps, refs)]
    return [100*np.mean([f[f"rouge{k}"].fmeasure for f in found]) for k in kinds]


def on_lines(texts): return [t.replace(". ", ".\n") for t in texts]   # a sentence a line, as for summaries


def cases(hyps, refs):
    "name, rows, ours, theirs, the ratio that is wanted"
    n, few, stem = len(hyps), 60, PorterStemmer().stem
    def rouges(kinds, stem=None): return [rouge(hyps, refs, k, stem=stem).value for k in kinds]
    def cut(text): return tokenize_13a(text.lower())
    yield "BLEU", n, lambda: bleu(hyps, refs).value, lambda: sacrebleu.corpus_bleu(hyps, streams(refs)).score, 1
    yield "chrF", n, lambda: chrf(hyps, refs).value, lambda: sacrebleu.corpus_chrf(hyps, streams(refs)).score, 1
    yield "chrF++", n, lambda: chrf(hyps, refs, 2).value, lambda: sacrebleu.corpus_chrf(hyps, streams(refs), word_order=2).score, 1
    for kinds in ("1",), ("2",), ("L",), ("Lsum",), ("1", "2", "L", "Lsum"):
        yield "ROUGE-" + "/".join(kinds), n, lambda k=kinds: rouges(k), lambda k=kinds: rouge_theirs(hyps, refs, k, False), 5
    h2, r2 = on_lines(hyps), [*map(on_lines, refs)]
    yield "ROUGE-Lsum, lines", n, lambda: rouge(h2, r2, "Lsum").value, lambda: rouge_theirs(h2, r2, ["Lsum"], False), 5
    yield "ROUGE-1/2/L stem", n, lambda: rouges("12L", stem), lambda: rouge_theirs(hyps, refs, "12L", True), 5
    yield "TER", few, lambda: ter(hyps[:few], refs[:few]).value, lambda: sacrebleu.corpus_ter(hyps[:few], streams(refs[:few])).score, 1
    yield "METEOR", n, lambda: meteor(hyps, refs, stem=stem).value, lambda: 100*np.mean([meteor_score(
        [tokenize_13a(r) for r in row], tokenize_13a(h), wordnet=Nothing()) for h, row in zip(hyps, refs)]), 1
    yield "NIST", n, lambda: nist(hyps, refs, match="best").value, lambda: corpus_nist(
        [[cut(r) for r in row] for row in refs], [cut(h) for h in hyps]), 0   # no promise


def bootstrap_scores(refs):
    "metric → the scores of the two sides; their replies; the references"
    def many(rows): return [x for row in rows for x in row][:ROWS]
    hyps = {side: many(outputs(s) for s in names) for side, names in SIDES.items()}
    refs, stem = many([refs]*len(SIDES["A"])), PorterStemmer().stem
    assert len(refs) == ROWS and all(len(h) == ROWS for h in hyps.values())
    metrics = {"BLEU": bleu, "chrF": chrf, "ROUGE-L": rouge, "METEOR": lambda h, r: meteor(h, r, stem=stem)}
    return {n: (f, [f(h, refs) for h in hyps.values()]) for n, f in metrics.items()}, hyps, refs


def bench_bootstrap(refs):
    "Prints what it took; True if the promise was kept"
    start = time.perf_counter()
    scored, hyps, refs = bootstrap_scores(refs)
    scoring = time.perf_counter() - start
    start = time.perf_counter()
    found = [paired(a, b, ("A", "B"), RESAMPLES) for _, (a, b) in scored.values()]
    took = time.perf_counter() - start
    pick = np.repeat(np.arange(ROWS), resample_counts(ROWS, 1, np.random.default_rng(0))[0])
    for name, (f, (a, _)) in scored.items():   # one resample, from its texts
        again, summed = f([hyps["A"][i] for i in pick], [refs[i] for i in pick]).value, draws(a, resamples=1)[0][0]
        assert abs(again - summed) < 1e-9, (name, again, summed)
    print(f"\nPaired bootstrap: {RESAMPLES:,} resamples of {ROWS:,} replies of two sides, {len(found)} metrics")
    for d in found: print(f"  {d}")
    print(f"{took:.2f} s ({scoring:.1f} s before it, to score the two sides once); wanted: under {SECONDS} s", flush=True)
    return took < SECONDS


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--system", default="tgen", help="a system of the E2E challenge, such as tgen or chen")
    a = p.parse_args()
    if not (ROOT/"e2e_humans").is_dir(): sys.exit(f"Nothing was measured: {ROOT} holds no E2E data. Set FTCOURSE_DATA to the "
                                                  "folder that holds e2e and e2e_humans.")
    hyps, refs, short = outputs(a.system), references(), []
    print(f"{a.system}: {len(hyps)} replies, {sum(map(len, refs)):,} references\n"
          f"{'metric':22}{'rows':>6}{'ours s':>9}{'theirs s':>10}{'ratio':>8}{'wanted':>8}")
    for name, n, ours, theirs, wanted in cases(hyps, refs):
        (x, s), (y, t) = least(ours, a.rounds), least(theirs, a.rounds)
        assert np.abs(np.array(x) - y).max() < 1e-9, (name, x, y)
        print(f"{name:22}{n:6}{s:9.3f}{t:10.3f}{t/s:8.1f}{f'{wanted}×' if wanted else '–':>8}{'' if t >= wanted*s else '  MISSED'}", flush=True)
        if t < wanted*s: short.append(name)
    if not bench_bootstrap(refs): short.append("bootstrap")
    print("\nMetrics: every promise kept." if not short else f"\nMetrics: slower than promised: {', '.join(short)}.")
    return bool(short)


if __name__ == "__main__": sys.exit(main())
