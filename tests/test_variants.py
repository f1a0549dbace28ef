"Every variant of LoRA against `peft`: forward, gradients, ten steps, merge, files both ways; and what it does with bad input"
import copy, json, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config)
from ftcourse import lora, variants
from ftcourse.lora import CONFIG, WEIGHTS, check_trained, count, lora_layers, merge, merge_and_unload, unload, unmerge
from ftcourse.speed import joined, quick, supervised_loss
from ftcourse.variants import (KINDS, Adapter, adapt, captured, load_variant, loraplus, mixed, save_variant, scale_of, taken, vera_pair,
                               wear)

peft = pytest.importorskip("peft", reason="peft is the reference: pip install 'ftcourse[lessons]'")
SIZE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64)
FAMILIES = {"llama": lambda **kw: LlamaConfig(**SIZE, **kw), "qwen2": lambda **kw: Qwen2Config(**SIZE, **kw),
            "mistral": lambda **kw: MistralConfig(**SIZE, head_dim=8, sliding_window=8, **kw),
            "gpt2": lambda **kw: GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, **kw)}
PAIRS = [(k, f) for k in KINDS for f in FAMILIES]
pairs = pytest.mark.parametrize("kind,family", PAIRS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(family="llama", dtype=torch.float32, seed=0, **kw):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**kw)).to(dtype)
    for n, p in model.named_parameters():
        if n.endswith("bias"): nn.init.normal_(p, std=.1)
    return model.eval()


IDS = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(1))


def logits(model): return model(input_ids=IDS).logits


def trained(model): return [p for p in model.parameters() if p.requires_grad]


def stir(model, std=.05, seed=2):
    "A value for all that trains, as if trained"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(model): p.add_(torch.randn(p.shape, generator=g)*std)
    return model


def config(kind, family="llama", r=4, **kw):
    "peft's configuration for our `kind`"
    kw = {"task_type": "CAUSAL_LM", **kw}
    if kind == "vera": return peft.VeraConfig(r=r, target_modules="all-linear", fan_in_fan_out=family == "gpt2", **kw)
    extra = dict(rslora=dict(use_rslora=True), dora=dict(use_dora=True), pissa=dict(init_lora_weights="pissa")).get(kind, {})
    kw = {"target_modules": "all-linear", **kw}
    return peft.LoraConfig(r=r, lora_alpha=6, fan_in_fan_out=family == "gpt2", **extra, **kw)


def theirs(kind, base, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(base), config(kind, **kw)).eval()


OURS = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight", "vera_lambda_b": "vera_lambda_b.default",
        "vera_lambda_d": "vera_lambda_d.default", "lora_magnitude_vector": "lora_magnitude_vector.default.weight"}


def counterpart(model, peft_model):
    "our trained parameter -> theirs, by name"
    there, out = dict(peft_model.named_parameters()), []
    for n, p in model.named_parameters():
        if p.requires_grad:
            layer, _, part = n.rpartition(".")
            out.append((p, there[f"base_model.model.{layer}.{OURS[part]}"]))
    assert len(out) == len([p for p in there.values() if p.requires_grad])
    return out


def both(kind, family, dtype=torch.float32):
    base = tiny(family, dtype)
    ours, ref = adapt(copy.deepcopy(base), kind, 4, 6), theirs(kind, base, family=family)
    if kind == "vera":
        theirs_pair = list(getattr(ref.base_model, f"vera_{k}")["default"] for k in "AB")   # in the base's format
        for m in lora_layers(ours).values():
            assert all(torch.equal(a.to(dtype).float(), b) for a, b in zip(m.shared, theirs_pair))
        m.shared[:] = theirs_pair
    stir(ours)
    with torch.no_grad():
        for a, b in counterpart(ours, ref): b.copy_(a)
    if kind == "pissa":   # the same frozen rest
        for n, m in lora_layers(ours).items():
            rest = ref.get_submodule(f"base_model.model.{n}").base_layer.weight
            near(m.base.weight, rest.t() if family == "gpt2" else rest, 1e-5 if dtype == torch.float32 else 1e-2)
    return base, ours, ref


