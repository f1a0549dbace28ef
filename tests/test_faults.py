"A run that is killed, starved, interrupted or poisoned loses little, says what happened, and goes on bit for bit"
import errno, json, math, os, random, resource, signal, sqlite3, subprocess, sys, threading, time
from pathlib import Path
import pytest, torch
from ftcourse import corpora, lora, models, training
from ftcourse.formats import encode_all
from ftcourse.training import History, checkpoints, find_lr, fit, read_checkpoint, validate, write_checkpoint
from test_training import state, tiny, unchanged, with_lora

ROOT = Path(__file__).resolve().parent.parent
FIT = dict(max_tokens=300, epochs=2, lr=5e-3)


@pytest.fixture(scope="module")
def tok(): return models.load()[1]

@pytest.fixture(scope="module")
def rows(): return corpora.load("desk", "train", n=14)


def dropped(seed=0):
    "A tiny model whose LoRA drops a tenth of its inputs, so that the generator's state matters"
    model = tiny(seed=7)
    torch.manual_seed(seed)
    return lora.add_lora(model, r=4, alpha=8, dropout=.1)


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
def told(h): return [(s["step"], s["loss"], s["norm"], s["lr"], s["tokens"]) for s in h.steps]
def steps_in(folder): return [int(p.name.split("-")[1]) for p in checkpoints(folder)]


def whole(rows, tok, **kw):
    model = dropped()
    torch.manual_seed(1)
    return model, fit(model, tok, rows, rows.select(range(3)), **{**FIT, **kw})


class Halt(Exception): pass

def stop_at(n, monkeypatch, error=Halt):
    "The run dies at its `n`th step"
    real, seen = training.window_step, []
    def dies(*a):
        seen.append(1)
        if len(seen) == n: raise error
        return real(*a)
    monkeypatch.setattr(training, "window_step", dies)


# ---------- resume

@pytest.mark.parametrize("die,every", [(3, 1), (4, 2), (6, 4)])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(rows, tok, tmp_path, monkeypatch, die, every):
    a, ha = whole(rows, tok)
    with monkeypatch.context() as m:
        stop_at(die, m)
        with pytest.raises(Halt): whole(rows, tok, folder=tmp_path, save_every=every)
    assert steps_in(tmp_path)[0] == (die-1)//every*every
    b = dropped(seed=99)   # another A, another generator: all of it comes from the checkpoint
    torch.manual_seed(123)
    hb = fit(b, tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, save_every=every, resume=True)
    assert torch.equal(weights(a), weights(b)) and told(ha) == told(hb) and ha.valid == hb.valid
    assert (ha.tokens, ha.supervised) == (hb.tokens, hb.supervised) and not hb.stopped


def test_a_metric_that_draws_changes_nothing(rows, tok, tmp_path, monkeypatch):
    "Resumed after a look whose metric used the generators, the run goes on as the uninterrupted one"
    def sampled(model): return torch.rand(7)[-1].item() + random.random()
    kw = dict(metric=sampled, best=False, looks=5)
    a, ha = whole(rows, tok, **kw)
    plain, _ = whole(rows, tok, looks=5)
    with monkeypatch.context() as m:
        stop_at(4, m)
        with pytest.raises(Halt): whole(rows, tok, folder=tmp_path, save_every=1, **kw)
    b = dropped(seed=99)
    hb = fit(b, tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, save_every=1, resume=True, **kw)
    assert torch.equal(weights(a), weights(b)) and torch.equal(weights(a), weights(plain)) and told(ha) == told(hb)


def test_an_optimizer_given_as_a_function_can_be_resumed(rows, tok, tmp_path, monkeypatch):
    def sgd(): return lambda groups: torch.optim.SGD(groups, lr=FIT["lr"], momentum=.9)      # another address each time
    a, _ = whole(rows, tok, optimizer=sgd())
    with monkeypatch.context() as m:
        stop_at(3, m)
        with pytest.raises(Halt): whole(rows, tok, folder=tmp_path, save_every=1, optimizer=sgd())
    b, _ = whole(rows, tok, folder=tmp_path, resume=True, optimizer=sgd())
    assert torch.equal(weights(a), weights(b))


