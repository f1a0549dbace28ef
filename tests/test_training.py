"The loop is exact: losses, gradients, windows, validation, counts; and it stops before it spoils anything"
import json, math, os, re, shutil, signal, subprocess, sys, time, types
import xml.etree.ElementTree as ET
from pathlib import Path
import numpy as np, pytest, torch
from torch.nn import functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from own_process import in_own_process
from ftcourse import corpora, formats, lora, models, speed, training
from ftcourse.formats import batches, collate, encode_all
from ftcourse.runtime import Meter, seed_everything
from ftcourse.speed import full_loss, pick_loss, plain_attention, supervised_loss
from ftcourse.training import (History, LrSearch, cast_for, check_packing, checkpointed, collate_packed, compiled, curve, find_lr, fit, layers_of,
                               lr_at, make_optimizer, optimizer_step, pack, parameter_groups, smooth, status, to_device, trained_parameters,
                               validate, window_step, windows, with_positions)

ROOT = Path(__file__).resolve().parent.parent

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def tok(): return models.load()[1]

@pytest.fixture(scope="module")
def rows(): return corpora.load("desk", "train", n=14)

@pytest.fixture(scope="module")
def encoded(rows, tok): return encode_all(rows, tok)


def tiny(arch="llama", seed=0, scale=3., **kw):
    torch.manual_seed(seed)
    conf = AutoConfig.for_model(arch, vocab_size=49152, **SIZE, **kw, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model = AutoModelForCausalLM.from_config(conf).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.mul_(scale)
    return model


def with_lora(seed=0, r=4):
    model = tiny(seed=7)
    seed_everything(seed)
    lora.add_lora(model, r=r, alpha=8)
    return model


def grads(model, window, loss_fn=supervised_loss):
    model.zero_grad(set_to_none=True)
    loss = window_step(model, window, loss_fn, torch.amp.GradScaler("cpu", enabled=False))
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def own_loss(model, b, mask=True):
    kw = dict(attention_mask=b["attention_mask"]) if mask else {}
    return model(input_ids=b["input_ids"], labels=b["labels"], **kw).loss


# ---------- the loss

@pytest.mark.parametrize("arch,kw", [("llama", {}), ("qwen3", dict(head_dim=8)), ("qwen2", {}), ("mistral", dict(head_dim=8, sliding_window=16)),
                                     ("gemma", dict(head_dim=8)), ("gemma2", dict(head_dim=8)), ("gemma3_text", dict(head_dim=8)),
                                     ("cohere", {}), ("gpt_neox", {})])
def test_the_picked_loss_is_the_models_own(arch, kw, encoded, tok):
    if arch == "gpt_neox": kw = dict(kw)
    model = tiny(arch, **kw)
    b = collate(encoded[:5], tok.pad_token_id)
    with torch.no_grad():
        total, n = pick_loss(model, collate(encoded[:1], tok.pad_token_id))(model, b)
        assert (total/n).item() == pytest.approx(own_loss(model, b).item(), abs=1e-5)
    assert n == (b["labels"][:, 1:] != -100).sum() and not model.training


def test_supervised_and_full_loss_have_the_same_gradient(encoded, tok):
    model, b = tiny(), collate(encoded[:4], tok.pad_token_id)
    (a, ga), (c, gc) = grads(model, [b]), grads(model, [b], full_loss)
    model.zero_grad()
    own_loss(model, b).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert abs(a - c) < 1e-5 and (ga - gc).abs().max() < 1e-6 and (ga - g).abs().max() < 1e-6


@pytest.mark.parametrize("arch,kw,want", [("llama", {}, "supervised_loss"), ("gemma2", dict(head_dim=8), "full_loss"),
                                          ("gemma2", dict(head_dim=8, final_logit_softcapping=.05), "full_loss"),
                                          ("cohere", {}, "full_loss"), ("cohere", dict(logit_scale=1.), "supervised_loss"),
                                          ("gemma2", dict(head_dim=8, final_logit_softcapping=None), "supervised_loss")])
def test_pick_loss_sees_what_is_done_to_the_logits(arch, kw, want, encoded, tok):
    assert pick_loss(tiny(arch, **kw), collate(encoded[:1], tok.pad_token_id)).__name__ == want


def test_pick_loss_leaves_the_mode_alone(encoded, tok):
    for mode in (True, False):
        model = tiny().train(mode)
        pick_loss(model, collate(encoded[:1], tok.pad_token_id))
        assert model.training is mode


def test_the_bundled_model_in_16_bits_takes_the_short_way(encoded, tok):
    assert pick_loss(models.load(dtype=torch.bfloat16)[0], collate(encoded[:1], tok.pad_token_id)) is supervised_loss


@pytest.mark.parametrize("loss_fn", [supervised_loss, full_loss])
def test_padding_has_no_influence(encoded, tok, loss_fn):
    model = tiny()
    short = min(encoded, key=lambda e: len(e["input_ids"]))
    alone, ga = grads(model, [collate([short], tok.pad_token_id)], loss_fn)
    for pad in (0, 2, 777):
        b = collate([short, max(encoded, key=lambda e: len(e["input_ids"]))], pad)
        with torch.no_grad(): b = {k: v[:1] for k, v in b.items()}
        padded, gb = grads(model, [b], loss_fn)
        assert abs(alone - padded) < 1e-5 and (ga - gb).abs().max() < 1e-5


# ---------- accumulation

@pytest.mark.parametrize("accumulate", [1, 2, 3, 5])
def test_a_window_is_one_big_batch(encoded, tok, accumulate):
    "Every window of a run, the last partial one included"
    model = with_lora()
    with torch.no_grad():
        for p in lora.lora_parameters(model): p.normal_(std=.05)
    work = windows(encoded, 1, 300, accumulate, seed=0)
    assert len(work[-1]) <= accumulate and sum(len(b) for w in work for b in w) == len(encoded) and len(work) > 1
    if accumulate == 5: assert len(work[-1]) < 5
    for w in work[:2] + work[-1:]:
        small, gs = grads(model, [collate([encoded[i] for i in b], tok.pad_token_id) for b in w])
        big, gb = grads(model, [collate([encoded[i] for b in w for i in b], tok.pad_token_id)])
        assert small == pytest.approx(big, abs=1e-5) and (gs - gb).abs().max() < 1e-5 and gb.abs().max() > 1e-3


def test_windows_go_through_every_row_once_an_epoch(encoded):
    work = windows(encoded, 3, 400, 2, seed=1)
    assert sorted(i for w in work for b in w for i in b) == sorted(list(range(len(encoded)))*3)
    per = len(work)//3
    assert work[:per] != work[per:2*per] and work == windows(encoded, 3, 400, 2, seed=1) != windows(encoded, 3, 400, 2, seed=2)


# ---------- learning rate, curves

@pytest.mark.parametrize("steps", [1, 2, 3, 10, 17, 100, 1000])
def test_lr_rises_falls_and_keeps_its_bounds(steps):
    xs = [lr_at(s, steps) for s in range(steps)]
    top = xs.index(max(xs))
    assert all(0 < x <= 1 for x in xs) and max(xs) == 1
    assert xs[:top+1] == sorted(xs[:top+1]) and xs[top:] == sorted(xs[top:], reverse=True)
    if steps >= 100: assert xs[0] < .2 and xs[-1] == pytest.approx(.02, abs=.01) and top <= .07*steps


def test_a_short_run_warms_up_too():
    assert [lr_at(s, 22) for s in range(3)] == pytest.approx([1/3, 2/3, 1]) and lr_at(0, 4) == .5 and lr_at(0, 1) == 1


def test_lr_without_warmup_and_smooth():
    assert lr_at(0, 10, warmup=0) == 1 and lr_at(9, 10, floor=.5) >= .5
    assert smooth([3.]*5) == pytest.approx([3.]*5) and smooth([1, 2])[0] == 1 and smooth([]) == []


# ---------- validation

def test_validation_is_the_row_by_row_mean_over_tokens(encoded, tok):
    model = tiny().train()
    total = n = 0
    with torch.no_grad():
        for e in encoded:
            logits = model(torch.tensor([e["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(e["labels"][1:])
            total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            n += (labels != -100).sum().item()
    for budget in (1, 300, 5000):
        assert validate(model, encoded, tok.pad_token_id, max_tokens=budget) == pytest.approx(total/n, abs=1e-5)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_validation_is_the_same_number_each_time(encoded, tok):
    model = tiny()
    same = [encoded[i] for i in (0, 1)]*10
    assert len({validate(model, same, tok.pad_token_id, max_tokens=300) for _ in range(4)}) == 1


# ---------- attention

def test_plain_attention_gives_the_same_loss(encoded, tok):
    model, b = tiny(), collate(encoded[:4], tok.pad_token_id)
    assert model.config._attn_implementation == "sdpa"
    a, ga = grads(model, [b])
    with plain_attention(model, b["input_ids"].shape[1]) as used:
        assert used and model.config._attn_implementation == "eager"
        c, gc = grads(model, [b])
    assert abs(a - c) < 1e-5 and (ga - gc).abs().max() < 1e-5 and model.config._attn_implementation == "sdpa"


def test_plain_attention_is_put_back_after_an_error():
    model = tiny()
    with pytest.raises(KeyError):
        with plain_attention(model, 10): raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_plain_attention_is_for_short_rows_and_fused_models():
    model = tiny()
    with plain_attention(model, 513) as used: assert not used and model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with plain_attention(model, 10) as used: assert not used
    assert model.config._attn_implementation == "eager"


# ---------- what may be trained

def test_nothing_trainable_and_16_bits_are_refused(rows, tok):
    model = tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="Every parameter is frozen.*add_lora"): fit(model, tok, rows)
    for low in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"trained in {str(low)[6:]}, where small steps round to nothing.*float32"):
            fit(tiny().to(low), tok, rows)
    one = tiny().requires_grad_(False)
    one.lm_head.weight.requires_grad_(True)
    assert len(trained_parameters(one)) == 1


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}
def unchanged(model, was): return all(torch.equal(v, was[k]) for k, v in model.state_dict().items())

BAD = {"no answer": ({"output": " "}, "Row 3: the conversation has no answer"),
       "50,000 tokens": ({"input": "word "*50_000}, r"Row 3: 50,\d\d\d tokens, and max_length is 512")}

@pytest.mark.parametrize("where", ["train", "valid"])
@pytest.mark.parametrize("case", BAD)
def test_bad_rows_raise_before_anything_changes(rows, tok, case, where):
    change, says = BAD[case]
    bad = [dict(rows[0]), dict(rows[1]), {**rows[2], **change}]
    model = with_lora()
    was, mode = state(model), model.training
    with pytest.raises(ValueError, match=says): fit(model, tok, bad if where == "train" else rows, rows if where == "train" else bad)
    assert unchanged(model, was) and model.training == mode and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kw", [dict(accumulate=0), dict(epochs=0), dict(max_tokens=0), dict(lr=-1.)])
def test_a_setting_that_means_nothing_is_a_sentence(rows, tok, kw):
    with pytest.raises(ValueError, match=next(iter(kw))): fit(with_lora(), tok, rows, **kw)


# ---------- when it goes wrong

def test_a_loss_that_is_no_number_stops_at_its_step(rows, tok):
    model = with_lora()
    was = state(model)
    with torch.no_grad(): model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The loss is nan at step 1: halve the learning rate .0.002.*rows"): fit(model, tok, rows)
    with torch.no_grad(): model.model.norm.weight.copy_(was["model.norm.weight"])
    assert unchanged(model, was) and model.config._attn_implementation == "sdpa"


def test_it_stops_in_the_middle_and_keeps_the_steps_before(rows, tok, monkeypatch):
    steps, real = [], training.window_step
    monkeypatch.setattr(training, "window_step", lambda *a: (steps.append(1), float("inf") if len(steps) == 3 else real(*a))[1])
    model = with_lora()
    with pytest.raises(FloatingPointError, match="inf at step 3"): fit(model, tok, rows, max_tokens=300)
    assert all(torch.isfinite(p).all() for p in model.parameters()) and not model.training


def test_a_gradient_that_is_no_number_does_not_reach_the_weights(rows, tok):
    "The loss may be fine and its gradient not"
    model = with_lora()
    p = next(p for p in model.parameters() if p.requires_grad)
    p.register_hook(lambda g: g*float("nan"))
    with pytest.raises(FloatingPointError, match="step 1"): fit(model, tok, rows, max_tokens=300)
    assert all(torch.isfinite(p).all() for p in model.parameters())


# ---------- whole runs

def adapters(seed, rows, tok, order=None, **kw):
    model = with_lora(seed)
    h = fit(model, tok, rows, rows.select(range(4)), seed=seed if order is None else order, max_tokens=300, **kw)
    return h, torch.cat([p.detach().flatten() for p in lora.lora_parameters(model)])


def test_a_seed_repeats_the_run_bit_for_bit(rows, tok):
    (h1, a), (h2, b), (h3, c), (_, d) = (adapters(1, rows, tok), adapters(1, rows, tok), adapters(2, rows, tok), adapters(1, rows, tok, order=2))
    assert torch.equal(a, b) and h1.steps == h2.steps and h1.valid == h2.valid
    assert not torch.equal(a, c) and not torch.equal(a, d)


def test_history_counts_exactly(rows, tok, encoded):
    model = with_lora()
    h = fit(model, tok, rows, rows.select(range(4)), epochs=2, max_tokens=300, accumulate=2, looks=3)
    assert h.tokens == 2*sum(len(e["input_ids"]) for e in encoded) == h.steps[-1]["tokens"]
    assert h.supervised == 2*sum(l != -100 for e in encoded for l in e["labels"])
    assert h.trainable == sum(p.numel() for p in lora.lora_parameters(model)) and h.settings["rows"] == len(rows)
    assert [s["step"] for s in h.steps] == list(range(1, len(h.steps)+1)) and len(h.steps) == len(windows(encoded, 2, 300, 2, 0))
    assert [v["step"] for v in h.valid] == [0, round(len(h.steps)/2), len(h.steps)] and h.tokens_per_s == pytest.approx(h.tokens/h.seconds)
    assert not model.training and str(len(h.steps)) in str(h) and all(s["norm"] > 0 and s["lr"] <= 2e-3 for s in h.steps)


def test_only_the_trained_parameters_change(rows, tok):
    model = with_lora()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    fit(model, tok, rows, max_tokens=300)
    now = dict(model.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in frozen.items()) and all(p.grad is None for p in now.values())
    lora.check_trained(model)


def test_accumulation_trains_the_same_model(rows, tok):
    "Two runs whose steps see the same rows, cut differently"
    work = [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10]]]
    joined = [[[i for b in w for i in b]] for w in work]
    def run(work, monkeypatch=pytest.MonkeyPatch()):
        with monkeypatch.context() as m:
            m.setattr(training, "windows", lambda *a: work)
            model = with_lora()
            fit(model, tok, rows)
            return torch.cat([p.detach().flatten() for p in lora.lora_parameters(model)])
    assert (run(work) - run(joined)).abs().max() < 1e-4


