"""Training speed beside Hugging Face Trainer + peft: same model, rows, LoRA configuration and optimizer, taking turns.

    make bench            # three rounds, E2E rows where FTCOURSE_DATA has them, otherwise desk; medians and ratio
    make bench ROUNDS=5
"""
import argparse, json, statistics, tempfile, time
from pathlib import Path

import peft, torch, transformers
from ftcourse import corpora, formats, lora, models, training
from ftcourse.runtime import Meter, seed_everything

WAYS = ("float32", "bf16 autocast", "bf16 weights")
LR, BATCH = 2e-3, 8


def rows(n, seed=0):
    try: return "e2e", corpora.load("e2e", "train", n=n, seed=seed)
    except OSError: return "desk", corpora.load("desk", "train", n=n, seed=seed)


class Clock(transformers.TrainerCallback):
    "Seconds from the end of the second step, so that neither side pays for its warm-up"
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 2: self.start = time.perf_counter()


def theirs(way, encoded, tokenizer):
    "Trainer + peft: (tokens/s, peak bytes)"
    seed_everything(0)
    dtype = torch.bfloat16 if way == "bf16 weights" else torch.float32
    model, _ = models.load(dtype=dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=LR,
            bf16=way == "bf16 autocast", use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=0)
        trainer = transformers.Trainer(model, args, train_dataset=encoded, callbacks=[clock],
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True))
        with Meter() as m: trainer.train()
    done = sum(len(e["input_ids"]) for e in encoded) * (1 - 2*BATCH/len(encoded))
    return done/(time.perf_counter() - clock.start), m.peak_bytes


def ours(encoded_rows, tokenizer):
    "`training.fit`: (tokens/s, peak bytes), its first two steps left out likewise"
    seed_everything(0)
    model, _ = models.load()
    lora.add_lora(model, r=8, alpha=16)
    marks = []
    step = training.optimizer_step
    def timed(*a): out = step(*a); marks.append(time.perf_counter()); return out
    training.optimizer_step = timed
    try: h = training.fit(model, tokenizer, encoded_rows, lr=LR, max_tokens=1024)
    finally: training.optimizer_step = step
    tokens = h.steps[-1]["tokens"] - h.steps[1]["tokens"]
    return tokens/(marks[-1] - marks[1]), h.peak_bytes


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--rows", type=int, default=96)
    p.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    a = p.parse_args()
    name, data = rows(a.rows)
    _, tokenizer = models.load()
    encoded = [{**e, "attention_mask": [1]*len(e["input_ids"])} for e in formats.encode_all(data, tokenizer)]
    speed = {w: [] for w in (*WAYS, "ftcourse")}
    peak = {w: 0 for w in speed}
    for i in range(a.rounds):
        for way in speed:
            s, m = ours(data, tokenizer) if way == "ftcourse" else theirs(way, encoded, tokenizer)
            speed[way].append(s); peak[way] = max(peak[way], m)
            print(f"round {i+1}, {way}: {s:.0f} tokens/s, peak {m/1e9:.2f} GB", flush=True)
    median = {w: statistics.median(s) for w, s in speed.items()}
    best = max(WAYS, key=median.get)
    ratios = [o/max(speed[w][i] for w in WAYS) for i, o in enumerate(speed["ftcourse"])]
    out = dict(corpus=name, rows=a.rows, tokens_per_s=median, peak_bytes=peak, best_of_theirs=best,
               ratio=median["ftcourse"]/median[best], ratio_by_round=ratios)
    a.out.parent.mkdir(exist_ok=True)
    a.out.write_text(json.dumps(out, indent=1))
    print(f"\n{name}, {a.rows} rows, median of {a.rounds}: ftcourse {median['ftcourse']:.0f} tokens/s, Trainer + peft at best "
          f"{median[best]:.0f} ({best}): {out['ratio']:.2f} times; by round {', '.join(f'{r:.2f}' for r in ratios)}")


if __name__ == "__main__": main()
