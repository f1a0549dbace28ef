"The planner: counts, autograd's account, the ledger, plans, cards, bad input, and predicted against measured peaks"
import math, time, warnings
import pytest
import torch
from hypothesis import Phase, given, settings as hypothesis_settings, strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from ftcourse import memory
from ftcourse.lora import add_lora
from ftcourse.memory import (ARCHITECTURES, GPU, GPUS, Ledger, Plan, architecture, card_table, changes, cost, fits, largest_batch,
                             make_fit, measure, on_meta, plan, plan_html, planner, planner_html, play, shorten, state_bytes, suggest, trace)
from ftcourse.training import layers_of

TINY = dict(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=500,
            max_position_embeddings=4096)


def tiny(kind="llama", **over): return AutoConfig.for_model(kind, **{**TINY, **over})


def parts(p): return {k: round(v) for k, v in p.parts.items()}


# Counting

KNOWN = {"SmolLM2-135M": 134_515_008, "GPT-2": 124_439_808, "Qwen2.5-0.5B": 494_032_768, "SmolLM2-1.7B": 1_711_376_384,
         "Llama-3.2-3B": 3_212_749_824, "Llama-2-7B": 6_738_415_616, "Mistral-7B": 7_248_023_552, "Qwen2.5-7B": 7_615_616_512,
         "Llama-3.1-8B": 8_030_261_248, "LLaMA-65B": 65_285_660_672, "Llama-3.1-70B": 70_553_706_496}   # as on the models' pages

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_are_those_of_the_published_models(name):
    assert on_meta(architecture(name), attention="eager").num_parameters() == KNOWN[name]


def test_adapter_of_a_70b():
    model = add_lora(on_meta(architecture("Llama-3.1-70B"), attention="eager"), r=8, target=["q_proj", "v_proj"])
    by_hand = 80*8*((8192 + 8192) + (8192 + 1024))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == by_hand == plan("Llama-3.1-70B", target=["q_proj", "v_proj"]).trainable


def test_add_lora_on_a_7b_takes_under_a_second():
    model = on_meta(architecture("Mistral-7B"))
    start = time.process_time()
    add_lora(model, r=16)
    assert time.process_time() - start < 1


def test_a_70b_plan_takes_under_two_seconds_and_allocates_nothing():
    plan("SmolLM2-135M")   # imports
    took = []
    for _ in range(3):   # the best of three: a neighbour on the same core slows one down
        memory._remembered.clear()
        start = time.process_time()
        p = plan("Llama-3.1-70B", length=2048, batch=4, checkpointing=True, quantization="nf4-double")
        took.append(time.process_time() - start)
        if took[-1] < 2: break
    assert min(took) < 6, took   # 1.5 s alone; `make bench` prints it
    assert 38e9 < p.parts["weights"] < 42e9


def test_names_configurations_and_nonsense():
    assert plan(tiny()).total == plan(tiny()).trainable + AutoModelForCausalLM.from_config(tiny()).num_parameters()
    assert plan("Qwen3-0.6B").setting.model.model_type == "qwen3"
    with pytest.raises(ValueError, match="Llama-3.1-70B"): architecture("no-such-model")
    c = tiny()
    plan(c, batch=2)
    assert c.to_dict() == tiny().to_dict()   # left alone


# The ledger against real tensors

