"""From a file to labels: reading + rendering + encoding, beside `apply_chat_template` row by row, in turn in one run.

    make bench                                 # with the others
    python tests/benchmarks/bench_formats.py --rounds 9

Short rows (a label for a message), the support desk's, and chats of three turns; each way reads the same JSON-lines file, and only
ours makes labels. A speed is the best of the rounds, in rows/s. Then a file of a million rows, no two alike, is streamed once: its
speed, and what the process's peak memory grew by after the first twentieth. Exit status 1 if short rows are below 20,000 rows/s
*and* below twice the speed of row by row, or if memory grew by more than 64 MB.
"""
import argparse, json, os, random, sys, tempfile, time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
WANTED, TIMES, GROWTH = 20_000, 2., 64e6


def files(folder, n):
    "name → a file of `n` conversations"
    from ftcourse import corpora
    from ftcourse.formats import to_messages
    rng = random.Random(0)
    desk = corpora.load("desk", "train", n=600)
    asks, says = [r["input"] or r["instruction"] for r in desk], [r["output"] for r in desk]
    said = lambda r, t: dict(role=r, content=t)
    label = lambda: [said("user", rng.choice(asks)[:60]), said("assistant", rng.choice(["returns", "billing", "workshop", "stock"]))]
    chat = lambda: [said(r, t) for _ in range(3) for r, t in (("user", rng.choice(asks)), ("assistant", rng.choice(says)))]
    made = {"short": [label() for _ in range(n)], "desk": [to_messages(rng.choice(desk)) for _ in range(n//2)], "three turns": [chat() for _ in range(n//6)]}
    for name, talks in made.items():
        path = folder/f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"messages": m}) for m in talks), encoding="utf-8")
        yield name, path, len(talks)


def long_file(folder, tok, n):
    "Streams `n` short rows: rows/s, and bytes that the peak grew by after the first twentieth"
    from ftcourse.conversations import ChatEncoder, conversations
    from ftcourse.runtime import peak_bytes
    path, at = folder/"long.jsonl", 0
    with path.open("w", encoding="utf-8") as f:
        for i in range(n):
            turns = [dict(role="user", content=f"Parcel {i} has not come, order LM{i*7919 % n:06}"), dict(role="assistant", content="stock")]
            f.write(json.dumps({"messages": turns}) + "\n")
    start = time.perf_counter()
    for i, _ in enumerate(ChatEncoder(tok).stream(conversations(path))):
        if i == n//20: at = peak_bytes()
    return n/(time.perf_counter() - start), peak_bytes() - at


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--rows", type=int, default=4000, help="short rows; of the others there are fewer")
    p.add_argument("--long", type=int, default=1_000_000, help="rows of the long file; 0 leaves it out")
    a = p.parse_args()
    from transformers import AutoTokenizer
    from ftcourse import models
    from ftcourse.conversations import ChatEncoder, conversations
    tok = AutoTokenizer.from_pretrained(models.bundled())
    def ours(path): return sum(len(r) for _, r in ChatEncoder(tok).stream(conversations(path)))
    def by_row(path):
        with path.open(encoding="utf-8") as f: return sum(bool(tok.apply_chat_template(json.loads(l)["messages"], return_dict=False)) for l in f)
    ways, missed = {"ours": ours, "row by row": by_row}, False
    print(f"{'rows':14}{'ours':>14}{'row by row':>14}{'times':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, path, n in files(Path(folder), a.rows):
            best = dict.fromkeys(ways, 0.)
            for _ in range(a.rounds):
                for way, f in ways.items():
                    start = time.perf_counter()
                    f(path)
                    best[way] = max(best[way], n/(time.perf_counter() - start))
            times = best["ours"]/best["row by row"]
            print(f"{name:14}{best['ours']:8,.0f} /s{best['row by row']:11,.0f} /s{times:8.1f}", flush=True)
            if name == "short": missed = best["ours"] < min(WANTED, TIMES*best["row by row"])
        if a.long:
            speed, grew = long_file(Path(folder), tok, a.long)
            print(f"a file of {a.long:,} rows: {speed:,.0f} rows/s, peak memory {grew/1e6:+.1f} MB after its first twentieth", flush=True)
            if grew > GROWTH: print(f"Wanted: at most {GROWTH/1e6:.0f} MB more")
            missed |= grew > GROWTH
    print(f"Wanted for short rows: {WANTED:,} rows/s, or {TIMES:g} times row by row{'; something was missed' if missed else ': reached'}")
    return missed


if __name__ == "__main__": sys.exit(main())
