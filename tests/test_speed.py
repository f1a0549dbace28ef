"The quick step: layouts, hand-written backward passes, trials that step back, the same loss and gradients as the long way"
import contextlib, random
import pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from shallow import shallow
from ftcourse import corpora, formats, lora, models, speed
from ftcourse.formats import collate
from ftcourse.runtime import seed_everything
from ftcourse.speed import (JointLowRank, RowNorm, SummedCrossEntropy, TreeAttention, chunked_cross_entropy, common_length, families,
                            full_loss, fused_pieces, joined, lay_out, plain_attention, quick, quick_norms, supervised_loss, tree_loss, where_time_goes)

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def tok(): return models.load()[1]


@pytest.fixture(scope="module")
def real():
    "The bundled model's first layers in float32, with a LoRA that is not zero"
    seed_everything(0)
    model = shallow(dtype=torch.float32)
    lora.add_lora(model, r=4)
    for m in lora.lora_layers(model).values(): torch.nn.init.normal_(m.lora_B, std=.02)
    return model.train()


def tiny(kind="llama", seed=0, **kw):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZE, "vocab_size": 500, "head_dim": 8, **kw}))


def some(n=6, seed=0, common=5, vocab=500):
    "Encoded rows, some of which begin alike"
    rng = random.Random(seed)
    head = [rng.randrange(vocab) for _ in range(common)]
    out = []
    for i in range(n):
        ids = head*(i % 3 > 0) + [rng.randrange(vocab) for _ in range(rng.randrange(2, 12))]
        cut = rng.randrange(1, len(ids))
        out.append(dict(input_ids=ids, labels=[-100]*cut + ids[cut:]))
    return out


def grads(model, loss_fn, batch):
    model.zero_grad(set_to_none=True)
    total, n = loss_fn(model, batch)
    (total/n).backward()
    return (total/n).item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_same(model, batch, loss_eps=1e-5, grad_eps=2e-4):
    want, g = grads(model, supervised_loss, batch)
    with quick(model, {k: v[:2] for k, v in batch.items()}, batch["input_ids"].shape[1]) as loss_fn:
        got, h = grads(model, loss_fn, batch)
    assert abs(got-want) <= loss_eps*abs(want), (got, want)
    assert (g-h).norm() <= grad_eps*g.norm(), ((g-h).norm()/g.norm()).item()
    return loss_fn


# Families and layouts

def best_by_force(rows, stretches):
    "Most tokens that a division saves, by trying every one, or every one into stretches of the sorted rows"
    def parts(xs):
        if not xs: yield []; return
        for p in parts(xs[1:]):
            yield [[xs[0]], *p]
            for i in range(min(len(p), 1) if stretches else len(p)): yield [*p[:i], [xs[0], *p[i]], *p[i+1:]]
    def save(group):
        n = min([len(g) for g in group])-1
        for a in group: n = min(n, common_length(group[0], a))
        return (len(group)-1)*n if len(group) > 1 else 0
    return max(sum(map(save, p)) for p in parts(sorted(rows)))


@settings(max_examples=100, deadline=None)
@example([[1, 9], [1, 0, 0, 10], [1, 0, 1, 0, 11], [1, 0, 1, 0, 12]])   # 4 saved by stretches, 5 by leaving rows out
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6))
def test_families_are_the_best_stretches(rows):
    found = families(rows)
    assert sorted(i for m, _ in found for i in m) == list(range(len(rows)))
    for members, n in found:
        assert all(rows[i][:n] == rows[members[0]][:n] and len(rows[i]) > n or n == 0 for i in members)
    assert sum((len(m)-1)*n for m, n in found) == best_by_force(rows, True) <= best_by_force(rows, False)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=8), st.sampled_from([(2, 1), (4, 2), (3, 3)]))
