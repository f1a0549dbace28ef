"Quantisation against bitsandbytes, bit for bit, against its own definition, and against bad input"
import copy, math, subprocess, sys
import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config
from ftcourse import lora, quant, speed
from ftcourse.quant import (LEVELS, QuantLinear, QuantMatMul, bits_per_weight, decode, dequantize,
                            dequantize_blockwise, dequantized_weight, encode, normal_float, pack,
                            quantize, quantize_blockwise, quantized_layers, stored_bytes, unpack)
from own_process import in_own_process

TYPES = ["nf4", "fp4", "int4", "int8"]
types = pytest.mark.parametrize("quant_type", TYPES)
double = pytest.mark.parametrize("double_quant", [False, True])
SIZE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
FAMILIES = {"llama": LlamaConfig(**SIZE), "tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
            "bias": LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True),
            "qwen2": Qwen2Config(**SIZE), "mistral": MistralConfig(**SIZE, head_dim=8)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models this small run faster on one, and a busy machine doesn't slow them down"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(family="llama", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype)
    for n, p in model.named_parameters():   # biases start at zero, and zero would hide a mistake
        if n.endswith("bias"): nn.init.normal_(p, std=.1)
    return model.eval()


def words(rows=3, length=12): return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model, ids=None):
    with torch.no_grad(): return model(words() if ids is None else ids).logits


def stir(model, std=.05):
    "Give every A and B a value, as if trained"
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in lora.lora_parameters(model): p.copy_(torch.randn(p.shape, generator=g)*std)
    return model


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]


def same_state(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(
        torch.equal(a[0][k], b[0][k]) or (a[0][k].isnan() == b[0][k].isnan()).all() and a[0][k].isnan().any() for k in a[0])


# The tables

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]   # QLoRA, appendix E


def test_nf4_is_the_papers_table(): assert torch.equal(LEVELS["nf4"], torch.tensor(NF4))


def test_nf4_by_scipy():
    "The same quantiles from another implementation, in double precision and with the exact start"
    start = 1 - (1/30 + 1/32)/2
    pos, neg = (norm.ppf(np.linspace(start, .5, n)[:-1]) for n in (9, 8))
    ours = normal_float().double().numpy()
    np.testing.assert_allclose(ours, np.sort([*pos, 0, *-neg])/pos.max(), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_normal_float_of_any_width(bits):
    levels = normal_float(bits)
    assert len(levels) == 2**bits and levels[0] == -1 and levels[-1] == 1 and (levels.diff() > 0).all()
    assert (levels == 0).sum() == 1 and (levels > 0).sum() == 2**(bits-1)


def test_tables_of_bitsandbytes():
    for k in ("nf4", "fp4"): assert torch.equal(LEVELS[k], bnb.get_4bit_type(k, device="cpu"))
    assert torch.equal(LEVELS["dynamic8"], bnb.create_dynamic_map())


def test_every_level_is_its_own_code():
    for k, levels in LEVELS.items():
        back = levels[encode(levels, k).long()]
        assert torch.equal(back, levels), k


# Bit for bit

SHAPES = [(128, 192), (64, 64), (3, 64), (1, 128), (5, 30), (7, 13), (1, 1), (33,), (2, 3, 40)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_4bit_is_bitsandbytes(shape, quant_type, blocksize, dtype):
    w = (randn(*shape)*.05).to(dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
    q = quantize_blockwise(w, quant_type, blocksize)
    n = w.numel()   # in an odd byte, half of it means nothing
    assert torch.equal(unpack(q.codes, n), unpack(packed.flatten(), n))
    assert torch.equal(q.absmax, state.absmax.float())
    assert torch.equal(dequantize_blockwise(q, dtype), bnb.dequantize_4bit(packed, state).view(shape))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(128, 192), (300, 320), (3, 64)], ids=str)
def test_double_quantisation_is_bitsandbytes(shape, quant_type):
    w = randn(*shape)*.05
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=quant_type, compress_statistics=True)
    q = quantize_blockwise(w, quant_type, 64, double_quant=True)
    assert torch.equal(q.codes, packed.flatten())
    assert torch.equal(q.mean, state.offset) and torch.equal(q.absmax.absmax, state.state2.absmax)
    centred = quantize_blockwise(w, quant_type, 64).absmax - q.mean
    plain, _ = torch.ops.bitsandbytes.quantize_blockwise(centred.double(), LEVELS["dynamic8"], 256)   # its exact path
    assert torch.equal(q.absmax.codes, plain)
    fast, them = (dequantize_blockwise(q.absmax._replace(codes=c)) for c in (state.absmax, plain))
    assert ((them - centred).abs() <= (fast - centred).abs() + 1e-9).all()   # its quick one errs by near ties
    state.absmax = q.absmax.codes
    assert torch.equal(dequantize_blockwise(q), bnb.dequantize_4bit(packed, state))