@in_own_process
def test_peak_memory_is_that_of_training_and_not_of_the_last_validation(rows, tok, monkeypatch):
    with Meter() as m:
        if not m.resettable: pytest.skip("this system can't reset its high-water mark")
    real = training.window_step
    def hungry(*a):
        x = np.ones(50_000_000); del x   # 400 MB, in a training step
        return real(*a)
    monkeypatch.setattr(training, "window_step", hungry)
    with Meter() as m: now = m.peak_bytes
    h = fit(with_lora(), tok, rows, rows.select(range(4)), max_tokens=300)
    assert h.peak_bytes - now > 300e6


def test_time_of_validation_is_not_counted(rows, tok, monkeypatch):
    import time
    real = training.validate
    monkeypatch.setattr(training, "validate", lambda *a, **k: (time.sleep(.5), real(*a, **k))[1])
    with Meter() as m: h = fit(with_lora(), tok, rows, rows.select(range(2)), max_tokens=300, looks=3)
    assert h.seconds < m.seconds - 1.4


def test_four_rows_are_learnt_by_heart(rows, tok):
    model = tiny(scale=1.)
    h = fit(model, tok, rows.select(range(4)), rows.select(range(4)), epochs=90, lr=3e-2, looks=2)
    assert h.valid[0]["loss"] > 5 and h.valid[-1]["loss"] < .05 and h.steps[-1]["loss"] < .05