def test_a_layout_holds_every_row(rows, heads):
    L = lay_out(rows, *heads)
    for r, w in zip(rows, L.where):
        assert L.ids[0, w].tolist() == r and L.positions[0, w].tolist() == list(range(len(r)))
    N = L.ids.shape[1]
    assert N == sum(map(len, rows)) - sum((len(m)-1)*n for m, n in families(rows))
    assert sorted(L.query_at.tolist()) == sorted(set(L.query_at.tolist())) and len(L.query_at) == N*heads[0]
    flat_q, flat_k = (torch.cat([getattr(b, n) for b in L.blocks]) for n in ("queries", "keys"))
    assert flat_q[L.query_at].tolist() == list(range(N*heads[0])) and flat_k[L.key_at].tolist() == list(range(N*heads[1]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=6), st.sampled_from([(2, 1), (4, 2), (3, 3)]),
       st.integers(0, 99))
def test_tree_attention_is_causal_attention_row_by_row(rows, heads, seed):
    L, d = lay_out(rows, *heads, dtype=torch.float64), 5
    g = torch.Generator().manual_seed(seed)
    N = L.ids.shape[1]
    q, k, v = (torch.randn(N, h, d, dtype=torch.float64, generator=g) for h in (heads[0], heads[1], heads[1]))
    out = TreeAttention.apply(q.view(-1, d), k.view(-1, d), v.view(-1, d), .3, L).view(N, heads[0], d)
    for w in L.where:
        want = F.scaled_dot_product_attention(*(t[w].transpose(0, 1) for t in (q, k, v)), is_causal=True, scale=.3, enable_gqa=True)
        assert torch.allclose(out[w].transpose(0, 1), want, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_tree_attention_gradcheck(chunk, monkeypatch):
    block = speed._block
    monkeypatch.setattr(speed, "_block", lambda *a: block(*a, chunk=chunk))
    L = lay_out([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 6], [1, 2, 7, 8], [9, 9], [9, 8, 7, 6, 5]], 4, 2, dtype=torch.float64)
    assert any(len(b.spans) > 1 for b in L.blocks) == (chunk < 256)
    torch.manual_seed(0)
    t = [torch.randn(L.ids.shape[1]*n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    assert gradcheck(lambda *t: TreeAttention.apply(*t, .5, L), t)


# The loss and the norm

@pytest.mark.parametrize("n,chunk", [(1, 128), (7, 3), (6, 3), (300, 128)])
def test_summed_cross_entropy_is_torchs(n, chunk):
    torch.manual_seed(0)
    h, W = torch.randn(n, 6, dtype=torch.float64, requires_grad=True), torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randint(40, (n,))
    a = SummedCrossEntropy.apply(h, W, y, chunk); ga = torch.autograd.grad(a*.7, (h, W))
    b = F.cross_entropy(h @ W.t(), y, reduction="sum"); gb = torch.autograd.grad(b*.7, (h, W))
    assert torch.allclose(a, b, atol=1e-9) and all(torch.allclose(x, z, atol=1e-9) for x, z in zip(ga, gb))
    if n < 10: assert gradcheck(lambda h, W: SummedCrossEntropy.apply(h, W, y, chunk), (h, W))


def test_chunked_loss_without_gradients_bias_or_a_plain_layer():
    torch.manual_seed(0)
    h, y = torch.randn(9, 6), torch.randint(40, (9,))
    for head in (torch.nn.Linear(6, 40, bias=False), torch.nn.Linear(6, 40), torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh())):
        want = F.cross_entropy(head(h), y, reduction="sum").item()
        assert chunked_cross_entropy(h, head, y, 4).item() == pytest.approx(want, rel=1e-5)
        with torch.no_grad(): assert chunked_cross_entropy(h, head, y, 4).item() == pytest.approx(want, rel=1e-5)
    assert chunked_cross_entropy(h[:0], torch.nn.Linear(6, 40, bias=False), y[:0]).item() == 0


def test_chunked_loss_under_autocast_gives_float32_gradients():
    torch.manual_seed(0)
    head, h, y = torch.nn.Linear(64, 400, bias=False), torch.randn(50, 64, requires_grad=True), torch.randint(400, (50,))
    F.cross_entropy(head(h), y, reduction="sum").backward()
    want = [h.grad.clone(), head.weight.grad.clone()]
    h.grad = head.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16): chunked_cross_entropy(h, head, y).backward()
    for got, w in zip((h.grad, head.weight.grad), want):
        assert got.dtype == torch.float32 and (got-w).norm() < .02*w.norm()