@double
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_layer_is_bitsandbytes_layer(quant_type, double_quant):
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8, bias=False)), randn(5, 64)
    how = dict(quant_type=quant_type, double_quant=double_quant)
    ours, theirs = quantize(copy.deepcopy(model), **how), quantize(copy.deepcopy(model), **how, backend="bitsandbytes")
    assert isinstance(theirs[0], bitsandbytes.nn.Linear4bit) and stored_bytes(ours) == stored_bytes(theirs)
    if double_quant: theirs[0].weight.quant_state.absmax = ours[0].absmax   # near ties, see above
    grads = []
    for m in (ours, theirs):
        xg = x.clone().requires_grad_()
        y = m(xg)
        y.square().sum().backward()
        grads.append((y.detach(), xg.grad))
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(dequantized_weight(ours[0]), dequantized_weight(theirs[0]))


# Properties

finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
tensors = st.lists(finite, min_size=1, max_size=150).map(lambda v: torch.tensor(v, dtype=torch.float32))
kinds, sizes = st.sampled_from(TYPES), st.sampled_from([2, 6, 32, 64])


def blocks_of(x, blocksize): return F.pad(x.flatten(), (0, -x.numel() % blocksize)).view(-1, blocksize)


@given(tensors, kinds, sizes)
def test_error_is_within_half_the_widest_gap(x, kind, blocksize):
    back = dequantize_blockwise(quantize_blockwise(x, kind, blocksize))
    gap = LEVELS[kind].sort().values.diff().max()
    bound = blocks_of(x, blocksize).abs().amax(1, keepdim=True) * gap/2 * (1 + 1e-5)
    assert (blocks_of(back - x, blocksize).abs() <= bound + 1e-37).all()


@given(tensors, kinds, sizes)
def test_quantising_twice_changes_nothing(x, kind, blocksize):
    q = quantize_blockwise(x, kind, blocksize)
    again = quantize_blockwise(dequantize_blockwise(q), kind, blocksize)
    assert torch.equal(dequantize_blockwise(again), dequantize_blockwise(q))
    if kind != "fp4": assert torch.equal(again.codes, q.codes)   # fp4 has two zeros


@given(tensors, kinds, sizes, st.booleans())
def test_zero_stays_zero(x, kind, blocksize, double_quant):
    x = torch.where(torch.arange(len(x)) % 3 == 0, 0., x)
    back = dequantize_blockwise(quantize_blockwise(x, kind, blocksize, double_quant))
    assert (back[x == 0] == 0).all()


@given(tensors, kinds, sizes, st.integers(-20, 20))
def test_a_power_of_two_scales_and_nothing_else(x, kind, blocksize, k):
    x = torch.where(x.abs() < 1e-6, 0., x)   # away from the smallest numbers there are
    a, b = quantize_blockwise(x, kind, blocksize), quantize_blockwise(x * 2.**k, kind, blocksize)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.absmax * 2.**k, b.absmax)


