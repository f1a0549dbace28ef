"""The memory planner beside measured peaks of the bundled model, each setting in a process of its own, and how long a plan takes.

    make bench                                        # with the others
    python tests/benchmarks/bench_memory.py           # two dozen settings; about five minutes on two cores

Exit status 1 if the mean error is above 10%, one above 20%, or a plan of a 70B model takes two seconds.
"""
import argparse, sys, time, warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from ftcourse.memory import measure, plan

MEAN, WORST, SECONDS = .10, .20, 2.
JOBS = [dict(batch=b, length=t, r=r, checkpointing=c) for r in (8, None) for c in (False, True) for b, t in ((1, 64), (2, 128), (4, 128), (1, 512))]
JOBS += [dict(batch=2, length=128, **o) for o in (dict(r=1), dict(r=64), dict(optimizer="sgd"), dict(loss="chunked"), dict(accumulate=2))]
JOBS += [dict(batch=1, length=512, attention="math"), dict(batch=2, length=128, target=["q_proj", "v_proj"])]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=1, help="taken for company's sake: a peak doesn't vary")
    p.parse_args()
    plan("SmolLM2-135M")
    start = time.process_time()
    plan("Llama-3.1-70B", length=2048, quantization="nf4-double", checkpointing=True)
    took = time.process_time() - start
    print(f"A plan of a 70B model: {took:.2f} s (wanted: under {SECONDS:.0f})\n\n{'setting':64}{'predicted':>12}{'measured':>12}{'error':>9}", flush=True)
    jobs, errors = [dict(j, dtype="float32") for j in JOBS], []
    for job, seen in zip(jobs, measure(jobs)):
        want = plan("SmolLM2-135M", **{**job, "dtype": torch.float32}).bytes
        errors.append(want/seen["bytes"] - 1)
        name = ", ".join(f"{k}={v}" for k, v in job.items() if k != "dtype" and v is not False)
        print(f"{name:64}{want/1e6:9,.0f} MB{seen['bytes']/1e6:9,.0f} MB{errors[-1]:+9.1%}")
    mean, worst = sum(map(abs, errors))/len(errors), max(errors, key=abs)
    print(f"\nPlanner error over {len(errors)} settings: {mean:.1%} on average (wanted: {MEAN:.0%}), {worst:+.1%} at worst ({WORST:.0%})")
    return mean > MEAN or abs(worst) > WORST or took > SECONDS


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
