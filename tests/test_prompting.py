"Fast answers are the slow answers: whatever the batch, the shared beginning, and the architecture"
import random, warnings
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM
from ftcourse import corpora, formats, models, prompting
from ftcourse.formats import render
from shallow import shallow
from ftcourse.prompting import answer, cost, generate, left_pad, pick_shots, request, shared_prefix

NEW = 6


@pytest.fixture(scope="module")
def m32(): return shallow(12, dtype=torch.float32)

@pytest.fixture(scope="module")
def whole(): return models.load(dtype=torch.float32)[0]

@pytest.fixture(scope="module")
def tok(): return models.load()[1]

@pytest.fixture(scope="module")
def desk(): return {s: corpora.load("desk", s) for s in ("train", "test")}


def theirs(model, tok, prompt, n=NEW):
    "One row through the `generate` of transformers, greedy"
    ids = tok(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=n, do_sample=False, repetition_penalty=1.0)
    return tok.decode(out[0, ids.input_ids.shape[1]:], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def real(m32, tok, desk):
    "22 requests of very different lengths, and the reference's answers"
    test, pool = desk["test"], desk["train"]
    rows = [r for r in test if r["task"] == "route"][::14][:10]
    msgs = [request(r) for r in rows[:6]]                                                       # long instruction
    msgs += [request({**r, "instruction": "Reply briefly."}) for r in rows]                     # short one
    msgs += [[{"role": "user", "content": c}] for c in ("Hi", "What is 2+2?", "Name a colour.", "Bonjour, ça va ?")]
    msgs += [request(rows[0], pick_shots(pool, "route", 2)), request(rows[1], pick_shots(pool, "route", 3))]
    prompts = [render(m, tok, True) for m in msgs]
    return prompts, [theirs(m32, tok, p) for p in prompts]


def test_answers_are_those_of_transformers(m32, tok, real):
    prompts, want = real
    lengths = [len(i) for i in tok(prompts, add_special_tokens=False).input_ids]
    assert len(prompts) >= 20 and max(lengths) > 4*min(lengths) and len(set(want)) > 6
    assert generate(m32, tok, prompts, NEW) == want


@pytest.mark.parametrize("size", [1, 5])
def test_the_batch_changes_nothing(m32, tok, real, size):
    prompts, want = real[0][4::2], real[1][4::2]
    assert generate(m32, tok, prompts, NEW, batch_size=size) == want


def test_the_shared_beginning_changes_nothing(m32, tok, real, monkeypatch):
    prompts, want = real
    group = prompts[:6]
    toks = tok(group, add_special_tokens=False).input_ids
    assert shared_prefix(toks) > 20
    assert generate(m32, tok, group, NEW) == want[:6]
    for n in (0, 1, 7):
        monkeypatch.setattr(prompting, "shared_prefix", lambda ps, n=n: n)
        assert generate(m32, tok, group[:3], NEW) == want[:3]


def test_order_is_kept(m32, tok, real):
    prompts, want = real
    mixed = list(range(6, 20))
    random.Random(0).shuffle(mixed)
    assert generate(m32, tok, [prompts[i] for i in mixed], NEW, batch_size=4) == [want[i] for i in mixed]


def test_one_prompt_identical_prompts_and_none(m32, tok, real):
    p, want = real[0][7], real[1][7]
    assert generate(m32, tok, [p], NEW) == [want] and generate(m32, tok, [p]*3, NEW) == [want]*3
    assert generate(m32, tok, [], NEW) == []


def test_a_prompt_that_another_one_begins_with(m32, tok):
    long = render([{"role": "user", "content": "Name a colour of the rainbow."}], tok, True)
    ids = tok(long, add_special_tokens=False).input_ids
    ps = [tok.decode(ids[:k]) for k in (len(ids)//2, len(ids)-3, len(ids))]
    assert generate(m32, tok, ps, NEW) == [theirs(m32, tok, p) for p in ps]


@pytest.mark.parametrize("n", [0, 1])
def test_very_short_answers(m32, tok, real, n):
    out = generate(m32, tok, real[0][6:9], n)
    assert out == ["", "", ""] if n == 0 else out == [theirs(m32, tok, p, 1) for p in real[0][6:9]]


# ---------- stopping

def test_an_answer_stops_at_the_end_token_and_the_others_go_on(whole, tok, real):
    "The whole model: one that is cut never comes to an end"
    ps = real[0][16:19] + real[0][6:7]   # greetings and sums end soon, a reply to a customer doesn't
    got, want = generate(whole, tok, ps, 16), [theirs(whole, tok, p, 16) for p in ps]
    long = [len(tok(a, add_special_tokens=False).input_ids) >= 15 for a in want]
    assert any(long) and not all(long)
    assert got == want and not any(t in a for a in got for t in tok.all_special_tokens)


def test_every_end_token_of_the_model_ends_an_answer(whole, tok, real):
    "Gemma ends a turn with <end_of_turn>, Phi-3 with <|end|>: the list stands in generation_config, not in the tokenizer"
    p = real[0][8]
    said = tok(theirs(whole, tok, p), add_special_tokens=False).input_ids
    was = whole.generation_config.eos_token_id
    whole.generation_config.eos_token_id = [tok.eos_token_id, said[2]]
    try: assert generate(whole, tok, [p], NEW)[0] == tok.decode(said[:2]).strip()
    finally: whole.generation_config.eos_token_id = was


# ---------- other architectures, small and random

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TINY = {"llama": {}, "qwen2": {}, "qwen3": dict(head_dim=8), "mistral": dict(head_dim=8, sliding_window=None), "gemma": dict(head_dim=8, tie_word_embeddings=False),
        "cohere": {}, "mistral, window 24": dict(head_dim=8, sliding_window=24), "gemma2, window 16": dict(head_dim=8, sliding_window=16, tie_word_embeddings=False),
        "gemma3_text, window 16": dict(head_dim=8, sliding_window=16, tie_word_embeddings=False)}


def tiny(name, tok):
    torch.manual_seed(0)
    conf = AutoConfig.for_model(name.split(",")[0], vocab_size=len(tok), **SIZE, **TINY[name], bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model = AutoModelForCausalLM.from_config(conf).float().eval()
    with torch.no_grad():   # sharpen what it says, or all answers are one word
        for p in model.parameters():
            if p.dim() > 1: p.mul_(6)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tok.eos_token_id, tok.pad_token_id
    return model


@pytest.mark.parametrize("name", TINY)
def test_other_architectures(tok, desk, name):
    "Long shared beginning, then rows that are longer and shorter than a sliding window"
    model = tiny(name, tok)
    rows = [r for r in desk["test"] if r["task"] == "answer"][:8]
    ps = [render(request(r), tok, True) for r in rows] + [render(request({**rows[0], "input": "Late?"}), tok, True)]
    want = [theirs(model, tok, p) for p in ps]
    assert len(set(want)) > 1
    for size in (1, 4): assert generate(model, tok, ps, NEW, batch_size=size) == want, size


# ---------- the pieces

@pytest.mark.parametrize("prompts,n", [([[1, 2, 3], [1, 2, 4]], 2), ([[1], [2]], 0), ([[1, 2, 3]], 2), ([[1, 2]]*3, 1),
                                       ([[1, 2], [1, 2, 3]], 1), ([[5, 1], [5, 2], [6, 1]], 0), ([[1, 9], [1, 1, 1], [1, 5]], 1)])
def test_shared_prefix(prompts, n): assert shared_prefix(prompts) == n


def test_shared_prefix_against_the_obvious_way():
    rng = random.Random(0)
    for _ in range(300):
        ps = [[rng.randrange(2) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 5))]
        n = 0
        while n < min(map(len, ps)) - 1 and len({p[n] for p in ps}) == 1: n += 1
        assert shared_prefix(ps) == n


def test_left_pad():
    ids, mask, pos = left_pad([[7, 8, 9], [5]], 2, 0, "cpu")
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]] and mask.tolist() == [[1]*5, [1, 1, 0, 0, 1]]
    assert pos[0].tolist() == [2, 3, 4] and pos[1, -1] == 2


def test_limits_warn_of_answers_that_they_would_cut(tok):
    from datasets import Dataset
    rows = Dataset.from_list([dict(task="t", output="word "*n, input="", instruction="I") for n in (5, 30, 40)])
    with pytest.warns(UserWarning, match="t: 2 of 3 answers .* longer than 20 tokens .*raise max_new_tokens"):
        assert prompting.limits(rows, tok, 20) == {"t": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 40 < prompting.limits(rows, tok)["t"] < 60


def test_a_prompt_beyond_the_context_is_refused(m32, tok, monkeypatch):
    monkeypatch.setattr(m32.config, "max_position_embeddings", 20)
    with pytest.raises(ValueError, match="more than the 20 that this model reads; give fewer examples"):
        generate(m32, tok, ["word "*18], 4)


# ---------- examples in the prompt

def test_request_of_shots_and_hint():
    row = dict(instruction="I", input="Q", output="never shown", task="t")
    shot = dict(instruction="I", input="q", output="a", task="t")
    got = request(row, [shot], "One of: x")
    assert [m["role"] for m in got] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in got] == ["I One of: x", "q", "a", "Q"]
    bare = request({**row, "input": ""}, [{**shot, "input": "", "instruction": "i"}])
    assert [m["content"] for m in bare] == ["i", "a", "I"]
    other = request(row, [shot, {**shot, "instruction": "Translate."}])   # would otherwise seem to follow "I"
    assert [m["content"] for m in other] == ["I", "q", "a", "Translate.\n\nq", "a", "Q"]


def test_shots_are_rows_of_the_pool_with_different_answers(desk):
    rows = [r for r in desk["train"] if r["task"] == "route"]
    for seed in range(4):
        got = pick_shots(desk["train"], "route", 5, seed)
        assert all(g in rows for g in got) and len({g["output"] for g in got}) == 5
    assert pick_shots(desk["train"], "route", 5, 1) == pick_shots(desk["train"], "route", 5, 1) != pick_shots(desk["train"], "route", 5, 2)
    every = pick_shots(desk["train"], "route", 12)
    assert len({g["output"] for g in every}) == 12


def test_shots_of_a_small_pool():
    pool = [dict(task="t", output=o, input=str(i), instruction="I") for i, o in enumerate("aaab")]
    got = pick_shots(pool, "t", 4)
    assert sorted(r["input"] for r in got) == ["0", "1", "2", "3"] and {r["output"] for r in got[:2]} == {"a", "b"}
    assert pick_shots(pool, "t", 0) == []
    with pytest.raises(ValueError, match="5 examples of 't' are asked for, and the pool has 4"): pick_shots(pool, "t", 5)
    with pytest.raises(ValueError, match="'other'"): pick_shots(pool, "other", 1)


def test_a_pool_of_forty_thousand_rows_takes_a_moment():
    import time
    pool = [dict(task="t", output=f"answer {i}", input="x", instruction="I") for i in range(40_000)]
    start = time.process_time()
    pick_shots(pool, "t", 5)
    assert time.process_time() - start < 2


def test_no_test_row_is_ever_shown(tok, desk, monkeypatch):
    "Look at every prompt that `answer` sends"
    seen = []
    monkeypatch.setattr(prompting, "generate", lambda m, t, texts, *a, **k: (seen.extend(texts), [""]*len(texts))[1])
    ask = desk["test"].select(range(0, len(desk["test"]), 25))
    model = torch.nn.Linear(1, 1)
    answer(model, tok, ask, shots=3, pool=desk["train"])
    assert len(seen) == len(ask)
    for text in seen: assert sum(r["input"] in text for r in ask) == 1
    outs = {r["output"] for r in ask if r["task"] == "answer"} - set(desk["train"]["output"])
    assert outs and not any(o in t for o in outs for t in seen)


# ---------- a whole test set

def test_answer_goes_by_task_keeps_the_order_and_the_mode(tok, desk):
    model = tiny("llama", tok).train()
    ask = desk["test"].select([0, len(desk["test"])-1, 1, len(desk["test"])-2])
    assert len(set(ask["task"])) == 2 and ask["task"][0] != ask["task"][1]
    got = answer(model, tok, ask, max_new_tokens=NEW)
    assert model.training
    model.eval()
    assert got == [theirs(model, tok, render(request(r), tok, True)) for r in ask]
    changed = ask.map(lambda r: {"output": "something else", "references": ["something else"]})
    assert answer(model, tok, changed, max_new_tokens=NEW) == got   # the right answers are not looked at


def test_answer_of_no_rows_and_without_a_pool(tok, desk):
    model = tiny("llama", tok)
    assert answer(model, tok, desk["test"].select([])) == []
    with pytest.raises(ValueError, match="shots=3 needs a pool"): answer(model, tok, desk["test"], shots=3)


def test_the_mode_comes_back_after_an_error(tok, desk):
    model = tiny("llama", tok).train()
    with pytest.raises(ValueError): answer(model, tok, desk["test"], shots=3, pool=desk["train"].select(range(2)))
    assert model.training


def test_hints_reach_their_task_alone(tok, desk, monkeypatch):
    seen = {}
    monkeypatch.setattr(prompting, "generate", lambda m, t, texts, n, b, d: (seen.update({d: texts}), [""]*len(texts))[1])
    answer(torch.nn.Linear(1, 1), tok, desk["test"].select([0, len(desk["test"])-1]), hints={"route": "XYZZY"})
    assert {d.split(",")[0]: "XYZZY" in t[0] for d, t in seen.items()} == {"route": True, "answer": False}


def test_cost_counts_tokens(tok, desk):
    ask, said = desk["test"].select([0, 1, len(desk["test"])-1]), ["one two", "three", "four five six"]
    n = lambda s: len(tok(s, add_special_tokens=False).input_ids)
    c = cost(tok, ask, said)
    assert c.prompt == pytest.approx(sum(n(render(request(r), tok, True)) for r in ask)/3)
    assert c.answer == pytest.approx(sum(map(n, said))/3)
    more = cost(tok, ask, said, shots=2, pool=desk["train"])
    assert more.prompt > c.prompt + 20 and more.answer == c.answer
    assert cost(tok, ask, said, hints={"route": "word "*50}).prompt > c.prompt + 20
