"Several processes give one process's losses and weights, evenly shared or not, also after one of them was killed; and say what they refuse"
import contextlib, errno, importlib.util, io, json, multiprocessing, os, shlex, shutil, signal, socket, subprocess, sys, time, types
from pathlib import Path
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM
from ftcourse import corpora, formats, lora, models, scaling, speed
from ftcourse.runtime import seed_everything
from ftcourse.scaling import asked, choose, command, finish, latest, micro, share, start, traffic, words
from ftcourse.speed import supervised_loss
from ftcourse.training import lr_at, windows

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="needs accelerate")
BIN = Path(sys.executable).parent
LAYERS, VOCAB, PAD = 2, 97, 2
# one warm process does the imports once; the processes of the tests are forks of it that never ran anything
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "accelerate", "ftcourse.scaling", "test_scaling"])


def in_group(rank, n, folder, fn, args, join):
    "One process of a group: meet the others, do `fn`, leave its result or its error in a file"
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                      OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", FTCOURSE_PLAIN="1")
    sys.stderr = open(os.devnull, "w")
    try:
        if join: torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n)
        out = fn(*args)
        if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
    except BaseException as e: out = f"{type(e).__name__}: {e}"
    torch.save(out, folder/f"{rank}.tmp"), os.replace(folder/f"{rank}.tmp", folder/str(rank))


def group(n, fn, *args, tmp, join=True, timeout=90, wait_for=None):
    "What each of `n` new processes made of `fn(*args)`; an error is its text"
    folder = tmp/f"group{time.perf_counter_ns()}"
    folder.mkdir(parents=True)
    ps = [SERVER.Process(target=in_group, args=(r, n, folder, fn, args, join), daemon=True) for r in range(n)]
    for p in ps: p.start()
    try:
        for r, p in enumerate(ps):
            if wait_for is None or r in wait_for: p.join(timeout)
        got = [torch.load(folder/str(r), weights_only=True) if (folder/str(r)).exists() else "no answer" for r in range(n)]
    finally:
        for p in ps:
            p.kill(), p.join(10)
    return got


