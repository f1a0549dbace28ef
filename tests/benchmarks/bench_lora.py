"""Our LoRA layer beside peft's: forward and backward of the bundled model, the same A and B, dtype and batch, in turn in one run.

    make bench                              # with the others
    python tests/benchmarks/bench_lora.py --rounds 9

A speed is the median of the rounds, in tokens/s; the losses are compared first. Memory is the peak of one forward and backward, each in a
process of its own. Then what a reader waits for: `add_lora` on a 7B model on the meta device, saving and loading the bundled model's
adapter. `joined` is what `fit` does besides: layers that read the same tensor as one product. The exit status is 1 where a promise is missed.
"""
import argparse, copy, json, os, statistics, subprocess, sys, tempfile, time, warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
NEED = {"speed": 1.3, "memory": 1., "add_lora on 7B": 1., "save": .5, "load": .5}
R, ALPHA = 8, 16


def models_of(dtype, which=("ftcourse", "peft")):
    "The bundled model with LoRA on all seven projections, ours and peft's, with the same weights"
    import peft, torch
    from ftcourse import lora, models
    base, _ = models.load(dtype=dtype)
    out = {}
    if "ftcourse" in which: out["ftcourse"] = lora.add_lora(copy.deepcopy(base) if "peft" in which else base, R, ALPHA)
    if "peft" in which:
        config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out["peft"] = peft.get_peft_model(base, config)
    g = torch.Generator().manual_seed(0)
    for m in out.values():
        g.manual_seed(0)
        for n, p in m.named_parameters():
            if p.requires_grad: p.data.copy_(torch.randn(p.shape, generator=g)*.02)
        m.train()
    return out


def batch_of(rows, length):
    import torch
    ids = torch.randint(40000, (rows, length), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, labels=ids)


def step(model, batch):
    loss = model(**batch).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def memory(name, dtype, rows, length):
    "Bytes above the loaded model, in this process"
    import torch
    from ftcourse.runtime import Meter
    model = models_of(getattr(torch, dtype), [name])[name]
    step(model, batch_of(1, 8))
    with Meter() as idle: pass
    with Meter() as meter: step(model, batch_of(rows, length))
    return meter.peak_bytes - idle.peak_bytes


def in_child(*args):
    done = subprocess.run([sys.executable, __file__, "--memory", *map(str, args)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def speed(dtype, rows, length, rounds):
    "Median ratio of the rounds, ours over peft's, and the lines of a table"
    from ftcourse.speed import joined
    models, batch = models_of(dtype), batch_of(rows, length)
    losses, took = {n: step(m, batch) for n, m in models.items()}, {"ftcourse": [], "peft": [], "joined": []}
    assert abs(losses["ftcourse"]-losses["peft"]) <= (1e-4 if "32" in str(dtype) else 2e-2)*losses["peft"], losses
    for _ in range(rounds):
        for n, m in models.items():
            t = time.perf_counter(); step(m, batch); took[n].append(time.perf_counter()-t)
        with joined(models["ftcourse"], batch):
            t = time.perf_counter(); step(models["ftcourse"], batch); took["joined"].append(time.perf_counter()-t)
    med = {n: rows*length/statistics.median(t) for n, t in took.items()}
    ratio = statistics.median(b/a for a, b in zip(took["ftcourse"], took["peft"]))
    more = statistics.median(b/a for a, b in zip(took["joined"], took["peft"]))
    print(f"{str(dtype)[6:]:<9}{rows} × {length:<5} ours {med['ftcourse']:6.0f}, peft {med['peft']:6.0f} tokens/s: {ratio:.2f} × "
          f"(wanted {NEED['speed']}); with joined layers {med['joined']:6.0f}, {more:.2f} ×", flush=True)
    return max(ratio, more)


def waits():
    "Seconds of what a reader waits for"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from ftcourse import lora
    out, c = {}, AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"): big = AutoModelForCausalLM.from_config(c)
    t = time.perf_counter(); lora.add_lora(big); out["add_lora on 7B"] = time.perf_counter()-t
    model = models_of(torch.float32, ["ftcourse"])["ftcourse"]
    with tempfile.TemporaryDirectory() as d:
        t = time.perf_counter(); lora.save_adapter(model, d); out["save"] = time.perf_counter()-t
        t = time.perf_counter(); lora.load_adapter(model, d); out["load"] = time.perf_counter()-t
    return out


def main():
    import torch
    from ftcourse.runtime import precision
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--memory", nargs=4, metavar=("WHO", "DTYPE", "ROWS", "LENGTH"), help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.memory: return print(json.dumps(memory(a.memory[0], a.memory[1], *map(int, a.memory[2:]))))
    missed, dtypes = [], {torch.float32, precision()}
    for dtype in sorted(dtypes, key=str):
        if speed(dtype, 8, 128, a.rounds) < NEED["speed"]: missed.append(f"speed in {dtype}")
    peaks = [[in_child(n, "float32", 4, 128) for n in ("ftcourse", "peft")] for _ in range(a.rounds)]   # taking turns
    ours, theirs = map(statistics.median, zip(*peaks))
    print(f"peak memory of a step over the loaded model: ours {ours/1e6:,.0f} MB, peft {theirs/1e6:,.0f} MB: {ours/theirs:.2f} × (at most 1)")
    if ours > theirs*1.02: missed.append("memory")
    for what, took in waits().items():
        print(f"{what}: {took:.2f} s (at most {NEED[what]} s)")
        if took > NEED[what]: missed.append(what)
    if missed: sys.exit("Missed: " + ", ".join(missed))


if __name__ == "__main__": main()