def test_the_loss_holds_no_more_than_a_chunk_of_scores():
    "The largest tensor made, forward and backward, counted by a dispatch mode"
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, f, types, args=(), kw=None):
            out = f(*args, **(kw or {}))
            if torch.is_tensor(out): self.n = max(self.n, out.numel())
            return out
    h, W, y = torch.randn(600, 16, requires_grad=True), torch.randn(5000, 16), torch.randint(5000, (600,))
    with Largest() as ours: SummedCrossEntropy.apply(h, W, y, 50).backward()
    with Largest() as theirs: F.cross_entropy(h @ W.t(), y).backward()
    assert theirs.n == 600*5000 and ours.n <= max(W.numel(), 50*5000)


@pytest.mark.parametrize("dtype,eps", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_row_norm_is_the_models(real, dtype, eps):
    norm = real.base_model.norm.to(dtype)
    torch.manual_seed(0)
    x = torch.randn(3, 5, 576, dtype=dtype, requires_grad=True)
    w = norm.weight.detach().clone().requires_grad_()
    dy = torch.randn(3, 5, 576, dtype=dtype)
    norm.weight.requires_grad_(True)
    want = norm(x); gx, gw = torch.autograd.grad(want, (x, norm.weight), dy)
    norm.weight.requires_grad_(False)
    got = RowNorm.apply(x, w, norm.variance_epsilon); hx, hw = torch.autograd.grad(got, (x, w), dy)
    norm.to(torch.float32)
    assert torch.equal(got, want)
    assert (hx-gx).float().norm() <= eps*gx.float().norm() and (hw-gw).float().norm() <= eps*gw.float().norm()


# The whole step

def test_quick_is_the_long_way_on_real_rows(real, tok):
    for name in ("desk", "e2e"):
        try: rows = corpora.load(name, "train", n=10)
        except OSError: pytest.skip("the public corpora are not here")
        batch = collate(formats.encode_all(rows, tok), tok.pad_token_id)
        assert check_same(real, batch) is tree_loss


def test_quick_in_bf16(tok):
    "A thousandth from the library's own loss with the same formula of attention; in bf16 its two attentions differ by as much"
    batch = collate(formats.encode_all(corpora.load("desk", "train", n=6), tok), tok.pad_token_id)
    model = shallow(dtype=torch.bfloat16)
    lora.add_lora(model, r=4)
    with torch.no_grad():
        with plain_attention(model, 512) as used: want, k = supervised_loss(model, batch)
        with quick(model, {k: v[:2] for k, v in batch.items()}, 512) as loss_fn: got, n = loss_fn(model, batch)
    assert used and loss_fn is tree_loss
    assert (got/n).item() == pytest.approx((want/k).item(), rel=1e-3)


def test_long_rows_in_several_spans(real):
    "Rows longer than a span of queries, with a long common beginning"
    rng = random.Random(0)
    head = [rng.randrange(49000) for _ in range(150)]
    rows = [head + [rng.randrange(49000) for _ in range(n)] for n in (200, 330)] + [[rng.randrange(49000) for _ in range(290)]]
    batch = collate([dict(input_ids=r, labels=[-100]*(len(r)-20) + r[-20:]) for r in rows], 0)
    check_same(real, batch)


@pytest.mark.parametrize("kind,kw", [("llama", {}), ("mistral", {}), ("qwen2", {}), ("qwen3", {}), ("phi3", dict(pad_token_id=0)),
                                     ("llama", dict(num_key_value_heads=4)), ("llama", dict(attention_bias=True, tie_word_embeddings=True))])
def test_quick_on_other_architectures(kind, kw):
    model = tiny(kind, sliding_window=None, **kw) if kind == "mistral" else tiny(kind, **kw)
    assert check_same(model, collate(some(), 0)) is tree_loss


@pytest.mark.parametrize("kind,kw,want", [("gemma2", dict(final_logit_softcapping=.05), full_loss), ("cohere", {}, full_loss),
                                          ("mistral", dict(sliding_window=4), supervised_loss), ("llama", dict(attention_dropout=.1), supervised_loss),
                                          ("gpt2", dict(n_embd=32, n_layer=2, n_head=4), supervised_loss)])
def test_quick_steps_back_where_it_would_be_wrong(kind, kw, want):
    model = tiny(kind, **kw) if kind != "gpt2" else AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=500, **kw))
    batch = collate(some(), 0)
    with quick(model, batch, 20) as loss_fn: assert loss_fn is want