class Nested(torch.optim.AdamW):
    "Keeps part of its state one dictionary deeper, and a table that all parameters share, as bitsandbytes does"
    table = torch.arange(4.)
    def state_dict(self):
        d = super().state_dict()
        d["state"] = {i: dict(step=s["step"], quant=dict({k: v for k, v in s.items() if k != "step"}, qmap1=self.table))
                      for i, s in d["state"].items()}
        return d


def test_an_optimizer_with_nested_state_can_be_resumed(rows, tok, tmp_path, monkeypatch):
    def nested(groups): return Nested(groups, lr=FIT["lr"])
    a, _ = whole(rows, tok, optimizer=nested)
    with monkeypatch.context() as m:
        stop_at(3, m)
        with pytest.raises(Halt): whole(rows, tok, folder=tmp_path, save_every=1, optimizer=nested)
    b, _ = whole(rows, tok, folder=tmp_path, resume=True, optimizer=nested)
    assert torch.equal(weights(a), weights(b))


def test_dropout_would_differ_without_the_generators_state(rows, tok, tmp_path, monkeypatch):
    a, _ = whole(rows, tok)
    with monkeypatch.context() as m:
        stop_at(4, m)
        with pytest.raises(Halt): whole(rows, tok, folder=tmp_path, save_every=1)
    monkeypatch.setattr(training, "set_rng", lambda *a: None)
    b = dropped(seed=99)
    fit(b, tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, resume=True)
    assert not torch.equal(weights(a), weights(b))


def test_a_finished_run_is_not_run_again(rows, tok, tmp_path):
    a, ha = whole(rows, tok, folder=tmp_path)
    b = dropped(seed=5)
    t = time.time()
    hb = fit(b, tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, resume=True)
    assert torch.equal(weights(a), weights(b)) and told(ha) == told(hb) and ha.valid == hb.valid
    assert hb.seconds == pytest.approx(ha.seconds, abs=.5) and time.time()-t < ha.seconds + 10


def test_resume_without_a_checkpoint_begins_at_the_beginning(rows, tok, tmp_path):
    a, ha = whole(rows, tok)
    b, hb = whole(rows, tok, folder=tmp_path/"new", resume=True)
    assert torch.equal(weights(a), weights(b)) and told(ha) == told(hb)


def test_two_checkpoints_are_kept(rows, tok, tmp_path):
    _, h = whole(rows, tok, folder=tmp_path, save_every=1)
    n = len(h.steps)
    assert steps_in(tmp_path) == [n, n-1] and not list(tmp_path.glob(".*"))


def test_a_checkpoint_is_safetensors_and_json_and_no_pickle(rows, tok, tmp_path):
    model, h = whole(rows, tok, folder=tmp_path)
    raw = checkpoints(tmp_path)[0].read_bytes()
    head = json.loads(raw[8:8+int.from_bytes(raw[:8], "little")])
    info = json.loads(head["__metadata__"]["run"])
    assert info["history"]["tokens"] == h.tokens and {"fingerprint", "scaler", "limit", "rng"} <= set(info)
    tensors, _ = read_checkpoint(checkpoints(tmp_path)[0])
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {f"param.{n}" for n in names} == {k for k in tensors if k.startswith("param.")}
    assert sum(k.startswith("optim.") for k in tensors) == 3*len(names)
    source = (ROOT/"ftcourse"/"training.py").read_text()
    assert "pickle" not in source and "torch.load" not in source and "torch.save" not in source


@pytest.mark.parametrize("change,says", [
    (dict(lr=1e-3), "lr was 0.005 and is 0.001"), (dict(epochs=3), "epochs was 2 and is 3"), (dict(seed=1), "seed was 0 and is 1"),
    (dict(max_tokens=200), "max_tokens was 300 and is 200"), (dict(packing=True), "packing was False and is True"),
    (dict(precision="bf16"), "precision was None and is torch.bfloat16"), ("rows", "the training rows are others"),
    ("valid", "the held-out rows are others"), ("frozen", "the model, its adapter or its frozen weights are others"),
    ("alpha", "the model, its adapter or its frozen weights are others")])