@pytest.mark.parametrize("kind, r, dtype", [("llama", 4, torch.float32), ("llama", None, torch.float32), ("qwen2", 4, torch.float32),
                                            ("mistral", None, torch.bfloat16), ("gpt2", None, torch.float32)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_meta_and_cpu_keep_the_same(kind, r, dtype, checkpointing):
    "The same ledger under a real step: what is alive at each layer's door, to within the few bytes of masks and counters"
    config = tiny(kind) if kind != "gpt2" else AutoConfig.for_model("gpt2", n_embd=64, n_layer=4, n_head=4, vocab_size=500, attn_pdrop=0.)
    real = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    fake = on_meta(config, dtype)
    if r: add_lora(real, r=r), add_lora(fake, r=r)
    doors = []
    for model, device in ((real, "cpu"), (fake, "meta")):
        seen, ledger = [], Ledger()
        hooks = [l.register_forward_pre_hook(lambda *_: seen.append(ledger.live)) for l in layers_of(model)]
        ids = torch.zeros(2, 64, dtype=torch.long, device=device)
        with memory.checkpointed(model, checkpointing), ledger: model(input_ids=ids, labels=ids, use_cache=False)
        for h in hooks: h.remove()
        doors.append([b - a for a, b in zip(seen, seen[1:])][1:])
    assert doors[0] == pytest.approx(doors[1], rel=.02)


def test_a_view_and_an_in_place_change_cost_nothing():
    x = torch.ones(100, device="meta")
    with Ledger() as ledger:
        y = x.view(10, 10).t()
        x.add_(1)
        assert ledger.live == 0
        z = y + 1
        assert ledger.live == 400
        del z
        assert ledger.live == 0 and ledger.peaks["loss"] == 400


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("r", [4, None])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_a_short_model_speaks_for_the_long_one(kind, r, checkpointing):
    "Three layers played and the rest added, against all twelve played"
    config = tiny(kind, num_hidden_layers=12)
    p = plan(config, r=r, batch=3, length=64, dtype=torch.float32, checkpointing=checkpointing)
    whole = on_meta(config, torch.float32)
    if r: add_lora(whole, r=r)
    ledger, doors = play(whole, 3, 64, checkpointing)
    got = p.moments["loss"]["activations"] + p.moments["loss"]["logits and workspace"]
    assert got == pytest.approx(max(ledger.peaks["loss"], ledger.peaks["last layer"]), rel=.02)
    last = p.moments["backward"]
    trained = sum(q.nbytes for q in whole.parameters() if q.requires_grad)
    assert last["gradients"] == trained
    assert last["gradients"] + last["logits and workspace"] == pytest.approx(ledger.peaks["backward"], rel=.1)


def test_layers_of_several_kinds():
    "A model whose layers differ: each kind is played"
    model = on_meta(tiny("qwen2", num_hidden_layers=7), torch.float32)
    layers_of(model)[3].mlp.down_proj = nn.Linear(128, 64, bias=True, device="meta")
    gone = shorten(model)
    assert len(layers_of(model)) == 4 and len(gone) == 3


# Plans

SIZES = dict(r=st.sampled_from([1, 2, 8, 16]), batch=st.integers(1, 9), length=st.sampled_from([16, 33, 64, 128]),
             dtype=st.sampled_from([torch.float32, torch.bfloat16]), attention=st.sampled_from(["fused", "math"]),
             loss=st.sampled_from(["plain", "chunked"]), optimizer=st.sampled_from(["adamw", "adamw8bit", "sgd"]),
             checkpointing=st.booleans())
some = hypothesis_settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@some
@given(st.fixed_dictionaries(SIZES))
def test_more_costs_more(s):
    p = plan(tiny(), **s)
    assert plan(tiny(), **{**s, "batch": s["batch"] + 1}).bytes > p.bytes
    assert plan(tiny(), **{**s, "length": 2*s["length"]}).bytes > p.bytes
    assert plan(tiny(), **{**s, "r": 2*s["r"]}).bytes > p.bytes
    assert plan(tiny(), **{**s, "batch": s["batch"] + 1}).seconds > p.seconds
    assert all(v >= 0 and math.isfinite(v) for m in p.moments.values() for v in m.values())


@some
@given(st.fixed_dictionaries(SIZES))
def test_fewer_bits_cost_less_and_checkpointing_never_keeps_more(s):
    weights = [plan(tiny(), **{**s, "dtype": torch.bfloat16, "quantization": q}).parts["weights"] for q in (None, "8bit", "nf4", "nf4-double")]
    assert weights == sorted(weights, reverse=True) and len({*weights}) == 4
    off, on = (plan(tiny(), **{**s, "checkpointing": c}) for c in (False, True))
    assert on.kept <= off.kept and on.seconds > off.seconds
    assert plan(tiny(), **{**s, "optimizer": "sgd"}).bytes <= plan(tiny(), **{**s, "optimizer": "adamw8bit"}).bytes <= plan(tiny(), **{**s, "optimizer": "adamw"}).bytes


def test_bits_per_weight_are_the_papers():
    linear = trace(plan("Llama-2-7B").setting)[0].linear
    bits = {q: (plan("Llama-2-7B", quantization=q).parts["weights"] - plan("Llama-2-7B", quantization="8bit").parts["weights"])*8/linear + 8
            for q in ("nf4", "nf4-double")}
    assert bits["nf4"] == pytest.approx(4.5) and bits["nf4-double"] == pytest.approx(4 + .127, abs=1e-3)


def test_full_fine_tuning_in_float32_is_sixteen_bytes_a_parameter():
    p = plan(tiny(), r=None, dtype=torch.float32)
    step = p.moments["step"]
    assert sum(step.values()) == 16*p.total == 16*p.trainable
    assert step["optimizer"] == 2*step["gradients"] == 2*step["weights"]


def test_autocast_holds_a_second_copy_until_the_backward_pass():
    mixed, plain = plan(tiny(), r=None), plan(tiny(), r=None, trained=torch.bfloat16)
    c = trace(mixed.setting)[0]
    assert {k: m["weights"] - 4*mixed.total for k, m in mixed.moments.items()} == {
        "loss": 2*(c.linear + c.head), "backward": 0, "step": 0}
    assert {m["weights"] for m in plain.moments.values()} == {2*plain.total}


def test_copies_of_autocast_as_pytorch_makes_them():
    "They live from the forward pass until the layer's gradient is there"
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    ledger, one = Ledger(), 64*64
    with ledger, torch.autocast("cpu", torch.bfloat16): loss = model(torch.randn(4, 64)).float().sum()
    held = ledger.live
    assert 7*one*2 <= held < 8*one*2 + 20_000      # the first needs none: its input is no parameter's work
    with ledger: loss.backward()
    del loss
    assert ledger.live <= 8*one*4          # the gradients have come, the copies are gone


@pytest.mark.parametrize("length,batch", [(16, 5), (16, 8), (16, 21), (64, 1), (64, 5)])
def test_a_batch_of_few_tokens_with_the_loss_in_chunks(length, batch):
    "The line through small batches equals the batch itself"
    p = plan(tiny(), batch=batch, length=length, loss="chunked")
    direct = memory._trace(p.setting)[1][0]
    assert list(trace(p.setting)[1]) == pytest.approx(list(direct), rel=.01)


def test_a_smaller_micro_batch_keeps_the_rows_of_a_step():
    for batch in (2, 3, 5, 6, 9, 35):
        for what, s, same in changes(plan(tiny(), batch=batch, accumulate=2).setting):
            if same: assert s.batch*s.accumulate == 2*batch, what
    words = {b: [what for what, *_ in changes(plan(tiny(), batch=b).setting)] for b in (1, 2, 3)}
    assert "half the batch, accumulated twice as often" in words[2]
    assert "1/3 of the batch, accumulated 3 times as often" in words[3]
    assert not any("batch" in what for what in words[1])


@pytest.mark.parametrize("r", [None, 4])
def test_operations_are_those_that_pytorch_counts(r):
    from torch.utils.flop_counter import FlopCounterMode
    p = plan(tiny(), r=r, batch=2, length=32, attention="math", dtype=torch.float32)
    model = on_meta(tiny(), torch.float32, "meta_math")
    if r: add_lora(model, r=r)
    ids = torch.zeros(2, 32, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter: model(input_ids=ids, labels=ids).loss.backward()
    assert p.flops == pytest.approx(counter.get_total_flops(), rel=.06 if r else 1e-9)   # it leaves `addmm_` out


def test_an_adapted_output_layer_counts_once():
    model = add_lora(on_meta(tiny(), attention="eager"), r=2, target=r".*(q_proj|lm_head)")
    plain = on_meta(tiny(), attention="eager")
    a, b = memory.count_parameters(model), memory.count_parameters(plain)
    assert (a.linear, a.head) == (b.linear, b.head)


def test_small_tensors_keep_their_state_in_32_bits():
    assert state_bytes("adamw8bit", [100, 4096], 4) == 800 + round(2*4096*(1 + 4/256)) and state_bytes("sgd", [100], 4) == 0
    assert state_bytes("adamw", [100], 2) == 400


def test_accumulation_holds_gradients_at_the_loss_and_takes_as_long_as_its_parts():
    one, two = plan(tiny(), batch=2), plan(tiny(), batch=2, accumulate=3)
    assert two.moments["loss"]["gradients"] == one.moments["step"]["gradients"]
    assert two.seconds == pytest.approx(3*one.seconds) and two.tokens_per_s == pytest.approx(one.tokens_per_s)


def test_flops_are_six_a_weight_or_four():
    full, lora = plan("Llama-3.1-8B", r=None, length=16), plan("Llama-3.1-8B", r=1, length=16)
    body = trace(full.setting)[0].linear + trace(full.setting)[0].head
    assert full.flops/(16*body) == pytest.approx(6, rel=.01) and lora.flops/(16*body) == pytest.approx(4, rel=.01)
    again = plan("Llama-3.1-8B", r=1, length=16, checkpointing=True)
    assert again.flops/(16*body) == pytest.approx(6, rel=.1)


# Cards

def test_the_largest_batch_fits_and_one_more_does_not():
    p = plan("SmolLM2-1.7B", length=1024)
    for gpu in GPUS:
        b = largest_batch(p, gpu)
        assert b >= 1 and fits(plan("SmolLM2-1.7B", length=1024, batch=b), gpu) and not fits(plan("SmolLM2-1.7B", length=1024, batch=b+1), gpu)
    assert largest_batch(plan("Llama-3.1-70B"), "T4") == 0


def test_suggestions_save_what_they_say():
    p = plan("SmolLM2-1.7B", r=None, batch=4, length=1024)
    found = suggest(p, "T4")
    assert found and all(d["saves"] == pytest.approx(p.needs - d["plan"].needs) and d["saves"] > 0 for d in found)
    assert [d["saves"] for d in found] == sorted((d["saves"] for d in found), reverse=True)
    steps, q = make_fit(p, "T4")
    assert fits(q, "T4") and steps and p.needs - sum(d["saves"] for d in steps) == pytest.approx(q.needs)
    assert make_fit(q, "T4") == ([], q)
    assert not any(w == "frozen weights in 4 bits" for w, *_ in changes(p.setting))
    steps, q = make_fit(plan(tiny(), length=64), GPU("clock", .1, 1, 0))   # nothing helps, and it says so
    assert not fits(q, GPU("clock", .1, 1, 0))


def test_table_and_cost():
    rows = card_table(plan(tiny()), ["T4", GPU("mine", 24, 165, .4)])
    assert [r["card"] for r in rows] == ["T4", "mine"] and all(r["fits"] for r in rows)
    p = plan(tiny(), gpu=GPU("mine", 24, 100, 2.), efficiency=.5)
    c = cost(p, 1e6, epochs=3)
    assert c["hours"] == pytest.approx(3e6/p.tokens_per_s/3600) and c["dollars"] == pytest.approx(2*c["hours"])
    assert memory.this_machine().gib > 1


# Bad input

@pytest.mark.parametrize("wrong, says", [
    (dict(batch=-1), "batch = -1.*from 1"), (dict(batch=0), "batch"), (dict(batch=1.5), "batch"), (dict(batch=True), "batch"),
    (dict(length=0), "length"), (dict(accumulate=0), "accumulate"), (dict(r=0), "None for full"), (dict(r=-2), "r = -2"),
    (dict(r=1000), "rank lies between"), (dict(optimizer="adam"), "'adamw8bit'"), (dict(quantization="int4"), "'nf4-double'"),
    (dict(attention="flash"), "'fused'"), (dict(loss="full"), "'chunked'"), (dict(dtype="bf16"), "torch.bfloat16"),
    (dict(dtype=torch.int8), "dtype"), (dict(target=["nothing"]), "matches no linear layer.*q_proj"),
    (dict(r=None, quantization="nf4"), "can't be trained"), (dict(gpu="K80"), "T4"), (dict(efficiency=0), "efficiency"),
    (dict(efficiency=1.2), "efficiency")])
def test_bad_input_names_field_and_remedy(wrong, says):
    with pytest.raises(ValueError, match=says): plan(tiny(), **wrong)


def test_too_long_a_row_is_warned_of():
    with pytest.warns(UserWarning, match="at most 4096 tokens"): plan(tiny(), length=4097)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(tiny(), length=4096)


def test_a_model_that_cannot_be_played_says_so():
    with pytest.raises(ValueError, match="mixture of experts"): plan(tiny("mixtral"))


# Looks

def test_html_and_plot():
    p = plan(tiny())
    assert isinstance(p, Plan) and "at the loss" in plan_html(p) and p._repr_html_() == plan_html(p)
    ax = memory.plot_plans({"a": p, "b": plan(tiny(), batch=3)}, ("T4",))
    assert ax.get_xlabel() and len(ax.patches) >= 8
    import matplotlib.pyplot as plt
    plt.close("all")


def test_the_sliders_move_the_plan():
    ui = planner("SmolLM2-135M")
    controls, out = ui.children
    by_name = {w.description: w for w in controls.children}
    before = out.value
    assert "fits on one RTX 4090" in before
    by_name["batch"].value = 7
    assert out.value != before
    by_name["method"].value = "full"
    assert "of 134,515,008 parameters" in out.value
    by_name["model"].value = "GPT-2"
    by_name["length"].value = 2048
    assert "at most 1024 tokens" in out.value and "124,439,808" in out.value
    assert "does not fit" in planner_html("Llama-3.1-70B", "full", 8, 1, 512, False, "plain", "adamw", "T4")


# Predicted against measured

def test_predicted_against_measured():
    "The bundled model, each setting in a process of its own; the lesson has two dozen"
    jobs = [dict(batch=1, length=64), dict(batch=2, length=128, checkpointing=True), dict(batch=1, length=64, r=None),
            dict(batch=1, length=128, loss="chunked")]
    for j in jobs: j["dtype"] = "float32"
    errors = [plan("SmolLM2-135M", **{**j, "dtype": torch.float32}).bytes/m["bytes"] - 1 for j, m in zip(jobs, measure(jobs))]
    assert sum(map(abs, errors))/len(errors) <= .10 and max(map(abs, errors)) <= .20, errors


def test_measuring_what_fails_says_why():
    with pytest.raises(RuntimeError, match="matches no linear layer"): measure([dict(target=["nothing"], dtype="float32")])