def near(a, b, eps=1e-5): assert (a-b).abs().max() <= eps*max(1, b.abs().max()), (a-b).abs().max()


# Equal to peft

@pairs
def test_start_changes_nothing_and_is_pefts(kind, family):
    base = tiny(family)
    ours, ref = adapt(copy.deepcopy(base), kind, 4, 6), theirs(kind, base, family=family)
    near(logits(ours), logits(base)); near(logits(ours), logits(ref))
    assert count(ours).trainable == sum(p.numel() for p in ref.parameters() if p.requires_grad)
    if kind == "pissa":   # signs of singular vectors are the library's: the products are what is equal
        for n, m in lora_layers(ours).items():
            t = ref.get_submodule(f"base_model.model.{n}")
            near(m.lora_B @ m.lora_A, t.lora_B["default"].weight @ t.lora_A["default"].weight)


@pairs
def test_forward_and_gradients(kind, family):
    _, ours, ref = both(kind, family)
    near(logits(ours), logits(ref))
    for m in (ours, ref): m(input_ids=IDS, labels=IDS).loss.backward()
    for a, b in counterpart(ours, ref): near(a.grad, b.grad)


@pytest.mark.parametrize("kind,family", [p for p in PAIRS if p[1] in ("llama", "gpt2")])
def test_in_bf16(kind, family):
    _, ours, ref = both(kind, family, torch.bfloat16)
    a, b = logits(ours).float(), logits(ref).float()
    assert (a-b).norm() <= 2e-2*b.norm()