def test_without_validation_and_with_an_empty_one(rows, tok):
    for valid in (None, [], rows.select([])): assert fit(with_lora(), tok, rows.select(range(2)), valid).valid == []
    assert str(History()) and History().tokens_per_s == 0


def test_plot_history_needs_no_validation(rows, tok):
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = training.plot_history(History(steps=[dict(step=1, loss=2., lr=1, norm=1, tokens=3)]))
    assert ax.get_xlabel() and ax.get_ylabel()
    plt.close("all")

# ---------- precision

def base(dtype, scale=3.):
    "A tiny model whose frozen weights have 16 bits"
    return lora.add_lora(tiny(seed=7, scale=scale).to(dtype), r=4, alpha=8)


def test_precision_is_picked_from_model_and_machine(monkeypatch):
    b, h = torch.bfloat16, torch.float16
    for native, full in ((b, b), (h, h), (torch.float32, None)):
        monkeypatch.setattr(training, "native_precision", lambda dev: native)
        assert cast_for(tiny()) is full, "full fine-tuning: float32 weights, products in what the machine multiplies"
        assert cast_for(with_lora()) is None and cast_for(base(b)) is None and cast_for(base(h)) is None
        assert cast_for(with_lora(), "bf16") is b and cast_for(tiny(), "fp16") is h and cast_for(base(b), "bf16") is None
        assert cast_for(tiny(), "float32") is None
    mixed = base(b)
    mixed.lm_head.weight = torch.nn.Parameter(mixed.lm_head.weight.float())
    assert cast_for(mixed) is b, "a float32 matrix beside bf16 ones needs autocast"


def test_precision_that_makes_no_sense_is_refused(rows, tok):
    with pytest.raises(ValueError, match="No precision 'fp8'; there are: float32, bf16, fp16"): fit(tiny(), tok, rows, precision="fp8")
    for p in ("float32", "fp16"):
        with pytest.raises(ValueError, match=f"precision='{p}'.*frozen weights are in bfloat16"): fit(base(torch.bfloat16), tok, rows, precision=p)


def test_full_fine_tuning_by_the_same_call(rows, tok):
    "Weights stay float32, products are bf16, and the loss is float32's to bf16's rounding"
    def run(precision):
        model = tiny(scale=1.)
        seen = []
        model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
        h = fit(model, tok, rows, rows.select(range(4)), max_tokens=300, lr=1e-3, precision=precision, looks=2)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return h, set(seen[1:])
    (low, dl), (wide, dw) = run("bf16"), run("float32")
    assert dl == {torch.bfloat16} and dw == {torch.float32}
    assert low.trainable == sum(p.numel() for p in tiny().parameters()) and low.valid[-1]["loss"] < low.valid[0]["loss"]
    for a, b in zip(low.steps, wide.steps): assert a["loss"] == pytest.approx(b["loss"], rel=5e-3) and a["loss"] != b["loss"]