def test_quick_steps_back_when_the_trial_fails(monkeypatch):
    model, batch = tiny(initializer_range=.5), collate(some(), 0)
    lay = speed.lay_out
    def wrong(rows, *a, **k):
        L = lay(rows, *a, **k)
        L.positions += 1 + torch.arange(L.positions.shape[1])   # every token elsewhere
        return L
    monkeypatch.setattr(speed, "lay_out", wrong)
    with quick(model, batch, 20) as loss_fn: assert loss_fn is supervised_loss


def test_quick_steps_back_where_the_short_way_breaks(monkeypatch):
    model, batch = tiny(), collate(some(), 0)
    def broken(*a, **k): raise RuntimeError("shape '[3, 4]' is invalid")
    monkeypatch.setattr(speed, "tree_loss", broken)
    with quick(model, batch, 20) as loss_fn:
        assert loss_fn is supervised_loss
        loss_fn(model, batch)[0].backward()
    assert model.config._attn_implementation == "sdpa"


def test_quick_leaves_the_model_as_it_was(real, tok):
    batch = collate(some(), 0)
    for model in (tiny(), real):
        was = model.config._attn_implementation, model.training
        with pytest.raises(KeyError):
            with quick(model, batch, 20): raise KeyError
        assert (model.config._attn_implementation, model.training) == was
        assert not [m for m in model.modules() if "forward" in vars(m)]


def test_generation_inside_quick_is_generation_outside(real, tok):
    from ftcourse.prompting import answer
    rows = corpora.load("desk", "valid", n=4)
    want = answer(real, tok, rows, max_new_tokens=12)
    with quick(real, collate(some(), 0), 100): got = answer(real, tok, rows, max_new_tokens=12)
    assert got == want


def test_quick_norms_nest_and_name_only_norms_that_are_plain():
    model = tiny("gemma")   # its norm multiplies by 1 + w
    with quick_norms(model) as n: assert n == 0
    model = tiny()
    with quick_norms(model) as n, quick_norms(model) as m: assert (n, m) == (5, 0)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_full_fine_tuning_has_the_same_gradients():
    for tied in (False, True): check_same(tiny(tie_word_embeddings=tied), collate(some(12), 0))


def test_checkpointing_recomputes_the_same():
    model, batch = tiny(), collate(some(), 0)
    with quick(model, batch, 20) as loss_fn:
        want = grads(model, loss_fn, batch)
        model.train(); model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        got = grads(model, loss_fn, batch)
    assert got[0] == want[0] and torch.allclose(got[1], want[1], atol=1e-7)


def test_rows_that_are_the_same_or_of_one_token():
    model = tiny()
    rows = [dict(input_ids=[5, 6, 7], labels=[-100, 6, 7])]*3 + [dict(input_ids=[5], labels=[-100])] + [dict(input_ids=[5, 6], labels=[-100, 6])]
    check_same(model, collate(rows, 0))


def test_where_time_goes_adds_up():
    a = torch.randn(300, 300)
    found = where_time_goes(lambda: [a @ a for _ in range(20)])
    assert sum(found.values()) == pytest.approx(1) and max(found, key=found.get) == "matrix products"


# Layers that read the same, and compiled pieces

def lora_tiny(kind="llama", seed=0, r=3, **kw):
    "A small model whose LoRA is not zero"
    model = lora.add_lora(tiny(kind, seed, **kw), r=r, alpha=5)
    for m in lora.lora_layers(model).values(): torch.nn.init.normal_(m.lora_B, std=.3)
    return model.train()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3), (4,)])