@pairs
def test_ten_steps_and_the_merge(kind, family):
    _, ours, ref = both(kind, family)
    opts = [torch.optim.AdamW(trained(m), lr=1e-3) for m in (ours, ref)]
    for _ in range(10):
        for m, o in zip((ours, ref), opts): m(input_ids=IDS, labels=IDS).loss.backward(); o.step(); o.zero_grad()
    for a, b in counterpart(ours, ref): near(a, b, 2e-4)
    near(logits(ours), logits(ref), 1e-4)
    apart = logits(ours)
    near(logits(merge_and_unload(ours)), apart, 1e-4); near(logits(ref.merge_and_unload()), apart, 1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
def test_dropout_falls_where_peft_lets_it_fall(kind):
    "The frozen product keeps its whole input: an untrained adapter changes nothing in training; a trained one is peft's, mask by mask"
    base = nn.Linear(32, 16)
    class Holder(nn.Module):
        def __init__(self): super().__init__(); self.up = copy.deepcopy(base)
        def forward(self, x): return self.up(x)
    cfg = peft.VeraConfig(r=4, target_modules=["up"], vera_dropout=.5) if kind == "vera" else \
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up"], lora_dropout=.5, use_dora=kind == "dora")
    ref, ours = peft.get_peft_model(Holder(), cfg).train(), adapt(Holder(), kind, 4, 6, dropout=.5).train()
    x = torch.randn(64, 32)
    torch.manual_seed(0); near(ours(x), base(x))
    stir(ours, .3)
    with torch.no_grad():
        for a, b in counterpart(ours, ref): b.copy_(a)
    torch.manual_seed(0); got = ours(x)
    torch.manual_seed(0); near(got, ref(x))
    assert (got-ours(x)).abs().max() > 1e-2


def test_the_real_model(smol):
    "The bundled model, in every kind, against peft: one batch's logits and gradients"
    ids = torch.randint(40000, (1, 16), generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        target = ["q_proj", "down_proj"]   # PiSSA decomposes each of them
        ours = adapt(copy.deepcopy(smol), kind, 4, 6, target=target)
        ref = theirs(kind, smol, target_modules=target) if kind != "vera" else peft.get_peft_model(
            copy.deepcopy(smol), peft.VeraConfig(r=4, target_modules=target, task_type="CAUSAL_LM")).eval()
        stir(ours, .01)
        with torch.no_grad():
            for a, b in counterpart(ours, ref): b.copy_(a)
        a, b = ours(ids).logits, ref(ids).logits
        assert (a-b).abs().max() <= 2e-3*b.abs().max(), kind
        del ours, ref


@pytest.fixture(scope="module")
def smol():
    from ftcourse import models
    return models.load(dtype=torch.float32, device="cpu")[0]


# Files

@pairs
def test_our_folder_opens_in_peft(kind, family, tmp_path):
    base, ours, _ = both(kind, family)
    save_variant(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        ref = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    near(logits(ref), logits(ours), 5e-5)


@pairs
def test_pefts_folder_opens_here(kind, family, tmp_path):
    base, ours, ref = both(kind, family)
    if kind == "pissa":   # peft's file of PiSSA needs the changed base; converted, it is plain LoRA
        start = theirs(kind, base, family=family)
        start.peft_config["default"].init_lora_weights = True
        start.save_pretrained(tmp_path/"start")
        ref.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path/"start"))
        back = load_variant(copy.deepcopy(base), tmp_path)
        assert (back.lora_config.kind, back.lora_config.r) == ("lora", 8)
        return near(logits(back), logits(ref), 5e-5)
    ref.save_pretrained(tmp_path)
    back = load_variant(copy.deepcopy(base), tmp_path)
    assert back.lora_config.kind == kind
    near(logits(back), logits(ref))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(tied, tmp_path):
    base = tiny("llama", tie_word_embeddings=tied)
    ours = stir(adapt(copy.deepcopy(base), r=4, alpha=6, target=["embed_tokens", "q_proj"]))
    save_variant(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ref = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    near(logits(ref), logits(ours))
    near(logits(load_variant(copy.deepcopy(base), tmp_path)), logits(ours))
    apart = logits(ours)
    plain = merge_and_unload(ours)
    near(logits(plain), apart)
    plain.save_pretrained(tmp_path/"plain")
    near(logits(AutoModelForCausalLM.from_pretrained(tmp_path/"plain")), apart)


def classifier():
    torch.manual_seed(3)
    c = FAMILIES["llama"](num_labels=5, pad_token_id=0)
    return AutoModelForSequenceClassification.from_config(c).eval()


def test_a_new_head_is_in_the_file(tmp_path):
    base = classifier()
    ours = stir(adapt(copy.deepcopy(base), r=4, alpha=6, also=["score"]))
    assert torch.is_tensor(ours.score.weight) and ours.score.weight.requires_grad and "score" not in lora_layers(ours)
    save_variant(ours, tmp_path)
    assert "base_model.model.score.weight" in load_file(tmp_path/WEIGHTS)
    near(logits(load_variant(classifier(), tmp_path)), logits(ours))
    ref = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    near(logits(ref), logits(ours))
    ref = peft.get_peft_model(copy.deepcopy(base), config("lora", task_type="SEQ_CLS", modules_to_save=["score"])).eval()
    with torch.no_grad(): ref.base_model.model.score.modules_to_save["default"].weight.add_(1)
    ref.save_pretrained(tmp_path/"theirs")
    near(logits(load_variant(classifier(), tmp_path/"theirs")), logits(ref))
    near(logits(unload(ours)), logits(base), 0)


# Taking off, merging, training

@pairs
def test_off_again_it_is_the_base_bit_for_bit(kind, family):
    base = tiny(family)
    was = {k: v.clone() for k, v in base.state_dict().items()}
    model = stir(adapt(base, kind, 4, 6))
    apart = logits(model)
    for _ in range(2): merge(model)
    near(logits(model), apart, 1e-4); unmerge(model); assert torch.equal(logits(model), apart)
    unload(merge(model))
    now = model.state_dict()
    assert was.keys() == now.keys() and all(torch.equal(was[k], now[k]) for k in was)
    assert {type(m) for m in model.modules()} == {type(m) for m in tiny(family).modules()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_quick_step_takes_every_kind(kind):
    "The same loss and gradients inside `quick`; only plain LoRA is joined"
    from ftcourse.formats import collate
    batch = collate([dict(input_ids=r.tolist(), labels=[-100]*4 + r.tolist()[4:]) for r in IDS], 0)
    model = stir(adapt(tiny(), kind, 4, 6)).train()
    def run(f):
        model.zero_grad(set_to_none=True); t, n = f(model, batch); (t/n).backward()
        return (t/n).item(), torch.cat([p.grad.flatten() for p in trained(model)])
    a, g = run(supervised_loss)
    with quick(model, batch, 20) as f: b, h = run(f)
    assert a == pytest.approx(b, rel=1e-5) and (g-h).norm() <= 2e-4*g.norm()
    with joined(model, batch) as n: assert (n > 0) == (kind in ("lora", "rslora"))


def test_loraplus_is_pefts():
    from peft.optimizers import create_loraplus_optimizer
    base = tiny()
    ours, ref = adapt(copy.deepcopy(base), r=4, alpha=6), theirs("lora", base)
    with torch.no_grad():
        for a, b in counterpart(ours, ref): b.copy_(a)
    opts = loraplus(ours, ratio=8)([dict(params=trained(ours), weight_decay=0.)], lr=1e-3), \
        create_loraplus_optimizer(ref, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    for _ in range(10):
        for m, o in zip((ours, ref), opts): m(input_ids=IDS, labels=IDS).loss.backward(); o.step(); o.zero_grad()
    for a, b in counterpart(ours, ref): near(a, b)
    with pytest.raises(ValueError, match="above 0"): loraplus(ours, ratio=0)
    with pytest.raises(ValueError, match="take another"): loraplus(ours)([dict(params=[ours.lm_head.weight])])


def test_loraplus_keeps_its_ratio_through_a_run_of_fit(smol):
    "The schedule multiplies both groups' rates and levels neither"
    from ftcourse import corpora, models
    from ftcourse.training import fit
    c = LlamaConfig(**{**SIZE, "vocab_size": 49152})
    torch.manual_seed(0)
    model, made = adapt(AutoModelForCausalLM.from_config(c), r=2), []
    rows, seen = corpora.load("desk", "train", n=6, seed=0), []
    class Watch(torch.optim.AdamW):
        def step(self, *a): seen.append([g["lr"] for g in self.param_groups]); return super().step(*a)
    def optimizer(groups):
        o = loraplus(model, ratio=4)(groups)
        return Watch([{k: v for k, v in g.items() if k in ("params", "ratio", "lr", "weight_decay")} for g in o.param_groups])
    fit(model, models.load()[1], rows, lr=1e-3, max_tokens=300, optimizer=optimizer)
    assert len(seen) > 2 and all(b == pytest.approx(4*a) for a, b in seen) and len({a for a, _ in seen}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_check_trained_knows_every_kind(kind):
    model = adapt(tiny(), kind, 4)
    with pytest.raises(ValueError, match="still zero, or where it began"): check_trained(model)
    check_trained(stir(model))


def test_check_trained_knows_an_embedding():
    model = adapt(tiny(), target=["embed_tokens"])
    with pytest.raises(ValueError, match="still zero"): check_trained(model)
    check_trained(stir(model))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "lora"])
def test_a_plain_file_on_another_kind_is_refused(kind, tmp_path):
    lora.save_adapter(stir(lora.add_lora(tiny(), 4, 8)), tmp_path)
    model = adapt(tiny(), kind, 4, alpha=8)
    before = logits(model)
    with pytest.raises(ValueError, match="and the file is plain LoRA"): lora.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_in_the_file_is_refused(kind, tmp_path):
    save_variant(stir(adapt(tiny(), kind, 4)), tmp_path)
    tensors = load_file(tmp_path/WEIGHTS)
    name = next(k for k in tensors if "vera_A" not in k and "vera_B" not in k)
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, tmp_path/WEIGHTS)
    with pytest.raises(ValueError, match="a nan or an infinity"): load_variant(tiny(), tmp_path)


def test_an_adapter_with_a_head_of_its_own_is_not_switched():
    model = stir(adapt(tiny(), also=["lm_head"]))
    plain = taken(stir(adapt(tiny())))
    for f in (taken, lambda m: wear(m, plain)):
        with pytest.raises(ValueError, match="lm_head trains whole and belongs to its adapter"): f(model)


# Several adapters

def test_switching_and_mixing_is_pefts():
    base = tiny()
    model = adapt(copy.deepcopy(base), r=4, alpha=6)
    one, two = taken(stir(model, seed=1)), taken(stir(model, seed=2))
    ref = theirs("lora", base); ref.add_adapter("two", config("lora"))
    for name, adapter in (("default", one), ("two", two)):
        for n, (A, B, _) in adapter.parts.items():
            m = ref.get_submodule(f"base_model.model.{n}")
            m.lora_A[name].weight.data.copy_(A); m.lora_B[name].weight.data.copy_(B)
    for name, adapter in (("default", one), ("two", two), ("default", one)):
        ref.set_adapter(name); near(logits(wear(model, adapter)), logits(ref))
    ref.add_weighted_adapter(["default", "two"], [.7, -.2], "both", combination_type="cat"); ref.set_adapter("both")
    near(logits(wear(model, mixed([one, two], [.7, -.2]))), logits(ref))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=3))
