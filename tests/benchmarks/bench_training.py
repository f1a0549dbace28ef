"""Speed beside Hugging Face: training beside Trainer + peft, generation beside `generate`, and the loop's own cost.

    make bench                 # three rounds of each on E2E rows, desk rows and long rows; fails under the ratios below
    make bench ROUNDS=5
    python tests/benchmarks/bench_training.py --only desk --rounds 1

Training is like for like: the same model, rows, batches in the same order, A and B at the start, optimizer, schedule, clipping
and seed, each measured in a process of its own, in turn. Theirs runs in three ways, and the best of them counts. A speed is that of
all tokens but the first step's, in which both sides warm up; ours compiles its small pieces there, if there is a C++ compiler, and the
seconds of that step are printed. Theirs isn't compiled: `torch_compile=True` compiles the whole model, which takes longer than these runs.

Beside each ratio stands what the machine allows: its fastest matrix product, in float32 or bf16, the best of all rounds, and the tokens/s
of a step that does nothing but the products it needs, at that rate. A ratio that asks for more than `REACH` of it is reported as out of reach here, and does
not fail the bench: the figures were set for processors that multiply bf16 several times as fast as float32, and not all do.
"""
import argparse, json, math, os, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROWS = {"e2e": 64, "desk": 56, "long": 21}
MOST = {"e2e": 1024, "desk": 1024, "long": 4800}   # tokens a step: about eight rows, which is Trainer's default, or more
WAYS = ("float32", "bf16 autocast", "bf16 weights")
NEED = {"best": 2.5, "default": 5., "generation": 2., "overhead": .03, "loss": .02, "straight": .25}
REACH = .7   # of the matmul peak; the products alone run at 80 to 95% of it
LR = 2e-3
COMPILE = bool(shutil.which("g++") or shutil.which("clang++"))

if "FTCOURSE_DATA" not in os.environ and (data := Path(__file__).resolve().parents[3]/"shared"/"data").is_dir():
    os.environ["FTCOURSE_DATA"] = str(data)


def rows(name, n, split="train"):
    "Rows of one kind; a long one has eight worked examples, other ones in each row, before its question"
    from datasets import Dataset
    from ftcourse import corpora
    if name != "long": return corpora.load(name, split, n=n, seed=0)
    try: source, each = corpora.load("e2e", split, n=9*n, seed=0), 9
    except OSError: source, each = corpora.load("desk", split, n=9*n, seed=0).filter(lambda r: r["task"] == "answer"), 6
    parts = [source.select(range(i, i+each)) for i in range(0, len(source)-each+1, each)][:n]
    shown = lambda p: "\n\n".join(f"{r['input']}\n{r['output']}" for r in p.select(range(each-1)))
    return Dataset.from_list([dict(instruction=p[0]["instruction"], input=f"{shown(p)}\n\n{p[each-1]['input']}",
                                   output=p[each-1]["output"], task="long") for p in parts])


def setting(way):
    "(dtype of the weights, precision) of one way"
    import torch
    return {"float32": (torch.float32, "float32"), "bf16 autocast": (torch.float32, "bf16"),
            "bf16 weights": (torch.bfloat16, None), "ftcourse": (None, None)}[way]