def test_joint_low_rank_is_each_layer_alone(ranks, bias):
    "Several layers' answers and gradients, by the joint product and one by one, in float64; and by gradcheck"
    torch.manual_seed(0)
    def t(*shape, grad=True): return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)
    x, outs, scales = t(5, 6), [4, 3, 7][:len(ranks)], [.5, 2., 1.][:len(ranks)]
    Ws, bs = [t(n, 6, grad=False) for n in outs], [t(n, grad=False) if bias else None for n in outs]
    AB = [p for n, r in zip(outs, ranks) for p in (t(r, 6), t(n, r))]
    W, b = torch.cat(Ws), torch.cat(bs) if bias else None
    got = JointLowRank.apply(x, W, b, scales, *AB)
    want = [lora.LowRank.apply(x, W, b, A, B, s) for W, b, A, B, s in zip(Ws, bs, AB[::2], AB[1::2], scales)]
    dys = [torch.randn_like(y) for y in want]
    for a, c in zip(got, want): torch.testing.assert_close(a, c)
    for a, c in zip(torch.autograd.grad(got, (x, *AB), dys), torch.autograd.grad(want, (x, *AB), dys)): torch.testing.assert_close(a, c)
    assert gradcheck(lambda x, *AB: JointLowRank.apply(x, W, b, scales, *AB), (x, *AB))


@pytest.mark.parametrize("kw", [{}, dict(attention_bias=True), dict(tie_word_embeddings=True)])
def test_joined_layers_are_the_same_model(kw):
    "Two groups a layer (q, k, v and gate, up); loss, gradients and weights as without; a layer may be called alone"
    model, batch = lora_tiny(**kw), collate(some(), 0)
    was = {k: v.clone() for k, v in model.state_dict().items()}
    want, g = grads(model, supervised_loss, batch)
    with joined(model, batch) as n:
        assert n == 2*SIZE["num_hidden_layers"]
        got, h = grads(model, supervised_loss, batch)
        layer, x = model.model.layers[0].self_attn.k_proj, torch.randn(2, 3, 32)
        alone, again = layer(x), layer(x)
    assert got == pytest.approx(want, rel=1e-6) and (g-h).norm() <= 1e-5*g.norm()
    torch.testing.assert_close(alone, layer(x)); assert torch.equal(alone, again)
    now = model.state_dict()
    assert all(torch.equal(was[k], now[k]) for k in was)
    ptrs = [m.base.weight.untyped_storage().data_ptr() for m in lora.lora_layers(model).values()]
    assert len({*ptrs}) == len(ptrs) and not [m for m in model.modules() if "forward" in vars(m)]


def test_joined_sees_every_step_of_the_optimizer():
    "What the joint product reads are the layers' own A and B, also after they changed"
    batch, out = collate(some(), 0), []
    for join in (False, True):
        model = lora_tiny()
        opt = torch.optim.AdamW(lora.lora_parameters(model), lr=1e-2)
        with joined(model, batch) if join else contextlib.nullcontext():
            for _ in range(4): out.append(grads(model, supervised_loss, batch)[0]); opt.step()
    assert out[:4] == pytest.approx(out[4:], rel=1e-5) and len({*out[:4]}) == 4


def test_what_is_not_plain_is_not_joined():
    batch = collate(some(), 0)
    dropped = lora.add_lora(tiny(), r=2, dropout=.1)
    merged = lora.merge(lora_tiny())
    for model in (dropped, merged, tiny()):
        with joined(model, batch) as n: assert n == 0
    few = lora.add_lora(tiny(), r=2, target=["q_proj", "o_proj"])
    with joined(few, batch) as n: assert n == 0
    two = lora.add_lora(tiny(), r=2, target=["q_proj", "v_proj"])
    with joined(two, batch) as n: assert n == 2
    with pytest.raises(KeyError):
        with joined(two, batch): raise KeyError
    assert not [m for m in two.modules() if "forward" in vars(m)]


def test_fused_pieces_are_the_same_model():
    "Compiled norms and gated products, in forward and backward, beside `quick`; afterwards the model is as it was"
    model, batch = lora_tiny(), collate(some(), 0)
    want, g = grads(model, supervised_loss, batch)
    with quick(model, batch, 20) as loss_fn, fused_pieces(model) as n:
        assert loss_fn is tree_loss and n == 3*SIZE["num_hidden_layers"] + 1
        got, h = grads(model, loss_fn, batch)
    assert got == pytest.approx(want, rel=1e-5) and (g-h).norm() <= 2e-4*g.norm()
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_other_norms_and_mlps_are_not_fused():
    for model in (tiny("gemma"), tiny("gpt2", n_embd=32, n_layer=2, n_head=4)):
        with fused_pieces(model) as n: assert n == 0