@given(st.lists(st.integers(0, 5), max_size=3), kinds, sizes, st.booleans())
def test_any_shape_comes_back(shape, kind, blocksize, double_quant):
    x = randn(*shape)
    q = quantize_blockwise(x, kind, blocksize, double_quant and x.numel() > 0)
    assert dequantize_blockwise(q).shape == x.shape
    if x.numel(): assert len(q.codes) == (x.numel() if kind == "int8" else (x.numel() + 1)//2)


@given(st.lists(st.integers(0, 15), max_size=33))
def test_packing_round_trip(codes):
    c = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(unpack(pack(c), len(c)), c) and len(pack(c)) == (len(c) + 1)//2


@types
def test_decode_in_pairs_is_the_plain_lookup(quant_type):
    codes = torch.randint(len(LEVELS[quant_type]), (1001,), dtype=torch.uint8)
    stored = codes if quant_type == "int8" else pack(codes)
    assert torch.equal(decode(stored, quant_type, 1001), LEVELS[quant_type][codes.long()])


@types
def test_nearest_by_brute_force(quant_type):
    x = torch.linspace(-1, 1, 4001)
    levels = LEVELS[quant_type]
    got = (levels[encode(x, quant_type).long()] - x).abs()
    assert torch.allclose(got, (levels[:, None] - x).abs().amin(0), atol=1e-7)


@types
@double
def test_bits_per_weight_are_those_stored(quant_type, double_quant):
    layer = quantize(nn.Sequential(nn.Linear(512, 256, bias=False)), None, quant_type, 64, double_quant)
    measured = 8*stored_bytes(layer)/(512*256)
    assert math.isclose(measured, bits_per_weight(quant_type, 64, double_quant), abs_tol=1e-3)   # and one mean


# The layer

@types
@double
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(quant_type, double_quant, bias):
    q = quantize_blockwise(randn(5, 7), quant_type, 8, double_quant)
    x = randn(2, 3, 7).double().requires_grad_()
    b = randn(5, seed=1).double().requires_grad_() if bias else None
    assert torch.autograd.gradcheck(lambda x, b: QuantMatMul.apply(x, q, b), (x, b))


@types
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_is_the_dequantised_linear(quant_type, dtype):
    layer = quantize(nn.Sequential(nn.Linear(48, 24).to(dtype)), None, quant_type)[0]
    plain = nn.Linear(48, 24).to(dtype)
    plain.weight.data, plain.bias.data = dequantized_weight(layer), layer.bias.data
    out = []
    for m in (layer, plain):
        x = randn(3, 4, 48).to(dtype).requires_grad_()
        m(x).float().square().sum().backward()
        out.append((m(x), x.grad, m.bias.grad))
    assert dequantized_weight(layer).dtype == dtype
    for a, b in zip(*out): torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_no_float_weight_is_kept():
    layer, kept = quantize(nn.Sequential(nn.Linear(64, 64)))[0], []
    x = randn(2, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t): layer(x)
    assert not [t for t in kept if t.numel() >= 64*64]
    assert not [b for b in layer.buffers() if b.is_floating_point() and b.numel() >= 64*64/8]


def test_autocast_and_casts():
    layer, x = quantize(nn.Sequential(nn.Linear(64, 32)))[0], randn(2, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16): y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    before = dequantized_weight(layer)
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.absmax_absmax.dtype == layer.absmax_mean.dtype == torch.float32
    assert torch.equal(dequantized_weight(layer), before)
    assert layer(x.detach().bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(layer).to("meta").weight.device.type == "meta"


def test_state_dict_round_trip(tmp_path):
    a, b = quantize(tiny()), quantize(tiny(seed=1))
    torch.save(a.state_dict(), tmp_path/"w.pt")
    b.load_state_dict(torch.load(tmp_path/"w.pt"))
    assert torch.equal(logits(a), logits(b))


@pytest.mark.parametrize("shape", [(7, 13), (1, 1), (3, 5), (1, 31)], ids=str)
@types
def test_odd_numbers_of_weights(shape, quant_type):
    "Half a byte is left over, and nothing goes wrong"
    layer = quantize(nn.Sequential(nn.Linear(shape[1], shape[0])), None, quant_type, 8)[0]
    x = randn(2, shape[1])
    torch.testing.assert_close(layer(x), F.linear(x, dequantized_weight(layer), layer.bias))


# Whole models

@pytest.mark.parametrize("family", FAMILIES)
@types
def test_model_computes_what_its_dequantised_twin_computes(family, quant_type):
    model = quantize(tiny(family), quant_type=quant_type)
    assert len(quantized_layers(model)) == 14 and type(model.lm_head) is nn.Linear
    twin = dequantize(copy.deepcopy(model))
    assert not any(isinstance(m, QuantLinear) for m in twin.modules())
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-5)
    far = (logits(model) - logits(tiny(family))).abs().max()
    assert 0 < far < (.05 if quant_type == "int8" else .5)


def test_int8_errs_less_than_nf4_errs_less_than_int4():
    w = randn(256, 256)
    err = {k: (dequantize_blockwise(quantize_blockwise(w, k)) - w).square().mean() for k in TYPES}
    assert err["int8"] < err["nf4"] < err["int4"] and err["nf4"] < err["fp4"]


def test_target_chooses():
    model = quantize(tiny(), target=["q_proj", "v_proj"])
    assert {n.rpartition(".")[2] for n in quantized_layers(model)} == {"q_proj", "v_proj"}


def test_training_mode_and_frozen_bias_survive():
    model = quantize(tiny("bias").train())
    assert all(m.training for m in quantized_layers(model).values())
    assert all(m.bias is not None for m in quantized_layers(model).values())


def test_bytes_count_tied_weights_once():
    tied = tiny("tied")
    assert stored_bytes(tied) == 4*tied.num_parameters() + sum(b.numel()*b.element_size() for b in tied.buffers())
    big = nn.Sequential(nn.Linear(512, 512, bias=False))
    assert math.isclose(stored_bytes(quantize(copy.deepcopy(big)))/stored_bytes(big), bits_per_weight()/32, rel_tol=1e-3)


# QLoRA

def train(model, steps=10):
    "A few steps of SGD on the adapters; the losses"
    opt, out = torch.optim.SGD(lora.lora_parameters(model), lr=.5), []
    for _ in range(steps):
        loss = model(words(), labels=words()).loss
        loss.backward(); opt.step(); opt.zero_grad()
        out.append(loss.item())
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_qlora_is_lora_over_the_dequantised_weights(family):
    model = quantize(tiny(family))
    twin = dequantize(copy.deepcopy(model))
    for m in (model, twin): torch.manual_seed(0); lora.add_lora(m, r=4)
    assert torch.equal(logits(model), logits(quantize(tiny(family))))   # B is zero: nothing changes
    a, b = train(model.train()), train(twin.train())
    assert a[-1] < a[0]
    np.testing.assert_allclose(a, b, rtol=1e-4)
    for p, q in zip(lora.lora_parameters(model), lora.lora_parameters(twin)): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_only_adapters_train_and_codes_stay():
    model = lora.add_lora(quantize(tiny("bias")), r=4)
    before = {n: b.clone() for n, b in model.named_buffers()}
    train(model.train(), 3)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_adapter_files_both_ways(tmp_path):
    "Saved over 4 bits, loaded over 4 bits; made over floats, loaded over 4 bits"
    base = quantize(tiny())
    model = stir(lora.add_lora(copy.deepcopy(base), r=4))
    lora.save_adapter(model, tmp_path/"a")
    assert torch.equal(logits(lora.load_adapter(copy.deepcopy(base), tmp_path/"a")), logits(model))
    lora.save_adapter(stir(lora.add_lora(tiny(), r=4)), tmp_path/"b")
    assert torch.equal(logits(lora.load_adapter(copy.deepcopy(base), tmp_path/"b")), logits(model))


def test_peft_loads_it_too(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is the reference: pip install 'ftcourse[lessons]'")
    base = quantize(tiny())
    model = stir(lora.add_lora(copy.deepcopy(base), r=4))
    lora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
def test_merging_is_refused_whole_and_the_right_way_works(backend):
    model = tiny()
    quantize(model, ["q_proj"], backend=backend)   # some layers only: the float ones must not be merged either
    stir(lora.add_lora(model, r=4))
    was, before = logits(model), state(model)
    with pytest.raises(ValueError, match=r"dequantize\(model\) first"): lora.merge(model)
    with pytest.raises(ValueError, match=r"dequantize\(model\) first"): lora.merge_and_unload(model)
    assert same_state(state(model), before) and not any(m.merged for m in lora.lora_layers(model).values())
    plain = lora.merge_and_unload(dequantize(model))
    assert not any(isinstance(m, (QuantLinear, lora.LoRALinear)) for m in plain.modules())
    torch.testing.assert_close(logits(plain), was, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
def test_unload_gives_the_quantised_model_back(backend):
    base = quantize(tiny(), backend=backend)
    was = logits(base)
    model = lora.unload(stir(lora.add_lora(base, r=4)))
    assert torch.equal(logits(model), was)


def test_small_updates_vanish_in_four_bits():
    "The reason for the refusal: an update below half a gap leaves no trace but in the constants"
    base = dequantize_blockwise(quantize_blockwise(randn(64, 64)))
    delta = 1e-3*randn(64, 64, seed=1)
    delta[base.view(64, 64).abs() == base.abs().amax(1, keepdim=True)] = 0   # the constants stay
    again = dequantize_blockwise(quantize_blockwise(base + delta))
    assert torch.equal(again, base)


def test_the_quick_ways_of_training_take_it():
    "`quick` and `fused_pieces` look at weights; codes must not confuse them"
    model = lora.add_lora(quantize(tiny()), r=4)
    batch = dict(input_ids=words(), labels=words())
    with speed.quick(model, batch, 12) as loss_fn, torch.no_grad():
        total, n = loss_fn(model, batch)
    plain, m = speed.supervised_loss(model, batch)
    assert n == m and math.isclose(total.item(), plain.item(), rel_tol=1e-4)
    with speed.fused_pieces(model): pass


# Bad input: a sentence that names the layer, and nothing changed

def refused(model, match, **how):
    before, y = state(model), None
    with pytest.raises(ValueError, match=match): quantize(model, **how)
    assert same_state(state(model), before)


def test_twice():
    refused(quantize(tiny()), r"model.layers.0.self_attn.q_proj is quantised already")
    half = quantize(tiny(), ["up_proj"])
    refused(half, "up_proj is quantised already")
    refused(quantize(tiny(), backend="bitsandbytes"), "quantised already")
    assert len(quantized_layers(quantize(half, ["q_proj"]))) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad):
    model = tiny()
    with torch.no_grad(): model.model.layers[1].mlp.down_proj.weight[3, 5] = bad
    refused(model, r"layers.1.mlp.down_proj holds 1 weights that are nan")


@pytest.mark.parametrize("blocksize", [0, -64, 63, 1, 64., "64", None])
def test_blocksize(blocksize): refused(tiny(), f"blocksize {blocksize}", blocksize=blocksize)


@pytest.mark.parametrize("how", [dict(blocksize=96), dict(blocksize=16), dict(blocksize=8192), dict(quant_type="int8"), dict(quant_type="int4")])
def test_what_bitsandbytes_has_not(how): refused(tiny(), "take backend=\"torch\"", backend="bitsandbytes", **how)


def test_unknown_names():
    refused(tiny(), "quant_type 'nf3': there are nf4, fp4, int4, int8", quant_type="nf3")
    refused(tiny(), "there are", quant_type="dynamic8")
    refused(tiny(), "backend 'cuda': there are torch, bitsandbytes", backend="cuda")


def test_no_layer():
    refused(tiny(), "matches no linear layer. This model has: q_proj", target=["query"])
    refused(nn.Sequential(nn.ReLU()), "no nn.Linear at all")
    torch.manual_seed(0)
    refused(AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2)), "matches no linear layer")
    with pytest.raises(ValueError, match="no layer of this model is quantised"): dequantize(tiny())