def test_a_mixture_is_the_sum_of_updates(weights):
    model = adapt(tiny(), r=2)
    some = [taken(stir(model, seed=i)) for i in range(len(weights))]
    for n, (A, B, s) in mixed(some, weights).parts.items():
        want = sum(w*s_*B_@A_ for w, (A_, B_, s_) in zip(weights, (a.parts[n] for a in some)))
        assert len(A) == 2*len(weights)
        torch.testing.assert_close(s*B@A, want, atol=1e-5, rtol=1e-5)


def test_what_can_not_be_mixed():
    model = adapt(tiny(), r=2)
    other = taken(adapt(tiny(), r=2, target=["q_proj"]))
    with pytest.raises(ValueError, match="in one of them only"): wear(model, other)
    with pytest.raises(ValueError, match="different layers"): mixed([taken(model), other], [1, 1])
    with pytest.raises(ValueError, match="one weight each"): mixed([other], [1, 1])
    with pytest.raises(ValueError, match="DoRALinear"): taken(adapt(tiny(), "dora", r=2))
    with pytest.raises(ValueError, match="PiSSALinear"): taken(adapt(tiny(), "pissa", r=2))
    merge(model)
    with pytest.raises(ValueError, match="unmerge"): wear(model, Adapter({n: (m.lora_A, m.lora_B, 1.) for n, m in lora_layers(model).items()}))


