"""The promise of the first page on a budget that a test can pay: a learner's own file of messages in four queues, after training, is
sorted better than the best prompt sorts it. The same for the whole support desk stands in lesson 00's saved outputs, from a full run."""
import csv, json, os, random, subprocess, sys
from pathlib import Path
from ftcourse import corpora

root = Path(__file__).resolve().parent.parent


def test_tuning_beats_the_best_prompt(tmp_path):
    rows = [r for r in corpora.load("desk", "train") if r["task"] == "route"]
    queues = random.Random(0).sample(sorted({r["output"] for r in rows}), 4)
    rows = [r for r in rows if r["output"] in queues]
    random.Random(0).shuffle(rows)
    with (tmp_path/"mails.csv").open("w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["message", "queue"])
        out.writerows((r["input"], r["output"]) for r in rows)
    env = dict(os.environ, FTCOURSE_TRAIN_ROWS="150", FTCOURSE_EPOCHS="2", FTCOURSE_VALID_ROWS="6", FTCOURSE_TEST_ROWS="40", FTCOURSE_SHOTS="4",
               FTCOURSE_MAX_NEW_TOKENS="8", FTCOURSE_RUNS=str(tmp_path), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "tools/course.py", "--profile", "cpu", "--data", str(tmp_path/"mails.csv"), "--input", "message",
                           "--output", "queue"], cwd=root, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path/"mails"/"scores.json").read_text(encoding="utf-8"))
    assert len(scores["paired"]) >= 2
    for metric, d in scores["paired"].items():
        assert d["low"] > 0, f"{metric}: {d['a_value']:.1f} against {d['b_value']:.1f}, [{d['low']:.1f}, {d['high']:.1f}]"
    assert scores["train"]["tokens_per_s"] > 0 and scores["train"]["adapter_bytes"] < 12e6