def test_lora_under_autocast_is_near_float32(rows, tok):
    a, b = (fit(with_lora(), tok, rows, max_tokens=300, precision=p) for p in ("bf16", "float32"))
    for x, y in zip(a.steps, b.steps): assert x["loss"] == pytest.approx(y["loss"], rel=1e-2)


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(rows, tok):
    model = base(torch.float16, scale=1.)
    was = torch.cat([p.detach().flatten() for p in lora.lora_parameters(model)])
    blow = [True]
    model.model.layers[0].self_attn.q_proj.lora_B.register_hook(lambda g: g*(float("inf") if blow.pop() else 1.) if blow else g)
    h = fit(model, tok, rows, max_tokens=300)
    assert h.steps[0]["norm"] == float("inf") and all(math.isfinite(s["norm"]) for s in h.steps[1:]) and len(h.steps) > 3
    now = torch.cat([p.detach().flatten() for p in lora.lora_parameters(model)])
    assert now.isfinite().all() and not torch.equal(now, was)


def test_fp16_keeps_gradients_that_would_vanish():
    "Without scaling a gradient of 1e-9 is 0 in fp16; with it the weight moves as in float32"
    w = torch.nn.Parameter(torch.ones(4))
    def grad(scale):
        s = torch.amp.GradScaler("cpu", enabled=scale)
        w.grad = None
        s.scale((w.half()*1e-4).sum().float()*1e-5).backward()
        s.unscale_(torch.optim.SGD([w], lr=1.))if scale else None
        return w.grad
    assert not grad(False).any() and torch.allclose(grad(True), torch.full((4,), 1e-9), rtol=1e-2)


# ---------- optimizer