def train(name, way, n, most):
    "One run: tokens/s after the first step, peak memory, held-out loss"
    import transformers
    from ftcourse import formats, lora, models, speed, trainer, training
    from ftcourse.runtime import Meter, seed_everything
    dtype, precision = setting(way)
    seed_everything(0)
    model, tok = models.load(dtype=dtype)
    lora.add_lora(model, r=8, alpha=16)
    data, marks, start = rows(name, n), [], time.perf_counter()
    encoded = formats.encode_all(data, tok)
    work = training.windows(encoded, 1, most, 1, 0)
    tokens = [sum(len(encoded[i]["input_ids"]) for b in w for i in b) for w in work]
    if way == "ftcourse":
        h = training.fit(model, tok, data, lr=LR, max_tokens=most, max_length=2048, looks=0, live=False, compile=COMPILE,
                         logs=lambda step, values: marks.append(time.perf_counter()))
        peak, losses = h.peak_bytes, [s["loss"] for s in h.steps]
    else:
        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *a, **k): marks.append(time.perf_counter())
        twin = trainer.as_peft(model)
        with tempfile.TemporaryDirectory() as folder:
            t = trainer.make_trainer(twin, tok, encoded, folder, lr=LR, max_tokens=most, precision=precision)
            t.add_callback(Clock())
            with Meter() as m: t.train()
        peak, losses = m.peak_bytes, [e["loss"] for e in t.state.log_history if "loss" in e]
        trainer.take_back(twin, model)
    assert len(marks) == len(work), (len(marks), len(work))
    held = formats.encode_all(rows(name, 24 if name != "long" else 4, "valid" if name == "desk" else "test"), tok)
    return dict(speed=sum(tokens[1:])/(marks[-1]-marks[0]), peak=peak, steps=len(work), first=losses[0], start=marks[0]-start,
                held=training.validate(model, held, tok.pad_token_id, speed.supervised_loss))


def allowed(name, n, most):
    "The machine's matmul peaks, and the tokens/s of a run that only did the products it needs, at the higher one"
    import torch
    from ftcourse import formats, lora, models, speed, training
    model, tok = models.load()
    lora.add_lora(model)
    peak = {str(d)[6:]: speed.matmul_peak(d) for d in (torch.float32, torch.bfloat16)}
    encoded = formats.encode_all(rows(name, n), tok)
    inner = sum(m.base.weight.numel() for m in lora.lora_layers(model).values())
    outer, work, tokens = model.get_output_embeddings().weight.numel(), 0, 0
    for w in training.windows(encoded, 1, most, 1, 0)[1:]:
        part = [encoded[i] for b in w for i in b]
        distinct = len(speed._write([e["input_ids"][:-1] for e in part])[0])
        work += 4*(inner*distinct + outer*sum(l != -100 for e in part for l in e["labels"]))
        tokens += sum(len(e["input_ids"]) for e in part)
    return dict(peak=peak, ceiling=tokens/(work/max(peak.values())))