def test_a_mixture_is_saved_and_worn_by_an_optimizers_own_tensors(tmp_path):
    model = adapt(tiny(), "rslora", r=4, alpha=6)
    one, two = taken(stir(model, seed=1)), taken(stir(model, seed=2))
    held = trained(model)
    wear(model, one)
    assert all(a is b for a, b in zip(held, trained(model)))        # same rank: the same tensors
    for adapter in (one, mixed([one, two], [.5, 1.5]), mixed([two], [1.])):
        save_variant(wear(model, adapter), tmp_path)
        near(logits(load_variant(tiny(), tmp_path)), logits(model))
        near(logits(peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()), logits(model))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_plain_lora_does_not_save_a_variant(kind, tmp_path):
    with pytest.raises(ValueError, match="save_variant"): lora.save_adapter(adapt(tiny(), kind, 4), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_trains_is_on_the_models_device_and_follows_it(kind):
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    if kind != "pissa":   # which needs the numbers
        adapt(model, kind, 4)
        assert {p.device.type for p in lora.lora_parameters(model)} == {"meta"} and logits_meta(model).device.type == "meta"
    real = stir(adapt(tiny(), kind, 4))
    twin = copy.deepcopy(real)
    with torch.no_grad():
        for p in trained(twin): p.zero_()
    near(logits(real), logits(stir(adapt(tiny(), kind, 4))))       # the twin's tensors are its own
    assert len(lora.lora_parameters(real)) == len(trained(real))
    if kind == "vera": assert len({id(m.shared) for m in lora_layers(real).values()}) == 1
    moved = copy.deepcopy(real).to("meta")
    assert logits_meta(moved).device.type == "meta"


def logits_meta(model): return model(input_ids=IDS.to("meta")).logits


def test_gemmas_scaled_embedding():
    from transformers import GemmaConfig
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(GemmaConfig(**{**SIZE, "head_dim": 8})).eval()
    model = stir(adapt(copy.deepcopy(base), r=2, target=["embed_tokens"]))
    apart = logits(model)
    near(logits(merge(model)), apart, 1e-4)


def test_a_dead_row_stays_dead_in_dora():
    layer = nn.Linear(8, 4)
    with torch.no_grad(): layer.weight[1] = 0
    new = variants.DoRALinear(copy.deepcopy(layer), 2)
    x = torch.randn(3, 8)
    torch.testing.assert_close(new(x), layer(x)); assert new.folded(new.base.weight).isfinite().all()


def test_a_forgotten_head_is_refused():
    model = classifier()
    with pytest.raises(ValueError, match=r"score stands outside .*also=\['score'\]"): adapt(model)
    adapt(model, also="score")
    assert model.lora_config.also == ["score"] and variants.variant_config(model)["task_type"] == "SEQ_CLS"
    adapt(classifier(), target=["q_proj"])                          # given by name: the reader's own choice


def test_a_container_that_trains_whole_is_not_adapted_inside():
    model = adapt(tiny(), also=["layers.0.mlp"])
    assert not [n for n in lora_layers(model) if "layers.0.mlp" in n]
    assert all(p.requires_grad for p in model.model.layers[0].mlp.parameters())


def test_an_adapter_that_breaks_half_way_leaves_the_weights(monkeypatch):
    calls, svd = [], torch.linalg.svd
    def fails(*a, **k):
        calls.append(1)
        if len(calls) == 4: raise RuntimeError("out of memory")
        return svd(*a, **k)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    model = tiny()
    with pytest.raises(RuntimeError): adapt(model, "pissa", 4)
    was = tiny().state_dict()
    assert all(torch.equal(was[k], v) for k, v in model.state_dict().items()) and not hasattr(model, "lora_config")


def test_a_quantised_base_takes_plain_lora_and_says_so():
    from ftcourse.quant import quantize
    model = quantize(tiny())
    for kind in ("dora", "pissa", "vera"):
        with pytest.raises(ValueError, match="quantised"): adapt(model, kind, 4)
    near(logits(adapt(quantize(tiny()), "rslora", 4)), logits(quantize(tiny())))


# Bad input: an error that says what to do, and the model unchanged

def untouched(model, family="llama"):
    fresh = tiny(family)
    assert not hasattr(model, "lora_config") and {type(m) for m in model.modules()} == {type(m) for m in fresh.modules()}
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in zip(model.parameters(), fresh.parameters()))