def test_matrices_decay_and_vectors_do_not():
    model = tiny()
    decay, plain = parameter_groups(model, .1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decay["weight_decay"] == .1 and plain["weight_decay"] == 0.
    assert {n for p in plain["params"] if (n := names[id(p)])} == {n for n in names.values() if "norm" in n}
    assert len(decay["params"]) + len(plain["params"]) == len(names)
    assert len(parameter_groups(with_lora(), .1)) == 1


def test_decay_reaches_the_weights_and_only_matrices(rows, tok):
    "With no gradient to speak of, decay alone moves the weights: by lr*decay at each step"
    model = tiny(scale=1.)
    for p in model.parameters(): p.register_hook(lambda g: g*0)
    was = state(model)
    h = fit(model, tok, rows, max_tokens=300, weight_decay=.5, lr=1e-2, precision="float32")
    share = math.prod(1 - s["lr"]*.5 for s in h.steps)
    assert torch.allclose(model.model.layers[0].mlp.up_proj.weight, was["model.layers.0.mlp.up_proj.weight"]*share, rtol=1e-4)
    assert torch.equal(model.model.norm.weight, was["model.norm.weight"]) and share < .99


def test_fused_adamw_is_adamw(rows, tok):
    def run(kind):
        model = with_lora()
        fit(model, tok, rows, max_tokens=300, optimizer=kind, weight_decay=.1)
        return torch.cat([p.detach().flatten() for p in lora.lora_parameters(model)])
    plain = run(lambda groups: torch.optim.AdamW(groups, lr=1., fused=False))
    assert make_optimizer(with_lora()).defaults["fused"] and (run("adamw") - plain).abs().max() < 1e-5


def test_optimizers_that_are_not_there(rows, tok):
    with pytest.raises(ValueError, match='No optimizer \'lion\'; there are "adamw", "adamw8bit"'): fit(with_lora(), tok, rows, optimizer="lion")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA GPU, and the model is on cpu"): fit(with_lora(), tok, rows, optimizer="adamw8bit")


# ---------- packing

def test_pack_keeps_to_the_budget_and_loses_no_row(encoded):
    for budget in (150, 300, 2000):
        bins = pack(encoded, budget, seed=1)
        assert sorted(i for b in bins for i in b) == list(range(len(encoded)))
        assert all(sum(len(encoded[i]["input_ids"]) for i in b) <= budget or len(b) == 1 for b in bins)
    assert bins == pack(encoded, 2000, seed=1) != pack(encoded, 2000, seed=2) and len(bins) < len(encoded)/3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch,kw", [("llama", {}), ("qwen3", dict(head_dim=8)), ("gemma3_text", dict(head_dim=8)), ("mistral", dict(head_dim=8, sliding_window=16))])
def test_a_packed_sequence_has_the_loss_and_gradients_of_its_rows(arch, kw, encoded, tok, attention):
    model = tiny(arch, **kw)
    model.set_attn_implementation(attention)
    rows = encoded[:5]
    together, gt = grads(model, [collate_packed(rows)], with_positions(supervised_loss))
    apart, ga = grads(model, [collate([e], tok.pad_token_id) for e in rows])
    assert together == pytest.approx(apart, abs=1e-5) and (gt - ga).abs().max() < 1e-5


def test_without_positions_packed_rows_leak(encoded, tok):
    "The bug of trl#1230: each row reads the ones before it, and the loss is another one"
    model, rows = tiny(), encoded[:5]
    apart, _ = grads(model, [collate([e], tok.pad_token_id) for e in rows])
    leaky = {k: v for k, v in collate_packed(rows).items() if k != "position_ids"}
    assert abs(grads(model, [leaky])[0] - apart) > 1e-3
    with pytest.raises(ValueError, match="a packed row sees the row before it.*packing=False"): check_packing(model, encoded[:2], supervised_loss)
    check_packing(model, encoded[:2], with_positions(supervised_loss))


def test_no_row_learns_to_predict_the_next_rows_beginning(encoded):
    eager = [{**e, "labels": list(e["input_ids"])} for e in encoded[:3]]   # even if every token were asked for
    b = collate_packed(eager)
    starts = [0, *np.cumsum([len(e["input_ids"]) for e in eager])[:-1]]
    assert all(b["labels"][0, s] == -100 and b["position_ids"][0, s] == 0 for s in starts)
    assert (b["labels"] == -100).sum() == 3 and b["input_ids"][0].tolist() == sum((e["input_ids"] for e in eager), [])


def test_a_packed_run_trains_and_counts_the_same_tokens(rows, tok, encoded):
    model = with_lora()
    h = fit(model, tok, rows, rows.select(range(4)), max_tokens=400, packing=True, looks=2)
    assert h.tokens == sum(len(e["input_ids"]) for e in encoded) and h.valid[1]["loss"] < h.valid[0]["loss"]
    assert not model.base_model._forward_pre_hooks
    assert validate(model, encoded, tok.pad_token_id) == pytest.approx(validate(model, encoded, tok.pad_token_id, with_positions(supervised_loss)))


# ---------- activation checkpointing, compile

def moved(model):
    with torch.no_grad():
        for p in lora.lora_parameters(model): p.normal_(std=.05)
    return model

@pytest.mark.parametrize("dropout", [0., .2])
def test_checkpointing_gives_the_same_gradients_and_trains_b(rows, tok, encoded, dropout):
    "peft#1142: with checkpointing and frozen inputs, B used to stay at zero without a word"
    def run(use):
        model = tiny(seed=7)
        torch.manual_seed(0)
        lora.add_lora(model, r=4, alpha=8, dropout=dropout)
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
        fit(model, tok, rows, max_tokens=300, checkpointing=use)
        return torch.cat([p.detach().flatten() for p in lora.lora_parameters(model)]), len(calls), model
    (a, na, _), (b, nb, model) = run(False), run(True)
    assert torch.equal(a, b) and nb >= na + 4, "computed twice in every step, with the same result"
    lora.check_trained(model)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@in_own_process
def test_checkpointing_needs_less_memory(tok):
    with Meter() as m:
        if not m.resettable: pytest.skip("this system can't reset its high-water mark")
    torch.manual_seed(0)
    conf = AutoConfig.for_model("llama", vocab_size=512, hidden_size=128, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=4)
    model = lora.add_lora(AutoModelForCausalLM.from_config(conf).float(), r=4)
    ids = torch.randint(0, 512, (8, 256))
    def peak(use):
        with checkpointed(model.train(), use), Meter() as m:
            now = m.peak_bytes
            grads(model, [dict(input_ids=ids, labels=ids)])
        return m.peak_bytes - now
    peak(True)
    with_all, without = peak(False), peak(True)
    assert without < with_all/2, (without, with_all)


def test_layers_are_found_and_compile_is_undone(monkeypatch):
    model = tiny()
    assert [type(l).__name__ for l in layers_of(model)] == ["LlamaDecoderLayer"]*2
    with compiled(model): assert all(l._compiled_call_impl is not None for l in layers_of(model))
    assert all(l._compiled_call_impl is None for l in layers_of(model))


# ---------- looks: metric, patience, best

def scripted(values):
    "A metric that gives these values, one after the other"
    it = iter(values)
    return lambda model: next(it)

def final(model): return torch.cat([p.detach().flatten() for p in lora.lora_parameters(model)])


@pytest.mark.parametrize("folder", [False, True])
def test_the_best_weights_are_put_back(rows, tok, tmp_path, folder):
    seen = []
    def metric(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(final(model).clone())
        return [.1, .5, .9, .4, .2][len(seen)-1]
    model = with_lora()
    h = fit(model, tok, rows, max_tokens=300, metric=metric, folder=tmp_path/"run" if folder else None, save_every=1)
    assert h.best["metric"] == .9 and h.best["step"] == h.valid[2]["step"] and [v["metric"] for v in h.valid] == [.1, .5, .9, .4, .2]
    assert torch.equal(final(model), seen[2]) and not torch.equal(seen[2], seen[4])
    if folder:
        kept = [int(p.name.split("-")[1]) for p in training.checkpoints(tmp_path/"run")]
        assert kept == [len(h.steps), len(h.steps)-1, h.best["step"]]
        again = with_lora(seed=5)
        fit(again, tok, rows, max_tokens=300, metric=metric, folder=tmp_path/"run", save_every=1, resume=True)
        assert torch.equal(final(again), seen[2]) and len(seen) == 5


def test_the_best_by_held_out_loss(rows, tok, monkeypatch):
    losses = scripted([3., 1., 2., 2., 2.])
    monkeypatch.setattr(training, "validate", lambda *a, **k: next(losses) if hasattr(losses, "__next__") else losses(None))
    h = fit(with_lora(), tok, rows, rows.select(range(2)), max_tokens=300, best=True)
    assert h.best["loss"] == 1. and h.best["step"] == h.valid[1]["step"] and "validation 3.000 → 2.000" in str(h)


def test_best_is_recorded_and_not_put_back_unless_asked_for(rows, tok):
    model, seen = with_lora(), []
    def metric(model): seen.append(final(model).clone()); return -len(seen)
    h = fit(model, tok, rows, max_tokens=300, metric=metric, best=False)
    assert h.best["step"] == 0 and torch.equal(final(model), seen[-1]) and not torch.equal(seen[0], seen[-1])


def test_patience_stops_early(rows, tok):
    values = [.1, .3, .2, .3, .1, .9, .9]
    h = fit(with_lora(), tok, rows, max_tokens=300, metric=scripted(values), patience=3, looks=7)
    assert [v["metric"] for v in h.valid] == values[:5] and h.stopped == "patience" and h.best["metric"] == .3 and not h.interrupted
    assert len(h.steps) == h.valid[-1]["step"] < len(windows(encode_all(rows, tok), 1, 300, 1, 0)) and "stopped early (patience)" in str(h)


def test_a_patient_run_that_is_resumed_stays_stopped(rows, tok, tmp_path):
    kw = dict(max_tokens=300, patience=2, looks=7, folder=tmp_path)
    a = with_lora()
    ha = fit(a, tok, rows, metric=scripted([.3, .2, .1, .0]), **kw)
    b = with_lora(seed=3)
    hb = fit(b, tok, rows, metric=scripted([]), resume=True, **kw)
    assert ha.stopped == hb.stopped == "patience" and torch.equal(final(a), final(b)) and ha.steps == hb.steps


@pytest.mark.parametrize("kw,says", [(dict(patience=2), "give valid= or metric="), (dict(best=True), "give valid= or metric="),
                                     (dict(metric=len, looks=1), "looks above 1"), (dict(metric=len, looks=0), "looks above 1"),
                                     (dict(clip=0.), "clip=0.0: it must be above 0"),
                                     (dict(resume=True), "need a folder"), (dict(logs="tensorboard"), "need a folder"),
                                     (dict(logs="wandb"), "No log 'wandb'; there are: jsonl, tensorboard, trackio"),
                                     (dict(patience=0, metric=len), "patience=0: it must be above 0"), (dict(save_every=0), "save_every=0")])
def test_options_that_need_something_else(rows, tok, kw, says):
    with pytest.raises(ValueError, match=says): fit(with_lora(), tok, rows, **kw)


def test_an_unknown_argument_is_named(rows, tok):
    with pytest.raises(TypeError, match="fit has no argument 'pakcing'; beside its own there are: precision, optimizer, packing"):
        fit(with_lora(), tok, rows, pakcing=True)


def test_a_metric_that_is_no_number(rows, tok):
    with pytest.raises(FloatingPointError, match="The look after step 0 gave"): fit(with_lora(), tok, rows, metric=lambda m: float("nan"))


# ---------- what is shown and logged

def test_the_log_has_a_line_a_step_and_a_look(rows, tok, tmp_path):
    h = fit(with_lora(), tok, rows, rows.select(range(4)), max_tokens=300, folder=tmp_path, looks=3)
    lines = [json.loads(l) for l in (tmp_path/"log.jsonl").read_text().splitlines()]
    steps, looks = [l for l in lines if "lr" in l], [l for l in lines if "valid/loss" in l]
    assert [(l["step"], l["loss"], l["tokens"]) for l in steps] == [(s["step"], s["loss"], s["tokens"]) for s in h.steps]
    assert [(l["step"], l["valid/loss"]) for l in looks] == [(v["step"], v["loss"]) for v in h.valid]


def test_functions_get_every_value(rows, tok):
    got = []
    h = fit(with_lora(), tok, rows, rows.select(range(4)), max_tokens=300, looks=2, logs=lambda step, values: got.append((step, values)))
    assert [s for s, v in got if "loss" in v] == [s["step"] for s in h.steps] and [v["valid/loss"] for s, v in got if "valid/loss" in v] == [v["loss"] for v in h.valid]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_fit_compiles_its_pieces_to_the_same_losses(rows, tok):
    (a, ha), (b, hb) = ((m, fit(m, tok, rows, max_tokens=300, epochs=2, precision="float32", compile=c)) for c in (False, True) for m in [with_lora()])
    assert speed._compiled.cache_info().currsize > 0 and "forward" not in vars(layers_of(b)[0].mlp)
    assert [s["loss"] for s in hb.steps] == pytest.approx([s["loss"] for s in ha.steps], rel=1e-4)
    assert torch.allclose(final(a), final(b), atol=1e-3)


def test_the_next_batch_is_made_before_the_loss_is_read(rows, tok, monkeypatch):
    "While the device still computes a step, the next one's rows are already on their way"
    said, real, make = [], training.window_step, training.Run.collated
    def step(*a):
        out = real(*a)
        said.append("loss read")
        return out
    monkeypatch.setattr(training, "window_step", step)
    monkeypatch.setattr(training.Run, "collated", lambda self, b: (said.append(tuple(b)), make(self, b))[1])
    h = fit(with_lora(), tok, rows, max_tokens=300, epochs=2)
    steps = len(h.steps)
    assert steps > 3 and said.count("loss read") == steps
    at = [i for i, s in enumerate(said) if s == "loss read"]
    before = [sum(s != "loss read" for s in said[:i]) for i in at]         # batches made when step 1, 2, … is read
    each = len([s for s in said if s != "loss read"])
    assert all(b > a for a, b in zip(before, before[1:-1])) and before[-2] == before[-1] == each


def test_deterministic_gives_the_same_bits_and_is_undone(rows, tok):
    seen = []
    def run(**kw): m = with_lora(); torch.manual_seed(1); return final(m) if fit(m, tok, rows, max_tokens=300, **kw).steps else None
    a, b = run(deterministic=True, logs=lambda *_: seen.append(torch.are_deterministic_algorithms_enabled())), run()
    assert torch.equal(a, b) and seen and all(seen) and not torch.are_deterministic_algorithms_enabled()


def test_patience_that_ends_with_the_last_step_did_not_stop_the_run(rows, tok):
    n = len(windows(encode_all(rows, tok), 1, 300, 1, 0))
    h = fit(with_lora(), tok, rows, max_tokens=300, looks=3, metric=scripted([.3, .2, .1]), patience=2)
    assert len(h.steps) == n and len(h.valid) == 3 and h.stopped == "" and "stopped" not in str(h) and h.best["metric"] == .3


def test_tensorboard_reads_our_log(rows, tok, tmp_path):
    acc = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    h = fit(with_lora(), tok, rows, rows.select(range(4)), max_tokens=300, logs=["tensorboard"], folder=tmp_path)
    ea = acc.EventAccumulator(str(tmp_path/"tensorboard")); ea.Reload()
    assert {"loss", "lr", "norm", "valid/loss"} <= set(ea.Tags()["scalars"])
    assert [(e.step, e.value) for e in ea.Scalars("loss")] == [(s["step"], pytest.approx(s["loss"])) for s in h.steps]


def test_trackio_keeps_our_log_on_this_machine(tmp_path):
    pytest.importorskip("trackio")
    code = ("import sys; sys.path[:0] = ['tests', '.']\nimport test_training as t\nfrom ftcourse import corpora, models, training\n"
            "rows = corpora.load('desk', 'train', n=8)\n"
            f"h = training.fit(t.with_lora(), models.load()[1], rows, rows.select(range(3)), max_tokens=300, logs=['trackio'], folder={str(tmp_path/'mine')!r})\n"
            "from trackio.sqlite_storage import SQLiteStorage as S\n"
            "runs = S.get_runs('ftcourse'); got = [l['loss'] for l in S.get_logs('ftcourse', runs[0]) if 'loss' in l]\n"
            "assert len(runs) == 1 and got == [s['loss'] for s in h.steps], (runs, got)\nprint('logged', len(got))")
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT,
                       env={**os.environ, "TRACKIO_DIR": str(tmp_path/"trackio"), "FTCOURSE_PLAIN": "1"})
    assert p.returncode == 0 and "logged" in p.stdout, p.stdout + p.stderr[-2000:]


@pytest.mark.parametrize("log,module", [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_a_log_whose_package_is_missing_names_it(rows, tok, tmp_path, monkeypatch, log, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs a package: pip install {log}"): fit(with_lora(), tok, rows, logs=log, folder=tmp_path)


def test_the_status_line_says_what_is_left():
    h = History(steps=[dict(step=i+1, loss=2.5, tokens=100) for i in range(10)], seconds=20., tokens=1000, peak_bytes=3e9)
    assert status(h, 40) == "loss 2.50, 1,000 tokens, 50 tokens/s, peak memory 3.00 GB, 1 min 0 s left" and status(History(), 4) == ""


def test_the_curve_stays_small_and_inside_its_box():
    losses = [3*math.exp(-i/900) + .3*(i % 7) for i in range(5000)]
    h = History(steps=[dict(step=i+1, loss=l, tokens=i) for i, l in enumerate(losses)], valid=[dict(step=0, loss=9.), dict(step=5000, loss=.5)], seconds=1.)
    html = curve(h, 5000)
    points = [tuple(map(float, p.split(","))) for s in re.findall(r'points="([^"]*)"', html) for p in s.split()]
    assert len(html) < 5000 and all(0 <= x <= 490 and 0 <= y <= 128 for x, y in points) and len(points) > 100
    ET.fromstring(f"<p>{html}</p>")
    for odd in (History(), History(steps=[dict(step=1, loss=float("inf"), tokens=1)])): ET.fromstring(f"<p>{curve(odd, 3)}</p>")


def test_in_a_notebook_one_curve_is_redrawn_in_place(rows, tok, monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    class Handle:
        def update(self, html): shown.append(("update", html.data))
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.delenv("FTCOURSE_PLAIN", raising=False)
    monkeypatch.setattr(display, "display", lambda html, display_id=None: (shown.append(("new", html.data)), Handle())[1])
    for live, last in (("stay", "<svg"), (True, "")):
        shown.clear()
        fit(with_lora(), tok, rows.select(range(4)), max_tokens=300, live=live)
        assert [k for k, _ in shown].count("new") == 1 and shown[0][0] == "new" and shown[-1][1].startswith(last) and (last or not shown[-1][1])
        assert "tokens/s" in shown[0][1] and "left" in shown[0][1]


# ---------- learning-rate finder

def test_find_lr_leaves_everything_as_it_was(rows, tok):
    model = with_lora()
    was, rng = state(model), torch.get_rng_state()
    search = find_lr(model, tok, rows, max_tokens=300, steps=20, high=10.)
    assert unchanged(model, was) and torch.equal(rng, torch.get_rng_state()) and not model.training and all(p.grad is None for p in model.parameters())
    assert search.lrs == sorted(search.lrs) and search.lrs[0] == 1e-5 and len(search.lrs) == len(search.losses) <= 20
    assert search.suggestion in search.lrs


def test_find_lr_ends_where_the_loss_explodes_and_suggests_before(rows, tok):
    model = tiny(scale=1.)
    search = find_lr(model, tok, rows, max_tokens=300, steps=40, low=1e-5, high=100., precision="float32")
    assert len(search.lrs) < 40 and search.losses[-1] > 1.5*min(search.losses)
    assert 1e-4 < search.suggestion < search.lrs[-1]/2
    good = fit(model, tok, rows, rows, epochs=3, max_tokens=300, lr=search.suggestion, precision="float32", looks=2).valid
    assert good[1]["loss"] < good[0]["loss"] - 1


def test_find_lr_says_so_when_the_loss_explodes_at_once(rows, tok):
    with pytest.raises(ValueError, match="exploded within .* steps: start lower than low=1e\\+29"):
        find_lr(tiny(scale=1.), tok, rows, max_tokens=300, steps=20, low=1e29, high=1e30, precision="float32")
    with pytest.raises(ValueError, match="steps=4: a curve"): find_lr(with_lora(), tok, rows, steps=4)


def test_the_finder_gives_each_loss_to_the_rate_of_the_step_before(rows, tok):
    "A loss is computed before its step, so what it shows is the step before"
    model, seen = tiny(scale=1.), []
    real = training.Run.advance
    def advance(self):
        real(self)
        seen.append((self.history.steps[-1]["lr"], self.history.steps[-1]["loss"]))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training.Run, "advance", advance)
        search = find_lr(model, tok, rows, max_tokens=10000, steps=12, low=1e-5, high=1e-2, precision="float32")
    assert search.lrs == pytest.approx([lr for lr, _ in seen[:-1]])
    assert search.losses == pytest.approx([loss for _, loss in seen[1:]], rel=1e-4)   # one batch: its share is one


def test_the_suggestion_is_the_steepest_descent():
    lrs = [10**(-5 + i/8) for i in range(40)]
    losses = [4 - 3/(1 + math.exp(-(math.log10(l)+3)*4)) + (20*(math.log10(l)+1.5) if l > 10**-1.5 else 0) for l in lrs]
    s = LrSearch(lrs, losses).suggestion
    assert 7e-4 < s < 1.5e-3                                     # the curve is steepest at 1e-3
    assert LrSearch(lrs, losses).smoothed[0] == pytest.approx(sum(losses[:3])/3) and len(LrSearch(lrs, losses).smoothed) == 40
    plt = pytest.importorskip("matplotlib.pyplot")
    assert LrSearch(lrs, losses).plot().get_xlabel() == "learning rate"
    plt.close("all")


# ---------- devices

class OneDevice(TorchDispatchMode):
    "Fails at the first operation that mixes devices; numbers without dimensions may come from the CPU"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.arg_tree_leaves(*args, **(kwargs or {}))
        devs = {t.device.type for t in flat if torch.is_tensor(t) and not (t.device.type == "cpu" and t.dim() == 0)}
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        assert len(devs) <= 1 or copies, f"{func} mixes {devs}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss,packing,way", [(supervised_loss, False, ""), (full_loss, False, ""), (supervised_loss, True, ""),
                                              (supervised_loss, False, "checkpointed"), (supervised_loss, True, "checkpointed"), (full_loss, False, "full")])
def test_a_step_touches_no_stray_tensor_of_the_cpu(encoded, loss, packing, way, monkeypatch):
    "On a device that is none (fake tensors): a tensor made on the CPU by mistake stops the step"
    monkeypatch.setattr(speed, "chunked_cross_entropy", lambda h, head, want, *a: F.cross_entropy(head(h).float(), want, reduction="sum"))   # fakes can't be cut up
    dev = torch.device("cuda" if torch.version.cuda else "meta")
    conf = AutoConfig.for_model("llama", vocab_size=49152, **SIZE)
    with FakeTensorMode(allow_non_fake_inputs=False, shape_env=ShapeEnv()), OneDevice():
        with torch.device(dev): model = AutoModelForCausalLM.from_config(conf)
        model = (model if way == "full" else lora.add_lora(model, r=2)).train()
        rows = [dict(input_ids=[5]*n, labels=[-100]*3 + [5]*(n-3)) for n in (7, 9)]
        batch = {k: v.to(dev) for k, v in (collate_packed(rows) if packing else collate(rows, 0)).items()}
        optimizer = make_optimizer(model)
        scaler = types.SimpleNamespace(scale=lambda x: x, unscale_=lambda o: None, is_enabled=lambda: True, step=lambda o: o.step(), update=lambda: None)
        with checkpointed(model, way == "checkpointed"): window_step(model, [batch, batch], with_positions(loss), scaler)
        params = trained_parameters(model)
        assert {p.grad.device.type for p in params} == {dev.type}
        optimizer_step(optimizer, scaler, params, 1., 1)
        assert len(optimizer.state) == len(params)
        with pytest.raises((AssertionError, RuntimeError), match="mixes|same device"):
            loss(model, {**batch, "input_ids": torch.zeros(2, 9, dtype=torch.long)})


def test_batches_go_to_the_models_device(encoded, tok):
    for b in (collate(encoded[:3], tok.pad_token_id), collate_packed(encoded[:3])):
        assert {t.device.type for t in to_device(b, torch.device("meta")).values()} == {"meta"}


def gpu(dtype=torch.float32):
    model = tiny(seed=7).to("cuda", dtype)
    torch.manual_seed(0)
    return lora.add_lora(model, r=4, alpha=8)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_cuda_precisions_agree(rows, tok, precision):
    h, ref = (fit(gpu(), tok, rows, rows.select(range(4)), max_tokens=300, precision=p) for p in (precision, "float32"))
    for a, b in zip(h.steps, ref.steps): assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    assert h.peak_bytes > 0


@pytest.mark.cuda
def test_cuda_batches_come_from_pinned_memory(encoded, tok, monkeypatch):
    seen, real = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: (seen.append((t.is_pinned(), k.get("non_blocking"))), real(t, *a, **k))[1])
    out = to_device(collate(encoded[:3], tok.pad_token_id), torch.device("cuda"))
    assert set(seen) == {(True, True)} and all(t.is_cuda for t in out.values())


@pytest.mark.cuda
def test_cuda_fused_adamw_checkpointing_packing_and_full(rows, tok):
    assert make_optimizer(gpu()).defaults["fused"]
    for kw in (dict(checkpointing=True), dict(packing=True), dict(precision="fp16", accumulate=2)):
        h = fit(gpu(), tok, rows, rows.select(range(4)), max_tokens=300, **kw)
        assert h.valid[-1]["loss"] < h.valid[0]["loss"]
    h = fit(tiny(scale=1.).cuda(), tok, rows, rows.select(range(4)), max_tokens=300, lr=1e-3)
    assert h.valid[-1]["loss"] < h.valid[0]["loss"]


@pytest.mark.cuda
def test_cuda_checkpointing_lowers_memory(rows, tok):
    few, many = (fit(gpu(), tok, rows, max_tokens=2000, checkpointing=c).peak_bytes for c in (True, False))
    assert few < many


@pytest.mark.cuda
def test_cuda_a_frozen_half_model_keeps_its_lora_in_float32(rows, tok):
    "A T4's way: frozen weights in fp16 and no bf16; the trained A and B stay in float32 and finite"
    model = gpu(torch.float16)
    h = fit(model, tok, rows, rows.select(range(4)), max_tokens=300)
    assert {p.dtype for p in lora.lora_parameters(model)} == {torch.float32}
    assert all(p.isfinite().all() for p in lora.lora_parameters(model)) and h.valid[-1]["loss"] < h.valid[0]["loss"]


@pytest.mark.cuda
def test_cuda_adamw_in_8_bits(rows, tok):
    pytest.importorskip("bitsandbytes")
    ref, h = (fit(gpu(), tok, rows, rows.select(range(4)), max_tokens=300, optimizer=o) for o in ("adamw", "adamw8bit"))
    assert h.valid[-1]["loss"] == pytest.approx(ref.valid[-1]["loss"], rel=2e-2)


@pytest.mark.cuda
def test_cuda_compile(rows, tok):
    a, b = (fit(gpu(), tok, rows, max_tokens=300, compile=c) for c in (True, False))
    for x, y in zip(a.steps, b.steps): assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)


@pytest.mark.cuda
def test_cuda_resume(rows, tok, tmp_path):
    def run(**kw): m = gpu(); torch.manual_seed(1); return m, fit(m, tok, rows, max_tokens=300, epochs=2, deterministic=True, **kw)
    a, ha = run()
    b, hb = run(folder=tmp_path, save_every=1, logs=lambda step, v: signal.raise_signal(signal.SIGINT) if step == 3 else None)
    c, hc = run(folder=tmp_path, save_every=1, resume=True)
    assert hb.interrupted and torch.equal(final(a), final(c)) and [s["loss"] for s in ha.steps] == [s["loss"] for s in hc.steps]


@pytest.mark.cuda
def test_cuda_out_of_memory_halves_the_batch(rows, tok):
    "The GPU's own error, under a limit between what half the batch and what all of it needs"
    all_of_it = fit(gpu(), tok, rows, max_tokens=20_000, precision="float32")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(.7*all_of_it.peak_bytes/torch.cuda.get_device_properties(0).total_memory)
    try: h = fit(gpu(), tok, rows, max_tokens=20_000, precision="float32")
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    assert any("Out of memory" in e["what"] for e in h.events)
    for a, b in zip(h.steps, all_of_it.steps): assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.cuda
def test_cuda_peak_memory_is_the_gpus(rows, tok):
    small, big = (fit(gpu(), tok, rows, max_tokens=t).peak_bytes for t in (200, 2000))
    assert big > small and big >= torch.cuda.max_memory_allocated()*.5


# ---------- cost

def test_fit_costs_little_over_the_bare_loop(rows, tok, encoded):
    "Collating, counting, history and bar against forward, backward and step alone, on the same work"
    data, ratios = [*rows]*2, []
    encoded = encode_all(data, tok)
    def ours():
        h = fit(with_lora(), tok, data, max_tokens=600)
        return h.seconds
    def bare():
        model = with_lora()
        ready = [[collate([encoded[i] for i in b], tok.pad_token_id) for b in w] for w in windows(encoded, 1, 600, 1, 0)]
        params, opt, off = trained_parameters(model), make_optimizer(model), torch.amp.GradScaler("cpu", enabled=False)
        with training.quick(model, collate(encoded[:2], tok.pad_token_id), 200) as loss_fn:
            model.train()
            start = time.perf_counter()
            for w in ready:
                window_step(model, w, loss_fn, off)
                training.optimizer_step(opt, off, params, 1., 1)
            return time.perf_counter() - start
    for _ in range(4): ratios.append(ours()/bare())
    assert min(ratios) < 1.5, ratios   # a tiny model's steps take milliseconds; `make bench` has the real one's
