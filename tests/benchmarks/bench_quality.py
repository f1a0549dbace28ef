"""Near copies among 100,000 rows: MinHash and bands from scratch, beside datasketch on a part of them.

    make bench                                        # with the others
    python tests/benchmarks/bench_quality.py          # about two minutes on two cores

The rows are the questions and answers of the corpora that are here, and copies with slips whose place is known.
Exit status 1 if 100,000 rows take a minute, or fewer than 95% of the copies have a twin.
"""
import argparse, random, sys, time, warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
from ftcourse import corpora
from ftcourse.corpora import mistype
from ftcourse.quality import bands, near_pairs, plain

SECONDS, FOUND, PART = 60., .95, 2000


def texts(n, seed=0):
    "Different real texts, then copies of random ones with a slip in them, and how many are no copies"
    rng, pool = random.Random(seed), []
    for name in corpora.names():
        try: rows = corpora.load(name, "train")
        except FileNotFoundError: continue
        pool += [*rows["input"], *rows["output"]]
    pool = [t for t in dict.fromkeys(pool) if len(t) > 40][:n*9//10]
    while len(pool) < n//2: pool += [f"{a} {b}" for a, b in zip(rng.sample(pool, len(pool)), pool)]
    pool = pool[:n*9//10]
    return pool + [mistype(rng.choice(pool), ["swap", "drop", "double"], rng) for _ in range(n - len(pool))], len(pool)


def their_seconds(some):
    "What datasketch takes for signatures and index of these texts"
    from datasketch import MinHash, MinHashLSH
    start, index = time.perf_counter(), MinHashLSH(num_perm=128, params=bands(.7))
    for i, t in enumerate(some):
        m, flat = MinHash(num_perm=128), plain(t).ljust(4)
        m.update_batch([flat[j:j+4].encode() for j in range(len(flat) - 3)])
        index.query(m), index.insert(i, m)
    return time.perf_counter() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=1, help="times to measure; the fastest counts")
    p.add_argument("--rows", type=int, default=100_000)
    a = p.parse_args()
    rows, own = texts(a.rows)
    took, busy = [], []
    for _ in range(a.rounds):
        start, spent = time.perf_counter(), time.process_time()
        pairs, _ = near_pairs(rows)
        took.append(time.perf_counter() - start), busy.append(time.process_time() - spent)
    found = np.isin(np.arange(own, len(rows)), pairs[:, 1]).mean()
    print(f"{len(rows):,} rows ({sum(map(len, rows))/1e6:.1f} million characters): {min(took):.1f} s, {min(busy):.1f} s of one core (wanted: under {SECONDS:.0f}), "
          f"{len(pairs):,} pairs; {found:.1%} of {len(rows) - own:,} copies have a twin (wanted: {FOUND:.0%})", flush=True)
    part = random.Random(0).sample(rows, min(PART, len(rows)))
    start = time.perf_counter(); near_pairs(part); ours = time.perf_counter() - start
    print(f"{len(part):,} of them: ours {ours:.2f} s, datasketch {their_seconds(part):.2f} s")
    return min(took) > SECONDS or found < FOUND


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