@pytest.mark.parametrize("kw,say", [(dict(kind="lokr"), "there are: lora"), (dict(r=0), "between 1"), (dict(r=33), "smaller side"),
                                    (dict(target=["q_proj", "qq"]), "'qq' matches no layer"), (dict(target="nothing"), r"q_proj \(x2\)"),
                                    (dict(also=["score"]), "no layer of this name"),
                                    (dict(kind="dora", target=["embed_tokens", "q_proj"]), "Embedding"),
                                    (dict(kind="vera", r=0), "between 1"), (dict(kind="pissa", r=9), "half of it"),
                                    (dict(kind="pissa", r=2, alpha=0), "above 0")])
def test_adapt_refuses(kw, say):
    model = tiny()
    with pytest.raises(ValueError, match=say): adapt(model, **kw)
    untouched(model)


def test_pissa_of_a_broken_weight():
    model = tiny()
    with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj holds a nan"): adapt(model, "pissa", 4)
    assert not hasattr(model, "lora_config")


def test_adapting_twice():
    model = adapt(tiny(), "dora", 4)
    with pytest.raises(ValueError, match="already carries"): adapt(model, "vera", 4)


def edit(folder, tensors=None, cfg=None):
    t, c = load_file(folder/WEIGHTS), json.loads((folder/CONFIG).read_text())
    if tensors: save_file(tensors(t), folder/WEIGHTS)
    if cfg: (folder/CONFIG).write_text(json.dumps(c | cfg))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