def test_meta():
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    with pytest.raises(ValueError, match="q_proj has no weights yet"): quantize(model)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_shared_weight(): refused(tiny("tied"), "lm_head shares its weight", target=["lm_head"])


def test_odd_kinds_of_linear():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    refused(model, "self_attn.out_proj is a NonDynamicallyQuantizableLinear")
    quantize(model, ["linear1", "linear2"])


def test_merged_adapter():
    model = lora.merge(stir(lora.add_lora(tiny(), r=2)))
    refused(model, r"unmerge\(model\) first")
    quantize(lora.unmerge(model))   # under the adapters, too


def test_bitsandbytes_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = tiny()
    before = state(model)
    with pytest.raises(ImportError, match="pip install bitsandbytes.*backend=\"torch\""): quantize(model, backend="bitsandbytes")
    assert same_state(state(model), before)
    quantize(model)


# Memory

@in_own_process
def test_peak_memory_of_a_step():
    "Twelve layers of 1024 x 1024: float 50 MB, in 4 bits 6.5 MB, and one float weight (4 MB) at a time"
    import ctypes, gc
    from ftcourse.runtime import Meter
    if sys.platform != "linux": pytest.skip("needs /proc")
    try: ctypes.CDLL(None).mallopt(-3, 2**18)   # M_MMAP_THRESHOLD: what is freed goes back at once, so that the peak is what was held
    except (OSError, AttributeError): pytest.skip("needs glibc")
    def peak(model):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with Meter() as idle: pass
        with Meter() as m: model(randn(8, 1024).requires_grad_()).sum().backward()
        return m.peak_bytes - idle.peak_bytes, idle.peak_bytes
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(12))).requires_grad_(False)
    peak(model)   # whatever the first run allocates for good
    extra, idle = peak(model)
    quantize(model)
    peak(model)
    extra4, idle4 = peak(model)
    assert idle - idle4 > .7*12*4*2**20, (idle, idle4)      # most of the 43.5 MB
    assert extra4 < extra + 3*4*2**20, (extra, extra4)      # two float weights at once, and never twelve


@pytest.mark.cuda
def test_cuda_uses_bitsandbytes():
    model, x = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64)).cuda(), randn(5, 512).cuda()
    ours = quantize(copy.deepcopy(model), backend="torch")
    theirs = quantize(model)
    assert isinstance(theirs[0], bitsandbytes.nn.Linear4bit) and isinstance(ours[0], QuantLinear)
    same = unpack(ours[0].weight, 512*256) == unpack(theirs[0].weight.flatten(), 512*256)
    assert same.float().mean() > .999   # the GPU may round a tie the other way
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-2, atol=1e-2)
    assert isinstance(quantize(nn.Sequential(nn.Linear(64, 64)).cuda(), quant_type="int8")[0], QuantLinear)
    lora.add_lora(theirs, r=4)(x).sum().backward()