def generate(n, first):
    "Seconds that each side takes for the same requests, in float32, warmed up, and whether the answers are the same"
    import torch
    from ftcourse import models, prompting
    from ftcourse.formats import render
    model, tok = models.load(dtype=torch.float32)
    data, new = rows("e2e", n, "test"), 48
    texts = [render(prompting.request(r, [], ""), tok, True) for r in data]
    def default(texts):
        out = []
        for t in texts:
            x = tok(t, return_tensors="pt", add_special_tokens=False)
            y = model.generate(**x, max_new_tokens=new, do_sample=False, pad_token_id=tok.pad_token_id)
            out.append(tok.decode(y[0, x["input_ids"].shape[1]:], skip_special_tokens=True).strip())
        return out
    def batched(texts):
        tok.padding_side = "left"
        x = tok(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        y = model.generate(**x, max_new_tokens=new, do_sample=False, pad_token_id=tok.pad_token_id)
        return [s.strip() for s in tok.batch_decode(y[:, x["input_ids"].shape[1]:], skip_special_tokens=True)]
    def ours(texts): return [s.strip() for s in prompting.generate(model, tok, texts, new, 32)]
    out, sides = {}, [("default", default), ("batched", batched), ("ftcourse", ours)]
    for _, f in sides: f(texts[:3])
    for name, f in sides[first % 3:] + sides[:first % 3]:       # another one begins in each round
        start = time.perf_counter()
        said = f(texts)
        out[name], out[name+" said"] = time.perf_counter()-start, said
    same = lambda k: sum(a == b for a, b in zip(out[k+" said"], out["ftcourse said"]))/n
    return dict(default=out["default"], batched=out["batched"], ftcourse=out["ftcourse"],
                same_default=same("default"), same_batched=same("batched"))


def overhead(n, rounds):
    "`fit` against the bare loop of the same steps, taking turns: share that fit adds, by round"
    import copy, torch
    from ftcourse import formats, lora, models, speed, training
    from ftcourse.runtime import seed_everything
    data = rows("desk", n)
    def fresh():
        seed_everything(0)
        model, tok = models.load()
        return lora.add_lora(model, r=8, alpha=16), tok
    def bare():
        model, tok = fresh()
        encoded = formats.encode_all(data, tok)
        work = training.windows(encoded, 1, 1024, 1, 0)
        batches = [formats.collate([encoded[i] for i in w[0]], tok.pad_token_id, model.device) for w in work]
        params = training.trained_parameters(model)
        opt, off = training.make_optimizer(model, lr=LR), torch.amp.GradScaler(model.device.type, enabled=False)
        few = formats.collate(encoded[:3], tok.pad_token_id, model.device)
        marks = []
        with speed.quick(model, few, 512) as loss_fn:
            model.train()
            for b in batches:
                training.window_step(model, [b], loss_fn, off)
                torch.nn.utils.clip_grad_norm_(params, 1.)
                opt.step(); opt.zero_grad(); marks.append(time.perf_counter())
        return marks[-1]-marks[1]
    def whole():
        model, tok = fresh()
        marks = []
        training.fit(model, tok, data, lr=LR, looks=0, logs=lambda step, values: marks.append(time.perf_counter()))
        return marks[-1]-marks[1]
    return [whole()/bare()-1 for _ in range(rounds)]


def growth(rounds):
    "Seconds and bytes of a step with ever more rows: (rows, distinct tokens, seconds, bytes), from 1 to 32 times"
    import ctypes, gc
    from ftcourse import formats, lora, models, speed
    from ftcourse.runtime import Meter, seed_everything
    seed_everything(0)
    model, tok = models.load()
    lora.add_lora(model).train()
    encoded, out = formats.encode_all(rows("e2e", 64), tok), []
    with speed.quick(model, formats.collate(encoded[:2], tok.pad_token_id), 512) as loss_fn:
        for k in (2, 4, 8, 16, 32, 64):
            batch, took, peaks = formats.collate(encoded[:k], tok.pad_token_id), [], []
            for _ in range(rounds + 1):   # the first warms up
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
                with Meter() as m:
                    idle = m.peak_bytes
                    loss_fn(model, batch)[0].backward()
                model.zero_grad(set_to_none=True)
                took.append(m.seconds)
                peaks.append(m.peak_bytes-idle)
            out.append((k, len(speed._write([e["input_ids"][:-1] for e in encoded[:k]])[0]), statistics.median(took[1:]), max(peaks[1:])))
    return out


def bend(points, at):
    "Largest relative distance of `points[at]` from a straight line in the tokens, drawn by least squares of relative errors; from 4 times on"
    import numpy as np
    x, y = (np.array([p[i] for p in points[2:]], float) for i in (1, at))
    line = np.linalg.lstsq(np.stack([1/y, x/y], 1), np.ones(len(x)), rcond=None)[0]
    return float(np.abs((line[0] + line[1]*x)/y - 1).max())


def apart(*args):
    "One measurement in a process of its own"
    p = subprocess.run([sys.executable, __file__, "--one", *map(str, args)], capture_output=True, text=True,
                       env=dict(os.environ, FTCOURSE_PLAIN="1", PYTHONWARNINGS="ignore"))
    if p.returncode: raise SystemExit(f"{args}: {p.stderr[-2000:]}")
    return json.loads(p.stdout.strip().splitlines()[-1])


def worth_trying(peak, least=.25):
    "The ways that could be the best: bf16 is left out where its products are emulated (a hundredth of float32's speed was seen)"
    return WAYS if peak["bfloat16"] >= least*peak["float32"] else WAYS[:1]


def compare(name, rounds):
    seen = [apart("allowed", name, ROWS[name], MOST[name])]
    machine = seen[0]
    ways = worth_trying(machine["peak"])
    if ways != WAYS: print(f"{name}: theirs in float32 only, since bf16 products run at {machine['peak']['bfloat16']/machine['peak']['float32']:.0%} "
                           "of float32's speed here", flush=True)
    found = {w: [] for w in (*ways, "ftcourse")}
    for i in range(rounds):
        if i: seen.append(apart("allowed", name, ROWS[name], MOST[name]))   # a slow moment must not excuse a miss
        for way, got in found.items():
            got.append(apart("train", name, way, ROWS[name], MOST[name]))
            print(f"{name}, round {i+1}, {way}: {got[-1]['speed']:.0f} tokens/s, peak {got[-1]['peak']/1e9:.2f} GB, "
                  f"held-out loss {got[-1]['held']:.4f}", flush=True)
    machine = dict(peak={d: max(s["peak"][d] for s in seen) for d in machine["peak"]}, ceiling=max(s["ceiling"] for s in seen))
    median = {w: statistics.median(g["speed"] for g in got) for w, got in found.items()}
    best = max(ways, key=median.get)
    ratio = lambda way: [o["speed"]/t["speed"] for o, t in zip(found["ftcourse"], found[way])]
    peak = {w: max(g["peak"] for g in got) for w, got in found.items()}
    held = {w: got[0]["held"] for w, got in found.items()}
    return dict(**machine, start=statistics.median(g["start"] for g in found["ftcourse"]), share=median["ftcourse"]/machine["ceiling"], rows=ROWS[name], steps=found["ftcourse"][0]["steps"], tokens_per_s=median, best_of_theirs=best, peak_bytes=peak,
                held_out=held, best=statistics.median(ratio(best)), best_by_round=ratio(best),
                default=statistics.median(ratio("float32")), default_by_round=ratio("float32"),
                loss_off=max(abs(held["ftcourse"]/held[w]-1) for w in ways))


def missed(out):
    "(row kind, whose, ratio, share of the peak that the wanted ratio would take) of training"
    for name, r in out["training"].items():
        for key, way in (("best", r["best_of_theirs"]), ("default", "float32")):
            if r[key] < NEED[key]: yield name, key, r[key], NEED[key]*r["tokens_per_s"][way]/r["ceiling"]


def out_of_reach(out):
    "Sentences about ratios that this machine does not allow"
    for name, key, got, share in missed(out):
        if share > REACH: yield (f"{name}: {got:.2f} times theirs ({key}); {NEED[key]} times would take {share:.0%} of this machine's "
                                 "matmul peak: out of reach here")


def failures(out):
    "Sentences about what is not reached"
    for name, key, got, share in missed(out):
        if share <= REACH: yield f"{name}: {got:.2f} times theirs ({key}), below {NEED[key]}"
    for name, r in out["training"].items():
        if r["share"] > 1: yield f"{name}: we train at {r['share']:.0%} of the matmul peak, so that peak was taken at a slow moment: measure again"
        if r["loss_off"] > NEED["loss"]: yield f"{name}: held-out losses differ by {r['loss_off']:.1%}"
        if r["peak_bytes"]["ftcourse"] > min(b for w, b in r["peak_bytes"].items() if w != "ftcourse"): yield f"{name}: peak memory above theirs"
    if g := out.get("generation"):
        if g["ratio"] < NEED["generation"]: yield f"generation: {g['ratio']:.2f} times the default, below {NEED['generation']}"
        if g["same_default"] < 1: yield f"generation: {g['same_default']:.0%} of the answers are the same"
    if g := out.get("growth"):
        for what in ("seconds", "bytes"):
            if g[what] > NEED["straight"]: yield f"{what} of a step bend away from a straight line by {g[what]:.0%}"
    if o := out.get("overhead"):
        if statistics.median(o) > NEED["overhead"]: yield f"fit costs {statistics.median(o):.1%} over the bare loop"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only", nargs="*", choices=(*ROWS, "generation", "growth", "overhead"),
                   default=[*ROWS, "generation", "growth", "overhead"])
    p.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    p.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        what, *rest = a.one
        out = (train(rest[0], rest[1], *map(int, rest[2:])) if what == "train" else allowed(rest[0], *map(int, rest[1:]))
               if what == "allowed" else generate(*map(int, rest)) if what == "generate" else growth(int(rest[0])) if what == "growth"
               else overhead(*map(int, rest)))
        return print(json.dumps(out))
    out = dict(training={})
    for name in ROWS:
        if name not in a.only: continue
        try: rows(name, 2)
        except OSError as e: print(f"{name} left out: {e}"); continue
        r = out["training"][name] = compare(name, a.rounds)
        theirs = ", ".join(f"{b/1e9:.2f}" for w, b in r["peak_bytes"].items() if w != "ftcourse")
        by = ", ".join(f"{x:.2f}" for x in r["best_by_round"])
        print(f"{name}: {r['best']:.2f} times their best ({r['best_of_theirs']}; by round "
              f"{by}), {r['default']:.2f} times their default; peak "
              f"{r['peak_bytes']['ftcourse']/1e9:.2f} GB against {theirs}", flush=True)
        said = ", ".join(f"{k} {v/1e12:.2f} TFLOP/s" for k, v in r["peak"].items())
        print(f"{name}: our first step, the compiler's work included, ends {r['start']:.0f} s after loading", flush=True)
        print(f"{name}: matmul peak {said}; needed products alone, at that rate, {r['ceiling']:.0f} tokens/s; training reaches "
              f"{r['share']:.0%} of it. What would raise it: fewer passes over memory between the products (compiling), "
              "larger batches\n", flush=True)
    if "generation" in a.only:
        got = [apart("generate", 24, i) for i in range(a.rounds)]
        med = {k: statistics.median(g[k] for g in got) for k in got[0]}
        out["generation"] = dict(med, ratio=statistics.median(g["default"]/g["ftcourse"] for g in got),
                                 ratio_batched=statistics.median(g["batched"]/g["ftcourse"] for g in got))
        print(f"generation, 24 requests, float32: {out['generation']['ratio']:.2f} times `generate` one by one, "
              f"{out['generation']['ratio_batched']:.2f} times `generate` in one padded batch; "
              f"{med['same_default']:.0%} and {med['same_batched']:.0%} of the answers are the same\n", flush=True)
    if "growth" in a.only:
        g = apart("growth", a.rounds)
        for k, n, t, b in g: print(f"a step over {k:2} rows: {n:5} distinct tokens, {t:.2f} s, {b/1e9:.2f} GB on top")
        out["growth"] = dict(points=g, seconds=bend(g, 2), bytes=bend(g, 3))
        print(f"off a straight line by at most {out['growth']['seconds']:.0%} (seconds) and {out['growth']['bytes']:.0%} (bytes), from 4 times on\n", flush=True)
    if "overhead" in a.only:
        out["overhead"] = apart("overhead", 100, a.rounds)
        by = ", ".join(f"{x:+.1%}" for x in out["overhead"])
        print(f"fit over the bare loop: {statistics.median(out['overhead']):+.1%}, by round {by}\n")
    a.out.parent.mkdir(exist_ok=True)
    a.out.write_text(json.dumps(out, indent=1))
    bad, beyond = list(failures(out)), list(out_of_reach(out))
    print("\n".join(bad + beyond) or "All ratios are reached.")
    sys.exit(bool(bad))


if __name__ == "__main__": main()
