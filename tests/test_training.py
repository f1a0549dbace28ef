"The loop is exact: losses, gradients, windows, validation, counts; and it stops before it spoils anything"
import copy, math
import numpy as np, pytest, torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from own_process import in_own_process
from ftcourse import corpora, formats, lora, models, training
from ftcourse.formats import batches, collate, encode_all
from ftcourse.runtime import Meter, seed_everything
from ftcourse.training import (History, fit, full_loss, lr_at, pick_loss, plain_attention, smooth, supervised_loss, trained_parameters,
                               validate, window_step, windows)

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
