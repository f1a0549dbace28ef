"""The promise of the first page, on a middling budget: after training, every task is better than the best prompt shows."""
import json, os, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def test_tuning_beats_the_best_prompt_on_every_task(tmp_path):
    env = dict(os.environ, FTCOURSE_PROFILE="cpu", FTCOURSE_CORPUS="desk", FTCOURSE_TRAIN_ROWS="300", FTCOURSE_EPOCHS="2", FTCOURSE_SHOTS="2",
               FTCOURSE_VALID_ROWS="10", FTCOURSE_TEST_ROWS="60", FTCOURSE_RUNS=str(tmp_path), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "tools/course.py"], cwd=root, env=env, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path/"desk"/"scores.json").read_text(encoding="utf-8"))
    for metric in ("route/accuracy", "route/f1_macro", "answer/bleu", "answer/rouge_l"):
        d = scores["paired"][metric]
        assert d["low"] > 0, f"{metric}: {d['a_value']:.1f} against {d['b_value']:.1f}, [{d['low']:.1f}, {d['high']:.1f}]"
    assert scores["train"]["tokens_per_s"] > 0 and scores["train"]["adapter_bytes"] < 12e6