def tiny(dtype=torch.float32, dropout=0., r=4, seed=7):
    "A small random Llama with tied embeddings and a LoRA whose B is not zero"
    torch.manual_seed(seed)
    conf = AutoConfig.for_model("llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
                                num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    model = AutoModelForCausalLM.from_config(conf)
    if dtype != torch.float32: model.to(dtype)
    lora.add_lora(model, r=r, alpha=8, dropout=dropout)
    with torch.no_grad():
        for p in lora.lora_parameters(model): p.add_(.05*torch.randn_like(p))
    return model


def rows(n=15, seed=0):
    "Rows of very uneven length, with uneven numbers of labels"
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        ids = torch.randint(3, VOCAB, (int(torch.randint(5, 40, (), generator=g)),), generator=g).tolist()
        k = 1 if i % 3 else len(ids)-2
        out.append(dict(input_ids=ids, labels=[-100]*(len(ids)-k) + ids[-k:]))
    return out


CONF = dict(epochs=2, lr=5e-3, max_tokens=80, accumulate=4, weight_decay=.01, seed=3, pad_id=PAD)


def full(model): return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def fit(strategy="ddp", conf=None, encoded=None, bf16=False, dropout=0., **kw):
    "Train the small model here, as one of a group or alone; losses, weights, what was held, collectives"
    model = tiny(torch.bfloat16 if bf16 else torch.float32, dropout)
    acc, wrapped, opt, h = scaling.train(model, encoded or rows(), strategy, cpu=True, **{**CONF, **(conf or {})}, **kw)
    here = scaling.held(wrapped, opt)
    weights = full(scaling.whole(model))
    return dict(losses=[s["loss"] for s in h.steps], norms=[s["norm"] for s in h.steps], weights=weights, held=here, tokens=h.tokens,
                kind=type(wrapped).__name__, asked=h.supervised, events=h.events)


def bare(bf16=False, conf=None):
    "The same run in one process, in ten lines, with nothing of `accelerate`"
    c, model, encoded = {**CONF, **(conf or {})}, tiny(torch.bfloat16 if bf16 else torch.float32).train(), rows()
    ps = [p for p in model.parameters() if p.requires_grad]
    opt, losses = torch.optim.AdamW(ps, lr=c["lr"], weight_decay=c["weight_decay"]), []
    work = windows(encoded, c["epochs"], c["max_tokens"], c["accumulate"], c["seed"])
    for i, w in enumerate(work):
        opt.param_groups[0]["lr"] = c["lr"]*lr_at(i, len(work))
        batches = [formats.collate([encoded[j] for j in b], PAD) for b in w]
        loss = sum(supervised_loss(model, b)[0] for b in batches) / sum(supervised_loss(model, b)[1] for b in batches)
        opt.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(ps, 1.); opt.step()
        losses.append(loss.item())
    return losses, full(model)


def apart(a, b):
    assert a.keys() == b.keys()
    return max((a[k].float()-b[k].float()).abs().max().item() for k in a)


# ---------- sharing

@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("length", range(1, 8))
def test_every_micro_batch_is_dealt_once_and_all_get_as_many(n, length):
    window = [[i] for i in range(length)]
    parts = [share(window, r, n) for r in range(n)]
    assert len({len(p) for p in parts}) == 1 and len(parts[0]) == -(-length//n)
    assert [m for p in parts for m in p if m] == window


def test_an_empty_micro_batch_asks_for_nothing_and_moves_nothing():
    model, encoded = tiny(), rows()
    b = micro(encoded, [], PAD)
    assert b["input_ids"].shape[1] == min(len(e["input_ids"]) for e in encoded) and (b["labels"] == -100).all()
    total, n = supervised_loss(model, b)
    total.backward()
    assert n == 0 and total == 0 and all(p.grad is not None and not p.grad.any() for p in lora.lora_parameters(model))


def test_asked_counts_what_the_loss_counts():
    model, encoded = tiny(), rows()
    window = windows(encoded, 1, 80, 3, 0)[0]
    assert asked(encoded, window) == sum(supervised_loss(model, micro(encoded, b, PAD))[1].item() for b in window if b)


# ---------- N processes = one process

@pytest.fixture(scope="module")
def one(): return bare()

def test_the_runs_are_uneven():
    "Otherwise the tests below would prove little: windows of different size, some smaller than the group, tokens unequal"
    work = windows(rows(), *(CONF[k] for k in ("epochs", "max_tokens", "accumulate", "seed")))
    assert {len(w) for w in work} >= {4} and any(len(w) % 2 for w in work) and any(len(w) < 3 for w in work)
    assert len({asked(rows(), [b]) for w in work for b in w}) > 3


def test_one_process_under_accelerate_is_the_bare_loop(one, tmp_path):
    got, = group(1, fit, tmp=tmp_path, join=False)
    assert got["losses"] == pytest.approx(one[0], abs=1e-5) and apart(got["weights"], one[1]) <= 1e-5


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("strategy,kind", [("ddp", "DistributedDataParallel"), ("fsdp", "FSDPLossOf")])
def test_processes_give_the_losses_and_weights_of_one(n, strategy, kind, one, tmp_path):
    got = group(n, fit, strategy, tmp=tmp_path)
    assert all(isinstance(g, dict) for g in got), got
    for g in got:
        assert g["kind"] == kind
        assert g["losses"] == pytest.approx(one[0], abs=1e-5)
        assert apart(g["weights"], one[1]) <= 1e-5
    assert all(apart(g["weights"], got[0]["weights"]) == 0 and g["losses"] == got[0]["losses"] for g in got)
    assert one[0][0] - one[0][-1] > .05, "nothing was learnt, so nothing was tested"
    moved = apart(one[1], full(tiny()))
    assert moved > 1e-3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_frozen_weights_may_have_16_bits(strategy, tmp_path):
    losses, weights = bare(bf16=True)
    got = group(2, fit, strategy, None, None, True, tmp=tmp_path)
    assert all(isinstance(g, dict) for g in got), got
    assert got[0]["losses"] == pytest.approx(losses, abs=2e-2) and got[0]["losses"] == got[1]["losses"]
    assert all(w.dtype == torch.float32 for w in got[0]["weights"].values())


def test_fsdp_holds_parts_that_add_up_and_ddp_holds_everything(tmp_path):
    alone, = group(1, fit, tmp=tmp_path, join=False)
    for strategy, times in (("ddp", 2), ("fsdp", 1)):
        got = group(2, fit, strategy, tmp=tmp_path)
        for k, v in alone["held"].items():
            there = sum(g["held"][k] for g in got)
            assert there == pytest.approx(times*v, rel=.02 if strategy == "fsdp" else 0), (strategy, k)


def collectives():
    import torch.distributed as dist
    counts = {}
    for kind, names in (("scatter", ("reduce_scatter_single", "reduce_scatter_tensor")), ("gather", ("all_gather_single", "all_gather_into_tensor"))):
        name = next(n for n in names if hasattr(dist, n))   # the first is the newer name
        def spy(*a, _kind=kind, _old=getattr(dist, name), **kw): counts[_kind] = counts.get(_kind, 0) + 1; return _old(*a, **kw)
        setattr(dist, name, spy)
    o = scaling.Options(**CONF)
    encoded, model = rows(), tiny().train()
    acc = scaling.engine("fsdp", model._no_split_modules, cpu=True)
    wrapped, opt = acc.prepare(scaling.LossOf(model, supervised_loss), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    window = next(w for w in windows(encoded, o.epochs, o.max_tokens, o.accumulate, o.seed) if len(w) == 4)
    mine = [micro(encoded, b, PAD) for b in share(window, acc.process_index, acc.num_processes)]
    scaling.window_step(acc, wrapped, mine, asked(encoded, window))
    return counts


def test_gradients_are_exchanged_once_a_window(tmp_path):
    got = group(2, collectives, tmp=tmp_path)
    assert isinstance(got[0], dict) and got[0] == got[1], got
    assert got[0]["scatter"] == LAYERS          # of two micro-batches each: one exchange
    assert got[0]["gather"] >= 2*2*LAYERS     # each layer, forward and backward, each micro-batch


# ---------- checkpoints

def files(folder): return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A run of two processes under FSDP2 with dropout, whole; its folder with the last two checkpoints"
    tmp = tmp_path_factory.mktemp("saved")
    got = group(2, fit, "fsdp", None, None, False, .1, tmp=tmp)
    kept = group(2, fit_in, "fsdp", str(tmp/"run"), 1, False, .1, tmp=tmp)
    assert isinstance(got[0], dict) and isinstance(kept[0], dict), (got, kept)
    return got[0], kept[0], tmp/"run"


def fit_in(strategy, folder, save_every, resume, dropout=0., conf=None):
    return fit(strategy, conf, None, False, dropout, folder=folder, save_every=save_every, resume=resume)


def test_saving_changes_nothing(saved):
    assert apart(saved[0]["weights"], saved[1]["weights"]) == 0 and saved[0]["losses"] == saved[1]["losses"]


def test_a_checkpoint_has_a_part_from_each_and_no_pickle(saved):
    last = len(saved[0]["losses"]) - 1
    parts = [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    assert last >= 3 and files(saved[2]) == [f"step-{n:08}/{f}" for n in (last-1, last) for f in (*parts, "state.json")]
    a, b = ((saved[2]/f).stat().st_size for f in files(saved[2])[:2])
    assert .8 < a/b < 1.25
    from safetensors import safe_open
    kept = {}   # what both hold, without padding and headers
    for f in files(saved[2])[:2]:
        with safe_open(saved[2]/f, "pt") as g:
            for k in g.keys(): kept[k] = kept.get(k, 0) + g.get_tensor(k).numel()
    n = sum(w.numel() for w in saved[0]["weights"].values())
    assert sum(v for k, v in kept.items() if not k.endswith(".step")) == 3*n, list(kept)   # A and B, two moments of each, nothing frozen


def test_resumed_by_as_many_it_is_bit_for_bit_the_same(saved, tmp_path):
    shutil.copytree(saved[2], tmp_path/"run")
    (tmp_path/"run/.step-00099").mkdir()
    (tmp_path/"run/step-00098").mkdir()   # no state.json: all is lost
    got = group(2, fit_in, "fsdp", str(tmp_path/"run"), 0, True, .1, tmp=tmp_path)
    assert isinstance(got[0], dict), got
    assert apart(got[0]["weights"], saved[0]["weights"]) == 0 and got[0]["losses"] == saved[0]["losses"]
    assert got[0]["norms"] == saved[0]["norms"] and got[0]["tokens"] == saved[0]["tokens"]
    assert not (tmp_path/"run/.step-00099").exists() and (tmp_path/"run/step-00098.damaged").exists()


@pytest.mark.parametrize("n,strategy", [(1, "ddp"), (2, "ddp"), (3, "fsdp")])
def test_resumed_by_another_group_it_is_the_same_up_to_rounding(n, strategy, one, tmp_path):
    group(2, fit_in, "fsdp", str(tmp_path/"run"), 2, False, tmp=tmp_path)
    assert latest(tmp_path/"run")
    got = group(n, fit_in, strategy, str(tmp_path/"run"), 0, True, tmp=tmp_path, join=n > 1)
    assert isinstance(got[0], dict), got
    assert got[0]["losses"] == pytest.approx(one[0], abs=1e-5) and apart(got[0]["weights"], one[1]) <= 1e-5


def test_another_run_is_refused(saved, tmp_path):
    shutil.copytree(saved[2], tmp_path/"run")
    got = group(2, fit_in, "fsdp", str(tmp_path/"run"), 0, True, .1, dict(lr=1e-3), tmp=tmp_path)
    assert all("made with lr = 0.005, and now it is 0.001" in g for g in got), got
    got = group(2, fit_in, "ddp", str(tmp_path/"run"), 0, False, .1, tmp=tmp_path)
    assert all("go on with resume=True" in g for g in got), got


@pytest.mark.parametrize("resume", [True, False])
def test_a_finished_run_is_not_written_over(resume, tmp_path):
    (tmp_path/"run").mkdir(), (tmp_path/"run/history.json").write_text("{}")
    got = group(2, fit_in, "ddp", str(tmp_path/"run"), 2, resume, tmp=tmp_path)
    assert all("holds a finished run, without checkpoints" in g for g in got) and files(tmp_path/"run") == ["history.json"], got


# ---------- disks that err, disks that are full

def harm(folder, how):
    "Do something to the newest checkpoint; it, and the one before"
    newest, before = scaling._kept(folder)
    path = newest/"state.json" if how == "state" else max(newest.glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[len(raw)//2] ^= 1
    if how == "gone": path.unlink()
    else: path.write_bytes(path.read_bytes()[:-1] if how == "cut" else raw)
    return newest, before


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "state"])
def test_a_damaged_checkpoint_is_seen(how, saved, tmp_path, capsys):
    run = Path(shutil.copytree(saved[2], tmp_path/"run"))
    assert latest(run) == scaling._kept(run)[0] and capsys.readouterr().out == ""
    newest, before = harm(run, how)
    assert latest(run) == before and capsys.readouterr().out.startswith(f"{newest.name} is damaged (")
    (before/"state.json").unlink()
    assert latest(run) is None


def test_a_flipped_bit_costs_one_checkpoint_and_not_the_run(saved, tmp_path):
    run = Path(shutil.copytree(saved[2], tmp_path/"run"))
    newest, before = harm(run, "flipped")
    got = group(2, fit_in, "fsdp", str(run), 0, True, .1, tmp=tmp_path)
    assert isinstance(got[0], dict) and isinstance(got[1], dict), got
    assert apart(got[0]["weights"], saved[0]["weights"]) == 0 and got[0]["losses"] == saved[0]["losses"] == got[1]["losses"]
    assert scaling._kept(run) == [before] and (run/f"{newest.name}.damaged/state.json").exists()
    (before/"state.json").unlink()
    got = group(2, fit_in, "fsdp", str(run), 0, True, .1, tmp=tmp_path)
    assert all("can be read: delete the folder" in g for g in got), got


def fit_tight(what, who, *args):
    "As `fit_in`; from the second checkpoint on, one process can't write its part, or the state"
    import resource
    seen = []
    def tight(f, limit):
        def g(*a):
            seen.append(1)
            if torch.distributed.get_rank() == who and len(seen) > 1: return limit(f, a)
            return f(*a)
        return g
    def by_the_system(f, a):   # no file may grow over 1,000 bytes
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try: return f(*a)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    def no_space(f, a): raise OSError(errno.ENOSPC, "No space left on device")
    if what == "part": scaling._write_part = tight(scaling._write_part, by_the_system)
    else: scaling.write_atomic = tight(scaling.write_atomic, no_space)
    return fit_in(*args)


@pytest.mark.parametrize("what,who", [("part", 0), ("part", 1), ("state", 0)])
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(what, who, saved, tmp_path):
    got = group(2, fit_tight, what, who, "fsdp", str(tmp_path/"run"), 1, False, .1, tmp=tmp_path)
    for g in got:
        assert isinstance(g, dict), got
        assert apart(g["weights"], saved[0]["weights"]) == 0 and g["losses"] == saved[0]["losses"]
        assert [e["step"] for e in g["events"]] == list(range(2, len(g["losses"]))) and g["events"] == got[0]["events"]
        assert all("was not written ([Errno" in e["what"] and "make room" in e["what"] for e in g["events"])
    assert [p.name for p in (tmp_path/"run").iterdir()] == ["step-00000001"] and latest(tmp_path/"run")


def save_some(folder, steps):
    model = tiny()
    acc = scaling.engine("ddp", cpu=True)
    wrapped, opt = acc.prepare(scaling.LossOf(model, supervised_loss), torch.optim.AdamW(lora.lora_parameters(model)))
    for s in steps: scaling.save_checkpoint(acc, wrapped, opt, folder, s, dict(loss=.1))
    return [p.name for p in sorted(Path(folder).iterdir())], latest(folder).name


def test_names_are_in_the_order_of_their_steps(tmp_path):
    got, = group(1, save_some, str(tmp_path/"run"), [9, 99_999, 100_000], tmp=tmp_path, join=False)
    assert got == (["step-00099999", "step-00100000"], "step-00100000"), got


# ---------- devices

def lone_step(dev, encoded):
    "The second of two processes takes the steps of a run on `dev`; what it computes there is never read"
    number = lambda t: types.SimpleNamespace(item=lambda: 1.)
    acc = types.SimpleNamespace(device=dev, num_processes=2, process_index=1, is_main_process=False, no_sync=lambda m: contextlib.nullcontext(),
                                backward=lambda loss: loss.backward(), reduce=lambda t, how: number(t),
                                clip_grad_norm_=lambda ps, c: number(torch.nn.utils.clip_grad_norm_(list(ps), c)))
    with torch.device(dev): model = tiny().train()
    o = scaling.Options(**CONF)
    work = windows(encoded, 1, 80, 3, 0)
    assert any([] in share(w, 1, 2) for w in work)   # with empty micro-batches
    ps = [p for p in model.parameters() if p.requires_grad]
    opt, history = torch.optim.AdamW(ps), scaling.History()
    scaling._steps(acc, scaling.LossOf(model, supervised_loss), opt, encoded, work, history, o, lambda step: None)
    assert len(history.steps) == len(work) and {p.device.type for p in ps} == {dev.type} and len(opt.state) == len(ps)


def test_all_batches_come_on_the_models_device(monkeypatch):
    "On a device that is none (fake tensors): a batch left on the CPU stops the step"
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.nn import functional as F
    from test_training import OneDevice
    monkeypatch.setattr(speed, "chunked_cross_entropy", lambda h, head, want, *a: F.cross_entropy(head(h).float(), want, reduction="sum"))
    dev, encoded = torch.device("cuda" if torch.version.cuda else "meta"), rows()
    fake = lambda: FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with fake(), OneDevice(): lone_step(dev, encoded)
    monkeypatch.setattr(scaling, "micro", lambda encoded, rows, pad, device: micro(encoded, rows, pad))
    with pytest.raises((AssertionError, RuntimeError), match="mixes|same device"), fake(), OneDevice(): lone_step(dev, encoded)


# ---------- what is refused

def test_bad_requests_are_sentences_on_every_process(tmp_path):
    got = group(3, fit, "ddp", None, rows(2), tmp=tmp_path)
    assert all(g == "ValueError: 3 processes and 2 rows: give at least one row to each, or start fewer processes" for g in got), got
    got = group(2, fit, "fsdp", dict(accumulate=1), tmp=tmp_path)
    assert all("accumulate counts micro-batches over all processes: take 2 or more" in g for g in got), got


def test_refused_before_anything_starts():
    with pytest.raises(ValueError, match="No strategy 'zero'; there are: ddp, fsdp"): scaling.engine("zero")
    deaf = [dict(r, labels=[-100]*len(r["labels"])) for r in rows()]
    with pytest.raises(ValueError, match="no token to learn from"):
        scaling._check(deaf, windows(deaf, 1, 80, 2, 0), scaling.Options(), 2)
    with pytest.raises(ValueError, match="needs a folder"): scaling._saver(None, None, None, None, 2, 5, None)
    for name in ("float16", "int8", "nonsense"):
        with pytest.raises(ValueError, match="float32 or bfloat16"): scaling._dtype(name, True)


def test_without_accelerate_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for f in (lambda: scaling.engine("ddp"), lambda: start(["launch"])):
        with pytest.raises(ImportError, match="pip install accelerate"): f()


def test_an_old_torch_is_named_before_the_run(monkeypatch):
    import torch.distributed.checkpoint as dcp
    monkeypatch.delattr(dcp, "HuggingFaceStorageWriter")
    with pytest.raises(ImportError, match="newer one, or do without checkpoints"): scaling._saver(None, None, None, "here", 2, 5, None)


def test_a_gradient_that_is_no_number_stops_the_run():
    class Acc:
        def clip_grad_norm_(self, ps, clip): return torch.tensor(float("nan"))
    with pytest.raises(FloatingPointError, match="step 5: halve the learning rate"):
        scaling.optimizer_step(Acc(), torch.nn.Linear(1, 1), None, 1., 5)


def waits(port):
    os.environ["MASTER_PORT"] = str(port)
    acc = scaling.engine("ddp", cpu=True, timeout=10)
    if acc.process_index: time.sleep(60)
    begun = time.perf_counter()
    try: acc.wait_for_everyone()
    except RuntimeError: return time.perf_counter() - begun
    return "nobody was missed"


def test_a_process_that_hangs_is_given_up(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    got = group(2, waits, port, tmp=tmp_path, join=False, wait_for=[0], timeout=40)
    assert isinstance(got[0], float) and 1 < got[0] < 35, got


def say(argv):
    "`main` with what it would print and its exit"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try: scaling.main(argv)
        except SystemExit as e: return [out.getvalue(), e.code]
    return [out.getvalue(), 0]


def test_the_shell_says_an_error_once(tmp_path, base):
    argv = words(model=base, corpus="desk", rows=1, folder=tmp_path/"r", cpu=True, profile="test")[2:]
    first, second = group(2, say, argv, tmp=tmp_path)
    assert first == ["", "ftcourse.scaling: 2 processes and 1 rows: give at least one row to each, or start fewer processes"]
    assert second == ["", 1]
    assert say(words(corpus="no_such", model=base, cpu=True)[2:])[1].startswith("ftcourse.scaling: No corpus is called 'no_such'")


# ---------- through the launcher

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A small random model with the bundled tokenizer, in a folder"
    _, tok = models.load(dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "llama", vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder), tok.save_pretrained(folder)
    return str(folder)


SHELL = dict(corpus="desk", max_tokens=256, accumulate=3, dtype="float32", cpu=True, profile="test", r=4)


def adapter(folder):
    return lora.read_adapter(Path(folder)/"adapter")[1]


def test_accelerate_launch_trains_the_bundled_model(tmp_path):
    flags = dict(SHELL, rows=5, epochs=1)
    line = command(2, *words(folder=tmp_path/"two", **flags), threads=1)
    p = subprocess.run([BIN/"accelerate", *line], capture_output=True, text=True, timeout=240, env={**os.environ, "FTCOURSE_PLAIN": "1"})
    assert p.returncode == 0, p.stderr[-3000:]
    assert p.stdout.count(" trained parameters") == 1 and p.stderr.count("training: ") <= 2   # process 0 alone speaks
    torch.set_num_threads(1)
    one = scaling.run(words(folder=tmp_path/"one", **flags)[2:])
    two = json.loads((tmp_path/"two/history.json").read_text())
    assert [s["loss"] for s in two["steps"]] == pytest.approx([s["loss"] for s in one.steps], abs=1e-5)
    assert len(one.steps) >= 1 and two["tokens"] == one.tokens
    assert apart(adapter(tmp_path/"one"), adapter(tmp_path/"two")) <= 1e-5
    fresh, _ = models.load(dtype=torch.float32)
    lora.load_adapter(fresh, tmp_path/"two/adapter")
    lora.check_trained(fresh)


def alive(pids): return [p for p in pids if Path(f"/proc/{p}/cmdline").exists() and Path(f"/proc/{p}/cmdline").read_bytes()]


def test_a_killed_process_ends_the_run_and_resume_gives_the_same_weights(tmp_path, base):
    import psutil
    flags = dict(SHELL, model=base, rows=16, epochs=6, strategy="fsdp", save_every=2)
    whole = group(2, say, words(folder=tmp_path/"whole", **flags)[2:], tmp=tmp_path)
    assert whole[0][1] == 0 and whole[1] == ["", 0], whole
    p = start(command(2, *words(folder=tmp_path/"cut", **flags), threads=1))
    end = time.time() + 90
    while not latest(tmp_path/"cut"):
        assert p.poll() is None and time.time() < end, p.stderr.read()[-2000:]
        time.sleep(.02)
    workers = psutil.Process(p.pid).children(recursive=True)
    next(w for w in workers if w.environ().get("RANK") == "1").send_signal(signal.SIGKILL)
    begun = time.time()
    with pytest.raises(RuntimeError, match="SIGKILL"): finish(p, 90)
    assert time.time() - begun < 60
    psutil.wait_procs(workers, timeout=20)
    assert not alive([w.pid for w in workers]) and not (tmp_path/"cut/history.json").exists()
    at = int(latest(tmp_path/"cut").name[5:])
    again = group(2, say, words(folder=tmp_path/"cut", resume=True, **flags)[2:], tmp=tmp_path)
    assert again[0][1] == 0, again
    steps = [json.loads((tmp_path/d/"history.json").read_text())["steps"] for d in ("whole", "cut")]
    assert at < len(steps[0]) and steps[0] == steps[1]
    assert apart(adapter(tmp_path/"whole"), adapter(tmp_path/"cut")) == 0


def test_accelerate_launch_cpu_starts_one_process_and_we_say_so(tmp_path):
    "accelerate leaves several CPU processes to MPI; to train on one of two in silence would be worse than to stop"
    p = subprocess.run([BIN/"accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "ftcourse.scaling", "--rows", "4", "--folder", tmp_path/"r"],
                       capture_output=True, text=True, timeout=120)
    assert p.returncode != 0 and "starts one process, whatever --num_processes says" in p.stderr and "--multi_gpu" in p.stderr


def test_a_launch_that_takes_too_long_is_stopped(tmp_path):
    import psutil
    (tmp_path/"job.py").write_text("import time; time.sleep(300)")
    p = start(command(2, str(tmp_path/"job.py"), threads=1))
    end = time.time() + 60
    while len(workers := psutil.Process(p.pid).children(recursive=True)) < 2 and time.time() < end: time.sleep(.1)
    with pytest.raises(RuntimeError, match="Not done after 0.5 seconds"): finish(p, .5)
    psutil.wait_procs(workers, timeout=20)
    assert not alive([w.pid for w in workers])


def test_the_command_is_words_of_a_shell():
    line = command(4, *words(rows=20, resume=True, cpu=False, corpus=None, folder="a b"), threads=2)
    assert shlex.split(shlex.join(line)) == line
    assert line[:2] == ["launch", "--multi_gpu"] and line[-6:] == ["-m", "ftcourse.scaling", "--rows", "20", "--resume", "--folder"][-5:] + ["a b"]
    assert "--multi_gpu" not in command(1, "x.py")
    assert line[line.index("--main_process_port")+1] == "0"   # a free one, found when it starts


# ---------- choosing

def test_choose_counts_what_is_gathered_whole():
    "Embedding and output layer belong to no decoder layer: FSDP2 holds them whole during the pass"
    n, t, outside = 8_030_000_000, 41_000_000, 2*128_256*4096
    a, b = choose(n, t, 2, 16e9, 32), choose(n, t, 2, 16e9, 32, root=outside)
    assert a.strategy == "FSDP2" and b.strategy == "too large"
    assert b.sharded - a.sharded == pytest.approx(2*outside*(1 - 2/32))
    with pytest.raises(ValueError): choose(n, t, 2, 16e9, root=n)


def test_choose():
    c = choose(8_000_000_000, 20_000_000, 1, 24e9)
    assert c.strategy == "one GPU" or c.whole > c.limit
    assert choose(135_000_000, 1_000_000, 2, 16e9, 30).strategy == "DDP"
    assert choose(8_000_000_000, 8_000_000_000, 8, 80e9).strategy == "FSDP2"
    big = choose(8_000_000_000, 8_000_000_000, 1, 80e9)
    assert big.strategy == "too large" and choose(8_000_000_000, 8_000_000_000, big.least, 80e9).strategy == "FSDP2"
    assert choose(8_000_000_000, 8_000_000_000, big.least-1, 80e9).strategy == "too large"
    assert "128.0 GB" in str(big)
    for bad in (dict(params=1, trainable=2), dict(params=5, trainable=0), dict(params=5, trainable=1, gpus=0)):
        with pytest.raises(ValueError, match="at least one GPU"): choose(**{**dict(gpus=1, gpu_bytes=1e9), **bad})


def test_choose_counts_what_processes_hold(tmp_path):
    "Its arithmetic against measured bytes: frozen, trained, moments (and a gradient as large as what is trained)"
    got, = group(1, fit, tmp=tmp_path, join=False)
    h, model = got["held"], tiny()
    n, t = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert choose(n, t, 1, 1e9, base=4).whole == h["frozen"] + 2*h["trained"] + h["optimizer"]


def test_traffic():
    assert traffic(100, 10, 1) == dict(ddp=0, fsdp=0)
    t = traffic(8_000_000_000, 20_000_000, 8)
    assert t["ddp"] == pytest.approx(2*7/8*4*20e6) and t["fsdp"]/t["ddp"] > 100
    assert traffic(100, 10, 2, micros=4)["fsdp"] > 3*traffic(100, 10, 2)["fsdp"]


@pytest.mark.cuda
def test_two_gpus_give_the_losses_of_one(tmp_path):
    if torch.cuda.device_count() < 2: pytest.skip("needs two GPUs")
    flags = dict(corpus="desk", rows=24, max_tokens=256, accumulate=4, epochs=1, dtype="float32", profile="test")
    one = scaling.launch(1, folder=tmp_path/"one", **flags)
    for strategy in scaling.STRATEGIES:
        two = scaling.launch(2, folder=tmp_path/strategy, strategy=strategy, **flags)
        assert [s["loss"] for s in two.steps] == pytest.approx([s["loss"] for s in one.steps], abs=1e-3)