@pytest.mark.parametrize("tensors,cfg,say", [
    (lambda t: {k: v for k, v in t.items() if k != FIRST}, None, "is missing"),
    (lambda t: t | {"base_model.model.extra.weight": torch.ones(2)}, None, "has no place"),
    (lambda t: t | {FIRST: torch.ones(3, 32)}, None, "has shape"),
    (lambda t: {"a": torch.ones(1)}, None, "no key of an adapter"),
    (None, dict(r=5), "has shape"), (None, dict(use_dora=False), "no place"), (None, dict(bias="all"), "bias = 'all'"),
    (None, dict(peft_type="LOHA"), "LOHA"), (None, dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
    (None, dict(init_lora_weights="olora"), "init_lora_weights"), (None, dict(use_rslora=True), "use_dora"), (None, dict(foo_scale=2), "foo_scale"),
    (None, dict(r="8"), "r = '8'"), (None, dict(lora_alpha=None), "lora_alpha = None"),
    (lambda t: t | {"base_model.model.score.weight": torch.ones(5, 32)}, dict(modules_to_save=["classifier", "score"]), "no layer of this name"),
    (None, dict(modules_to_save=["norm"]), "norm.weight is missing"), (None, dict(r=0), "between 1"),
])
def test_a_file_that_does_not_fit(tensors, cfg, say, tmp_path):
    save_variant(stir(adapt(tiny(), "dora", 4, 6)), tmp_path)
    edit(tmp_path, tensors, cfg)
    model = tiny()
    with pytest.raises(ValueError, match=say): load_variant(model, tmp_path)
    untouched(model)


@pytest.mark.parametrize("n", [0, 7, 100, 2000])
def test_a_truncated_file(n, tmp_path):
    save_variant(adapt(tiny(), "vera", 4), tmp_path)
    (tmp_path/WEIGHTS).write_bytes((tmp_path/WEIGHTS).read_bytes()[:n])
    model = tiny()
    with pytest.raises(ValueError, match="damaged"): load_variant(model, tmp_path)
    untouched(model)
    (tmp_path/WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="no such file"): load_variant(model, tmp_path)


def test_a_merged_model_is_not_saved_and_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = stir(adapt(tiny(), "dora", 4))
    save_variant(model, tmp_path); was = (tmp_path/WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="unmerge"): save_variant(merge(model), tmp_path)
    unmerge(stir(model))
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(variants, "write_atomic", full)
    with pytest.raises(OSError): save_variant(model, tmp_path)
    assert (tmp_path/WEIGHTS).read_bytes() == was


def test_a_vera_file_whose_pair_is_too_small(tmp_path):
    save_variant(stir(adapt(tiny(), "vera", 4)), tmp_path)
    edit(tmp_path, lambda t: t | {"base_model.vera_A": torch.ones(4, 8)})
    model = tiny()
    with pytest.raises(ValueError, match="too small"): load_variant(model, tmp_path)
    untouched(model)


# Small truths

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 256), st.floats(.1, 512))
def test_scales(r, alpha):
    assert scale_of("lora", r, alpha)*r == pytest.approx(alpha) and scale_of("rslora", r, alpha)**2*r == pytest.approx(alpha**2)
    assert scale_of("dora", r, alpha) == scale_of("lora", r, alpha)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 100))
def test_captured_ends_at_one_and_at_the_true_rank(rank, seed):
    g = torch.Generator().manual_seed(seed)
    s = captured(torch.randn(20, rank, generator=g) @ torch.randn(rank, 30, generator=g))
    assert (s.diff() >= -1e-6).all() and s[rank-1] == pytest.approx(1, abs=1e-4) and len(s) == 20


def test_the_pair_is_the_same_for_a_seed_and_reaches_the_largest_layer():
    A, B = vera_pair([(3, 9), (7, 4)], 5, seed=1)
    assert A.shape == (5, 9) and B.shape == (7, 5) and torch.equal(A, vera_pair([(7, 9)], 5, 1)[0]) and not torch.equal(A, vera_pair([(7, 9)], 5, 2)[0])