def test_a_checkpoint_of_another_run_is_refused(rows, tok, tmp_path, change, says):
    whole(rows.select(range(6)), tok, folder=tmp_path)
    model, data, held, kw = dropped(), rows.select(range(6)), rows.select(range(3)), dict(FIT)
    if isinstance(change, dict): kw |= change
    if change == "rows": data = [*data.select(range(5)), {**data[5], "output": "Trace"}]
    if change == "valid": held = held.select(range(2))
    if change == "frozen": model.model.embed_tokens.weight.data.add_(.01)
    if change == "alpha": model = lora.add_lora(tiny(seed=7), r=4, alpha=16, dropout=.1)
    was = state(model)
    with pytest.raises(ValueError, match=f"another run: {says}.*take another folder"):
        fit(model, tok, data, held, **kw, folder=tmp_path, resume=True)
    assert unchanged(model, was)


def test_an_old_folder_is_never_written_over_by_chance(rows, tok, tmp_path):
    whole(rows, tok, folder=tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="checkpoints of an earlier run.*resume=True"): whole(rows, tok, folder=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == before


# ---------- damage

@pytest.mark.parametrize("damage", ["bit", "half", "empty"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(rows, tok, tmp_path, capsys, damage):
    a, ha = whole(rows, tok)
    whole(rows, tok, folder=tmp_path, save_every=2)
    newest, before = checkpoints(tmp_path)
    raw = bytearray(newest.read_bytes())
    raw[len(raw)//2] ^= 1
    newest.write_bytes({"bit": bytes(raw), "half": bytes(raw[:len(raw)//2]), "empty": b""}[damage])
    with pytest.raises(ValueError, match="damaged"): read_checkpoint(newest)
    b = dropped(seed=3)
    h = fit(b, tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, save_every=2, resume=True)
    assert f"{newest.name} is damaged" in capsys.readouterr().out and any(newest.name in e["what"] for e in h.events)
    assert (tmp_path/f"{newest.name}.damaged").exists()   # put aside: it does not count as one of the two that are kept
    assert [read_checkpoint(p) for p in checkpoints(tmp_path)] and len(checkpoints(tmp_path)) == 2
    assert torch.equal(weights(a), weights(b)) and told(ha) == told(h)


def test_if_no_checkpoint_can_be_read_it_says_so(rows, tok, tmp_path):
    whole(rows, tok, folder=tmp_path)
    for p in checkpoints(tmp_path): p.write_bytes(b"x")
    with pytest.raises(ValueError, match="No checkpoint in .* can be read: delete"):
        fit(dropped(), tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, resume=True)


def test_what_was_half_written_is_not_a_checkpoint_and_is_cleared_away(rows, tok, tmp_path):
    (tmp_path/".half-written-1.tmp").write_bytes(b"x"*100)
    assert checkpoints(tmp_path) == []
    whole(rows, tok, folder=tmp_path)
    assert not list(tmp_path.glob(".half*"))


# ---------- a full disk

def full_disk(most):
    "The system itself refuses to let any file grow over `most` bytes"
    return resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(rows, tok, tmp_path, capsys, monkeypatch):
    a, ha = whole(rows, tok)
    real, seen = training.write_checkpoint, []
    def tight(*a):
        seen.append(1)
        full_disk(20_000 if len(seen) > 2 else -1)   # from the third on
        try: return real(*a)
        finally: full_disk(-1)
    monkeypatch.setattr(training, "write_checkpoint", tight)
    b, hb = whole(rows, tok, folder=tmp_path, save_every=1)
    assert torch.equal(weights(a), weights(b)) and told(ha) == told(hb)
    assert steps_in(tmp_path) == [2, 1] and [read_checkpoint(p) for p in checkpoints(tmp_path)] and not list(tmp_path.glob(".half*"))
    # every step from the third on, and once more at the end
    assert "was not written" in capsys.readouterr().out and len(hb.events) == len(hb.steps) - 1 and "make room" in hb.events[0]["what"]
    monkeypatch.undo()
    c = dropped(seed=4)
    hc = fit(c, tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, save_every=1, resume=True)
    assert torch.equal(weights(a), weights(c)) and told(ha) == told(hc)


def test_a_log_on_a_full_disk_is_given_up(rows, tok, capsys):
    def log(step, values): raise OSError(errno.ENOSPC, "No space left on device")
    _, h = whole(rows, tok, logs=[log])
    assert "log was given up" in capsys.readouterr().out and len(h.events) == 1 and len(h.steps) > 2


def test_our_own_log_on_a_full_disk_is_given_up_too(rows, tok, tmp_path, capsys):
    "The system refuses every byte more, to the log and to checkpoints; the run ends well"
    a, ha = whole(rows, tok)
    def fill(step, values):
        if step == 3: full_disk((tmp_path/"log.jsonl").stat().st_size)
    try: b, hb = whole(rows, tok, folder=tmp_path, save_every=2, logs=[fill])
    finally: full_disk(-1)
    assert torch.equal(weights(a), weights(b)) and told(ha) == told(hb) and steps_in(tmp_path) == [2]
    assert any("log was given up" in e["what"] for e in hb.events) and any("not written" in e["what"] for e in hb.events)


def test_tensorboard_on_a_full_disk_is_given_up_and_the_run_ends(rows, tok, tmp_path):
    "Its writer has a thread of its own, which fails late: at a later value or when it is closed"
    pytest.importorskip("tensorboard")
    a, ha = whole(rows, tok)
    def fill(step, values):
        if step == 2: full_disk(next((tmp_path/"tensorboard").iterdir()).stat().st_size)
    try: b, hb = whole(rows, tok, folder=tmp_path, save_every=1000, logs=[fill, "tensorboard"], live=None)
    finally: full_disk(-1)
    assert torch.equal(weights(a), weights(b)) and told(ha) == told(hb)
    assert any("log was given up" in e["what"] for e in hb.events)


def test_a_note_that_cannot_be_printed_does_not_end_the_run(rows, tok, monkeypatch):
    "Output that is sent to a file fills up with the disk"
    def full(*a, **k): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(training, "print", full, raising=False)
    b, hb = whole(rows, tok, logs=[full])
    assert torch.equal(weights(whole(rows, tok)[0]), weights(b)) and len(hb.events) == 1


def test_a_database_that_fails_is_given_up_too(rows, tok, tmp_path, monkeypatch):
    "trackio keeps its curves in SQLite, whose error for a full disk is no OSError"
    def full(step, values): raise sqlite3.OperationalError("database or disk is full")
    a, ha = whole(rows, tok)
    b, hb = whole(rows, tok, logs=[full])
    assert torch.equal(weights(a), weights(b)) and told(ha) == told(hb)
    assert [e["what"] for e in hb.events] == ["A log was given up (database or disk is full); training goes on"]


def test_a_resumed_log_says_each_step_and_look_once(rows, tok, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        stop_at(6, m)
        with pytest.raises(Halt): whole(rows, tok, folder=tmp_path, save_every=3)
    assert len((tmp_path/"log.jsonl").read_text().splitlines()) > 5
    h = fit(dropped(), tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, save_every=3, resume=True)
    lines = [json.loads(l) for l in (tmp_path/"log.jsonl").read_text().splitlines()]
    assert [(l["step"], l["loss"]) for l in lines if "lr" in l] == [(s["step"], s["loss"]) for s in h.steps]
    assert [(l["step"], l["valid/loss"]) for l in lines if "valid/loss" in l] == [(v["step"], v["loss"]) for v in h.valid]


# ---------- kill -9

KILLED = """
import os, signal, sys, time, random
import torch
torch.set_num_threads(1)
sys.path[:0] = {path!r}
from pathlib import Path
from test_faults import dropped, FIT
from ftcourse import corpora, models
from ftcourse.training import fit
tok, rows = models.load()[1], corpora.load("desk", "train", n=14)
def run(folder, slow=0.):
    model = dropped()
    torch.manual_seed(1)
    h = fit(model, tok, rows, rows.select(range(3)), **{{**FIT, "epochs": 8}}, folder=folder, save_every=2, resume=True,
            logs=[lambda *a: time.sleep(slow)])
run({whole!r})
def done():
    log = Path({folder!r})/"log.jsonl"
    return log.read_text().count('"lr"') if log.exists() else 0
dice = random.Random(0)
for kill in range(30):   # a fork dies by SIGKILL in some step; nothing in it gets to tidy up
    until, end = done() + dice.randint(3, 6), time.time() + 60
    pid = os.fork()
    if not pid:
        run({folder!r}, slow=.01); os._exit(0)
    while not (gone := os.waitpid(pid, os.WNOHANG)[0]) and done() < until and time.time() < end: time.sleep(.002)
    time.sleep(dice.random()*.05)
    if not gone: os.kill(pid, signal.SIGKILL); gone = os.waitpid(pid, 0)[1] == 0
    print("finished" if gone else "killed", flush=True)
    if gone: break
"""

def test_kill_9_at_any_moment(tmp_path):
    a, b = tmp_path/"whole", tmp_path/"killed"
    code = KILLED.format(path=[str(ROOT/"tests"), str(ROOT)], whole=str(a), folder=str(b))
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, env={**os.environ, "FTCOURSE_PLAIN": "1"})
    said = p.stdout.split()
    assert p.returncode == 0 and said.count("killed") >= 3 and said[-1] == "finished", p.stdout + p.stderr[-2000:]
    (ta, ia), (tb, ib) = (read_checkpoint(checkpoints(d)[0]) for d in (a, b))
    assert ta.keys() == tb.keys() and all(torch.equal(ta[k], tb[k]) for k in ta)
    assert ia["history"]["steps"] == ib["history"]["steps"] and ia["history"]["valid"] == ib["history"]["valid"]
    lines = [json.loads(l) for l in (b/"log.jsonl").read_text().splitlines()]
    assert [l["step"] for l in lines if "loss" in l and "lr" in l] == list(range(1, len(ia["history"]["steps"])+1))


# ---------- numbers that are none

def test_nan_names_step_and_rows_and_leaves_weights_and_checkpoints(rows, tok, tmp_path, monkeypatch):
    real, at = training.window_step, []
    monkeypatch.setattr(training, "window_step", lambda *a: (at.append(weights(a[0])), real(*a) if len(at) < 4 else math.nan)[1])
    model = dropped()
    with pytest.raises(FloatingPointError, match=r"The loss is nan at step 4.*rows \d+, ") as e: fit(model, tok, rows, **FIT, folder=tmp_path, save_every=2)
    assert torch.equal(weights(model), at[-1]) and len(e.value.history.steps) == 3 and steps_in(tmp_path) == [2]
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_an_exploding_gradient_names_step_and_rows(rows, tok, monkeypatch):
    model = dropped()
    p = next(p for p in model.parameters() if p.requires_grad)
    p.register_hook(lambda g: g*float("inf"))
    was = weights(model)
    with pytest.raises(FloatingPointError, match=r"gradient's length is (nan|inf) at step 1 \(rows \d+"): fit(model, tok, rows, **FIT)
    assert torch.equal(weights(model), was)


# ---------- out of memory

def hungry(limit, error=None, at=None):
    "A window step that fails, as an allocator does, for micro-batches over `limit` tokens"
    real = training.window_step
    def step(model, window, *a):
        for i, m in enumerate(window):
            if m["input_ids"].numel() > limit:
                real(model, window[:i+1], *a)   # gradients of a part are there already
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, window, *a)
    return step


@pytest.mark.parametrize("error", [None, RuntimeError("[enforce fail at alloc_cpu.cpp:128] data. DefaultCPUAllocator: can't allocate memory: you tried to "
                                                      "allocate 9 bytes. Error code 12 (Cannot allocate memory)"),
                                   RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")])
@pytest.mark.parametrize("packing", [False, True])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(rows, tok, monkeypatch, capsys, error, packing):
    def run():
        model = with_lora()
        return model, fit(model, tok, rows, rows.select(range(3)), max_tokens=1200, packing=packing)
    a, ha = run()
    longest = max(len(e["input_ids"]) for e in encode_all(rows, tok))
    monkeypatch.setattr(training, "window_step", hungry(longest + 50, error))
    b, hb = run()
    assert (weights(a) - weights(b)).abs().max() < 1e-4 and [s["loss"] for s in ha.steps] == pytest.approx([s["loss"] for s in hb.steps], abs=1e-4)
    said = capsys.readouterr().out
    assert 1 <= len(hb.events) <= 3 and said.count("Out of memory at step") == len(hb.events) and not ha.events
    assert "at step 1" in hb.events[0]["what"] and len(ha.steps) == len(hb.steps) and ha.tokens == hb.tokens


def test_a_row_that_does_not_fit_alone_is_named(rows, tok, monkeypatch):
    model, encoded = with_lora(), encode_all(rows, tok)
    lens = [len(e["input_ids"]) for e in encoded]
    monkeypatch.setattr(training, "window_step", hungry(max(lens) - 1))
    was = weights(model)
    with pytest.raises(MemoryError, match=f"Row {lens.index(max(lens))+1} alone, {max(lens)} tokens, does not fit"):
        fit(model, tok, rows, max_tokens=10_000)
    assert torch.equal(weights(model), was) and not model.training


def test_another_runtime_error_is_not_taken_for_memory(rows, tok, monkeypatch):
    monkeypatch.setattr(training, "window_step", lambda *a: (_ for _ in ()).throw(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="mat1"): fit(with_lora(), tok, rows)


def test_out_of_memory_in_validation(rows, tok, monkeypatch):
    real, tried = training.validate, []
    def tight(*a, max_tokens=1024, **k):
        tried.append(max_tokens)
        if max_tokens > 300: raise torch.OutOfMemoryError("out of memory")
        return real(*a, max_tokens=max_tokens, **k)
    monkeypatch.setattr(training, "validate", tight)
    h = fit(with_lora(), tok, rows, rows.select(range(4)), looks=2)
    assert tried[:3] == [1024, 512, 256] and len(h.valid) == 2


def test_out_of_memory_in_validation_leaves_the_dropout_on(rows, tok, monkeypatch):
    real, tried = training.supervised_loss, []
    model = dropped()
    def starved(model, batch, *a):
        if not model.training: tried.append(1)
        if len(tried) == 1 and not model.training: raise torch.OutOfMemoryError("out of memory")
        return real(model, batch, *a)
    with pytest.raises(torch.OutOfMemoryError): validate(model.train(), encode_all(rows, tok), 2, starved)
    assert model.training and validate(model, encode_all(rows, tok), 2, starved) > 0 and model.training


def test_the_limit_survives_a_resume(rows, tok, tmp_path, monkeypatch):
    longest = max(len(e["input_ids"]) for e in encode_all(rows, tok))
    monkeypatch.setattr(training, "window_step", hungry(longest + 50))
    kw = dict(max_tokens=1200, epochs=3, folder=tmp_path, save_every=1)
    h = fit(with_lora(), tok, rows, logs=press_at(1), **kw)
    _, info = read_checkpoint(checkpoints(tmp_path)[0])
    assert h.interrupted and len(h.steps) == 1 and info["limit"] <= longest + 50 and len(h.events) == len(info["history"]["events"]) >= 1
    h = fit(with_lora(), tok, rows, resume=True, **kw)
    said = [e for e in h.events if "Out of memory" in e["what"]]
    assert not h.stopped and len(h.steps) > 1 and said == info["history"]["events"]   # the smaller batches from the start: nothing overflows again


# ---------- Ctrl-C

def press_at(n, times=1):
    "A log that presses Ctrl-C when step `n` is done"
    def log(step, values):
        if step == n and "lr" in values:
            for _ in range(times): signal.raise_signal(signal.SIGINT)
    return log


def test_ctrl_c_saves_and_returns_and_can_be_resumed(rows, tok, tmp_path, capsys):
    a, ha = whole(rows, tok)
    before = signal.getsignal(signal.SIGINT)
    b, hb = whole(rows, tok, folder=tmp_path, logs=[press_at(3)])
    assert hb.interrupted and len(hb.steps) == 3 and not b.training and signal.getsignal(signal.SIGINT) is before
    assert "Stopping after this step" in capsys.readouterr().err and steps_in(tmp_path) == [3]
    c = dropped(seed=8)
    hc = fit(c, tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, resume=True)
    assert torch.equal(weights(a), weights(c)) and told(ha) == told(hc) and ha.valid == hc.valid and not hc.interrupted


def test_ctrl_c_twice_in_a_long_look(rows, tok, tmp_path):
    "The second press ends the metric; what was trained is saved, and the look is made up for"
    def slow(model):
        if slow.press: signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
        return 1.
    slow.press = False
    a, ha = whole(rows, tok, metric=slow, looks=3, best=False)
    def once(model):
        if once.n == 1: slow.press = True
        once.n += 1
        return slow(model)
    once.n = 0
    b, hb = whole(rows, tok, metric=once, looks=3, best=False, folder=tmp_path)
    slow.press = False
    assert hb.interrupted and len(hb.valid) == 1 and 0 < len(hb.steps) < len(ha.steps) and not b.training
    c = dropped(seed=8)
    hc = fit(c, tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, resume=True, metric=slow, looks=3, best=False)
    assert torch.equal(weights(a), weights(c)) and ha.valid == hc.valid


def test_a_keyboard_interrupt_in_the_middle_of_a_step_leaves_the_step_before(rows, tok, tmp_path, monkeypatch):
    a, ha = whole(rows, tok)
    with monkeypatch.context() as m:
        stop_at(4, m, KeyboardInterrupt)
        b, hb = whole(rows, tok, folder=tmp_path)
    assert hb.interrupted and told(hb) == told(ha)[:3] and steps_in(tmp_path) == [3] and all(p.grad is None for p in b.parameters())
    c = dropped(seed=8)
    hc = fit(c, tok, rows, rows.select(range(3)), **FIT, folder=tmp_path, resume=True)
    assert torch.equal(weights(a), weights(c)) and told(ha) == told(hc)


def test_a_run_in_a_thread_needs_no_signals(rows, tok):
    out = []
    t = threading.Thread(target=lambda: out.append(whole(rows.select(range(4)), tok)[1]))
    t.start(); t.join(60)
    assert len(out) == 1 and out[0].steps


INTERRUPTED = """
import sys, time, torch
sys.path[:0] = {path!r}
from test_faults import dropped, FIT
from ftcourse import corpora, models
from ftcourse.training import fit
tok, rows = models.load()[1], corpora.load("desk", "train", n=14)
model = dropped()
torch.manual_seed(1)
def tell(step, values): print("step", step, flush=True); time.sleep(.05)
h = fit(model, tok, rows, rows.select(range(3)), **{{**FIT, "epochs": 40}}, folder={folder!r}, logs=[tell])
print("interrupted", h.interrupted, len(h.steps), model.training, flush=True)
"""

def test_ctrl_c_in_a_terminal(tmp_path):
    code = INTERRUPTED.format(path=[str(ROOT/"tests"), str(ROOT)], folder=str(tmp_path/"run"))
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "FTCOURSE_PLAIN": "1"})
    try:
        while (line := p.stdout.readline()) and line.split() != ["step", "3"]: pass
        p.send_signal(signal.SIGINT)
        rest, err = p.communicate(timeout=60)
    finally: p.kill()
    n = int(rest.split("interrupted True ")[1].split()[0])
    assert p.returncode == 0 and 3 <= n < 200 and rest.strip().endswith("False") and "Stopping after this step" in err, rest + err[-2000:]
    assert steps_in(tmp_path/"run") == [n]


def test_ctrl_c_in_a_notebook(tmp_path):
    "The notebook's stop button, in a real kernel: the cell returns its history and the next cells run"
    manager = pytest.importorskip("jupyter_client.manager")
    code = INTERRUPTED.format(path=[str(ROOT/"tests"), str(ROOT)], folder=str(tmp_path/"run"))
    km, kc = manager.start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    try:
        msg, text, pressed = kc.execute(code), "", False
        end = time.time() + 100
        while time.time() < end:
            m = kc.get_iopub_msg(timeout=60)
            if m["parent_header"].get("msg_id") != msg: continue
            text += m["content"].get("text", "") + "".join(m["content"].get("traceback", []))
            if not pressed and "step 3" in text: pressed = True; km.interrupt_kernel()
            if m["msg_type"] == "status" and m["content"]["execution_state"] == "idle": break
        n = int(text.split("interrupted True ")[1].split()[0])
        reply = kc.execute_interactive("assert h.interrupted and not model.training", timeout=30)
    finally: kc.stop_channels(); km.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok" and steps_in(tmp_path/"run") == [n] and n < 200, text[-3000:]
