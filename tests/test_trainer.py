"The twin trains as `fit` does: same losses, gradients, weights, counts, to rounding; names that move fail by name"
import copy, inspect, math, sys
import pytest, torch

for _package in ("accelerate", "peft"): pytest.importorskip(_package)
import peft, transformers
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from shallow import shallow
from ftcourse import corpora, lora, models, trainer, training
from ftcourse.formats import collate, encode_all
from ftcourse.runtime import seed_everything
from ftcourse.trainer import InOrder, Recorder, arguments, as_peft, build, engines, fit_trainer, make_trainer, need, take_back
from ftcourse.training import History, fit, windows

try: import trl
except ImportError: trl = None
needs_trl = pytest.mark.skipif(trl is None, reason="trl is not installed")
ENGINES = ["trainer", pytest.param("sft", marks=needs_trl)]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tok(): return models.load()[1]

@pytest.fixture(scope="module")
def rows(): return corpora.load("desk", "train", n=14)

@pytest.fixture(scope="module")
def encoded(rows, tok): return encode_all(rows, tok)


def base(seed=7):
    torch.manual_seed(seed)
    conf = AutoConfig.for_model("llama", vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model = AutoModelForCausalLM.from_config(conf).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.mul_(3)
    return model

def tiny(seed=0, **kw):
    model = base()
    seed_everything(seed)
    return lora.add_lora(model, **{**dict(r=4, alpha=8), **kw})

def weights(model): return torch.cat([p.detach().flatten() for p in lora.lora_parameters(model)])
def steps(h, key): return [s[key] for s in h.steps]

@torch.no_grad()
def logits(model, encoded, tok): return model.eval()(input_ids=collate(encoded[:3], tok.pad_token_id)["input_ids"]).logits

def randomise(model):
    with torch.no_grad():
        for m in lora.lora_layers(model).values(): m.lora_B.normal_(std=.3)
    return model


# ---------- names: drift fails here, by name

NAMES = {
    "transformers.TrainingArguments": """output_dir num_train_epochs max_grad_norm seed gradient_accumulation_steps logging_steps logging_nan_inf_filter
        save_strategy save_steps remove_unused_columns include_num_input_tokens_seen bf16 fp16 activation_checkpointing report_to disable_tqdm use_cpu
        per_device_train_batch_size per_device_eval_batch_size train_sampling_strategy auto_find_batch_size prediction_loss_only learning_rate
        lr_scheduler_type warmup_steps eval_strategy""",
    "transformers.Trainer": "model args train_dataset data_collator processing_class optimizers callbacks compute_loss_func preprocess_logits_for_metrics",
    "transformers.Trainer.train": "resume_from_checkpoint",
    "transformers.Trainer.get_train_dataloader": "self", "transformers.Trainer.add_callback": "callback", "transformers.Trainer.remove_callback": "callback",
    "transformers.TrainerCallback.on_train_begin": "args state control", "transformers.TrainerCallback.on_train_end": "args state control",
    "transformers.TrainerCallback.on_log": "args state control", "transformers.TrainerCallback.on_step_end": "args state control",
    "transformers.TrainerState": "global_step num_input_tokens_seen log_history",
    "peft.LoraConfig": "r lora_alpha lora_dropout target_modules task_type",
    "peft.get_peft_model": "model peft_config", "peft.get_peft_model_state_dict": "model", "peft.set_peft_model_state_dict": "model peft_model_state_dict",
    "peft.PeftModel.from_pretrained": "model model_id", "peft.PeftModel.get_base_model": "self",
    "trl.SFTTrainer": "model args train_dataset data_collator processing_class optimizers callbacks",
    "trl.SFTConfig": """output_dir num_train_epochs max_grad_norm seed gradient_accumulation_steps logging_steps logging_nan_inf_filter save_strategy
        save_steps remove_unused_columns include_num_input_tokens_seen bf16 fp16 activation_checkpointing report_to disable_tqdm use_cpu max_length
        dataset_kwargs assistant_only_loss completion_only_loss""",
}

@pytest.mark.parametrize("where,name", [(w, n) for w, names in NAMES.items() for n in names.split()])
def test_name(where, name):
    home, *path = where.split(".")
    if home == "trl" and trl is None: pytest.skip("trl is not installed")
    obj = {"transformers": transformers, "peft": peft, "trl": trl}[home]
    for part in path: obj = getattr(obj, part)
    version = sys.modules[home].__version__
    assert name in inspect.signature(obj).parameters, f"{home} {version}: {where} has no {name!r} any more"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_list_above_holds_every_name_that_is_used(engine):
    used = arguments(engine, ".", 1, 1, 1., 0, 0, None, False, True)
    listed = NAMES["trl.SFTConfig" if engine == "sft" else "transformers.TrainingArguments"].split()
    assert set(used) <= set(listed) and set(used) <= set(inspect.signature(engines(engine)[1]).parameters)


def test_build_names_what_has_moved():
    with pytest.raises(TypeError, match=r"TrainingArguments of transformers [\d.]+ has no argument 'evaluation_strategy' \(nearest: eval_strategy"):
        build(transformers.TrainingArguments, "x", evaluation_strategy="no")
    with pytest.raises(TypeError, match="LoraConfig of peft .*'zzzz'.*nothing like it"): build(peft.LoraConfig, zzzz=1)
    assert build(peft.LoraConfig, r=3).r == 3


@pytest.mark.parametrize("package,engine", [("peft", "trainer"), ("accelerate", "trainer"), ("trl", "sft")])
def test_a_missing_package_comes_with_its_remedy(package, engine, rows, tok, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    model = tiny()
    was = weights(model)
    with pytest.raises(ImportError, match=f"{package} not found.*pip install {package}, or train with training.fit"):
        fit_trainer(model, tok, rows.select(range(2)), engine=engine)
    assert torch.equal(weights(model), was)


def test_need_says_nothing_of_what_is_there():
    need("torch", "peft")
    with pytest.raises(ImportError, match="^no_a and no_b not found.*pip install no_a no_b"): need("torch", "no_a", "no_b")


# ---------- one adapter, two bodies

@pytest.mark.parametrize("kw", [{}, dict(target=["q_proj", "down_proj"]), dict(r=2, alpha=7), dict(target=r"model\.layers\.1\..*o_proj")])
def test_there_and_back(kw, encoded, tok):
    model = randomise(tiny(**kw))
    was = copy.deepcopy(model)
    twin = as_peft(model)
    assert (logits(twin, encoded, tok) - logits(model, encoded, tok)).abs().max() < 1e-4
    other = tiny(seed=3, **kw)
    assert take_back(twin, other) is other
    assert torch.equal(weights(other), weights(model)) and torch.equal(logits(other, encoded, tok), logits(model, encoded, tok))
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in zip(model.parameters(), was.parameters()))
    assert model.lora_config == was.lora_config


def test_frozen_weights_are_shared_and_the_trained_ones_are_not():
    model = tiny()
    twin = as_peft(model)
    own = {p.data_ptr(): p.requires_grad for p in model.parameters()}
    shared = [p for p in twin.parameters() if p.data_ptr() in own]
    assert not any(p.requires_grad or own[p.data_ptr()] for p in shared)
    assert sum(p.numel() for p in shared) == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert sum(p.numel() for p in twin.parameters() if p.requires_grad) == weights(model).numel()


def test_bf16_weights_keep_float32_adapters():
    model = lora.add_lora(base().to(torch.bfloat16), r=4)
    assert {p.dtype for p in as_peft(model).parameters() if p.requires_grad} == {torch.float32}


def test_what_does_not_arrive_is_an_error(monkeypatch):
    model = randomise(tiny())
    monkeypatch.setattr(peft, "set_peft_model_state_dict", lambda *a: None)
    with pytest.raises(ValueError, match="28 tensors did not arrive in peft, first base_model.model.model.layers.0"): as_peft(model)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="merged"): as_peft(lora.merge(tiny()))
    with pytest.raises(ValueError, match="no LoRA"): as_peft(base())
    with pytest.raises(ValueError, match="doesn't fit"): take_back(as_peft(tiny(r=2)), tiny(r=4))


def test_files_go_both_ways(tmp_path, encoded, tok):
    model = randomise(tiny())
    twin = as_peft(model)
    twin.save_pretrained(tmp_path/"theirs"); lora.save_adapter(model, tmp_path/"ours")
    assert torch.equal(logits(lora.load_adapter(base(), tmp_path/"theirs"), encoded, tok), logits(model, encoded, tok))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), tmp_path/"ours"), encoded, tok), logits(twin, encoded, tok))


# ---------- the order

def test_in_order_yields_the_windows(encoded):
    work = windows(encoded, 3, 300, 2, seed=1)
    order, n = InOrder(work, 3, 2), len(work)//3
    for e in range(3):
        order.set_epoch(e)
        assert list(order) == [b for w in work[e*n:(e+1)*n] for b in w] and len(list(order)) == len(order)


def test_in_order_refuses_what_trainer_cannot_do():
    with pytest.raises(ValueError, match="other than 2 batches"): InOrder([[[0]], [[1], [2]]], 1, 2)
    assert list(InOrder([[[0], [1]], [[2]]], 1, 2)) == [[0], [1], [2]]   # a last one with fewer is fine


# ---------- the same run

SAME = {"plain": dict(max_tokens=300), "uneven windows, two passes": dict(max_tokens=200, accumulate=4, epochs=2),
        "decay and hard clipping": dict(max_tokens=300, weight_decay=.5, clip=.01, lr=1e-2), "seed": dict(max_tokens=300, seed=5)}

def pair(rows, tok, engine, valid=None, model=tiny, theirs={}, **kw):
    a, b = model(), model()
    return a, fit(a, tok, rows, valid, **kw), b, fit_trainer(b, tok, rows, valid, engine=engine, **{**kw, **theirs})

@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", SAME)
def test_it_is_the_same_run(case, engine, rows, tok):
    a, ours, b, theirs = pair(rows, tok, engine, rows.select(range(4)), looks=3, **SAME[case])
    if "uneven" in case: assert len({len(w) for w in windows(encode_all(rows, tok), 2, 200, 4, 0)}) > 1
    for key, tol in dict(step=0, tokens=0, loss=1e-5, norm=1e-5, lr=1e-12).items():
        assert steps(ours, key) == pytest.approx(steps(theirs, key), abs=tol), key
    moved = (weights(a) - weights(tiny())).norm()
    assert moved > .01 and (weights(a) - weights(b)).norm() < .01*moved
    assert [v["step"] for v in ours.valid] == [v["step"] for v in theirs.valid]
    assert [v["loss"] for v in ours.valid] == pytest.approx([v["loss"] for v in theirs.valid], abs=1e-4)
    assert (ours.tokens, ours.supervised, ours.trainable) == (theirs.tokens, theirs.supervised, theirs.trainable)


def test_another_order_would_be_seen(rows, tok):
    a, b = tiny(), tiny()
    one, two = fit(a, tok, rows, max_tokens=300), fit_trainer(b, tok, rows, max_tokens=300, seed=1)
    assert max(abs(x - y) for x, y in zip(steps(one, "loss"), steps(two, "loss"))) > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_bundled_model_in_float32(engine, rows, tok):
    def model():
        seed_everything(0)
        return lora.add_lora(shallow(dtype=torch.float32), r=8, alpha=16)
    some = sorted(rows, key=lambda r: len(r["input"] + r["output"]))[:4]
    a, ours, b, theirs = pair(some, tok, engine, model=model, max_tokens=128, accumulate=2)
    # Adam's first step turns rounding near zero into whole steps, and processors round differently
    assert len(ours.steps) >= 2 and steps(ours, "loss") == pytest.approx(steps(theirs, "loss"), rel=1e-4)
    assert steps(ours, "norm") == pytest.approx(steps(theirs, "norm"), rel=1e-3)
    assert (weights(a) - weights(b)).norm() < .03*(weights(a) - weights(model())).norm()


def test_bundled_model_in_bf16(rows, tok):
    def model():
        seed_everything(0)
        return lora.add_lora(shallow(dtype=torch.bfloat16), r=8, alpha=16)
    some = sorted(rows, key=lambda r: len(r["input"] + r["output"]))[:2]
    _, ours, _, theirs = pair(some, tok, "trainer", model=model, max_tokens=128)
    assert steps(ours, "loss") == pytest.approx(steps(theirs, "loss"), rel=.02)


def test_a_naive_mean_of_means_would_be_seen(rows, encoded, tok, tmp_path):
    "What the twin's accumulation would be if Trainer fell back to dividing by the number of micro-batches"
    kw = dict(max_tokens=200, accumulate=4)
    right = fit(tiny(), tok, rows, **kw)
    naive = make_trainer(as_peft(tiny()), tok, encoded, tmp_path, **kw)
    naive.model_accepts_loss_kwargs = False
    naive.add_callback(Recorder(h := History())); naive.train()
    assert max(abs(a - b) for a, b in zip(steps(right, "loss"), steps(h, "loss"))) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_cut(engine, rows, tok):
    "TRL's default would cut the row at 1,024 tokens"
    long = [{**rows[0], "input": "word "*1100}, rows[1]]
    h = fit_trainer(tiny(), tok, long, max_length=2000, engine=engine)
    assert h.tokens == sum(len(e["input_ids"]) for e in encode_all(long, tok)) > 1100


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpointing_changes_nothing_but_memory(engine, rows, tok):
    kw = dict(max_tokens=300, engine=engine)
    a, b = tiny(), tiny()
    one, two = fit_trainer(a, tok, rows.select(range(6)), **kw), fit_trainer(b, tok, rows.select(range(6)), checkpointing=True, **kw)
    assert steps(one, "loss") == pytest.approx(steps(two, "loss"), abs=1e-6)
    lora.check_trained(b)
    assert (weights(a) - weights(b)).abs().max() < 1e-5


def test_bf16_by_autocast(rows, tok):
    _, ours, b, theirs = pair(rows, tok, "trainer", max_tokens=300, precision="bf16")
    exact = fit(tiny(), tok, rows, max_tokens=300, precision="float32")
    gap = [max(abs(x - y) for x, y in zip(steps(h, "loss"), steps(exact, "loss"))) for h in (ours, theirs)]
    assert all(1e-5 < g < .05 for g in gap) and b.lora_config and weights(b).dtype == torch.float32


def test_full_fine_tuning_by_the_same_call(rows, tok):
    a, b = base().requires_grad_(True), base().requires_grad_(True)
    kw = dict(max_tokens=300, lr=1e-3, weight_decay=.1, precision="float32")
    ours, theirs = fit(a, tok, rows.select(range(6)), **kw), fit_trainer(b, tok, rows.select(range(6)), **kw)
    assert steps(ours, "loss") == pytest.approx(steps(theirs, "loss"), abs=1e-4)
    assert ours.trainable == theirs.trainable == sum(p.numel() for p in a.parameters())


def test_a_peft_model_is_trained_in_place(rows, tok):
    model = tiny()
    twin = as_peft(model)
    was = weights(model)
    h = fit_trainer(twin, tok, rows.select(range(4)))
    assert torch.equal(weights(model), was) and h.steps and not torch.equal(weights(take_back(twin, model)), was)


# ---------- resume

class StopAt(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kw): control.should_training_stop = state.global_step >= self.step

@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resume_gives_the_uninterrupted_weights(stop, rows, encoded, tok, tmp_path):
    kw = dict(max_tokens=300, accumulate=2, epochs=2)
    straight, resumed = tiny(), tiny()
    whole = fit_trainer(straight, tok, rows, **kw)
    assert len(whole.steps) == 6   # two passes of 2 + 2 + 1 batches
    cut = make_trainer(as_peft(tiny()), tok, encoded, tmp_path, save_every=1, **kw)
    cut.add_callback(StopAt(stop)); cut.train()
    rest = fit_trainer(resumed, tok, rows, folder=tmp_path, resume=True, **kw)
    assert rest.steps == whole.steps[stop:] and torch.equal(weights(resumed), weights(straight)) and rest.tokens == whole.tokens


def test_checkpoints_hold_an_adapter_that_we_can_load(rows, tok, encoded, tmp_path):
    model = tiny()
    h = fit_trainer(model, tok, rows, max_tokens=300, folder=tmp_path, save_every=3)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} >= {"checkpoint-3", f"checkpoint-{len(h.steps)}"}
    again = lora.load_adapter(base(), tmp_path/f"checkpoint-{len(h.steps)}")
    assert torch.equal(logits(again, encoded, tok), logits(model, encoded, tok))


def test_resume_without_a_checkpoint_is_an_error(rows, tok, tmp_path):
    with pytest.raises(ValueError, match="resume=True needs the folder="): fit_trainer(tiny(), tok, rows, resume=True)
    with pytest.raises(ValueError, match="No valid checkpoint"): fit_trainer(tiny(), tok, rows, folder=tmp_path, resume=True)


# ---------- what it leaves behind

def test_history(rows, encoded, tok, capsys):
    model = tiny()
    h = fit_trainer(model, tok, rows, rows.select(range(4)), max_tokens=300, accumulate=2, epochs=2, looks=3)
    assert type(h) is History and all(set(s) == {"step", "loss", "lr", "norm", "tokens"} for s in h.steps)
    assert h.tokens == 2*sum(len(e["input_ids"]) for e in encoded) == h.steps[-1]["tokens"]
    assert h.supervised == 2*sum(l != -100 for e in encoded for l in e["labels"]) and h.trainable == weights(model).numel()
    assert h.seconds > 0 and h.peak_bytes > 0 and h.tokens_per_s == pytest.approx(h.tokens/h.seconds)
    assert h.settings["rows"] == len(rows) and h.settings["engine"] == "trainer" and h.settings["lr"] == 2e-3
    assert [v["step"] for v in h.valid] == [0, round(len(h.steps)/2), len(h.steps)] and str(len(h.steps)) in str(h)
    assert not model.training and "'loss'" not in capsys.readouterr().out


def test_history_can_be_plotted(rows, tok):
    plt = pytest.importorskip("matplotlib.pyplot")
    assert training.plot_history(fit_trainer(tiny(), tok, rows.select(range(2)))).get_ylabel()
    plt.close("all")


def test_time_of_validation_is_not_counted(rows, tok, monkeypatch):
    import time
    real = trainer.validate
    monkeypatch.setattr(trainer, "validate", lambda *a, **k: (time.sleep(.7), real(*a, **k))[1])
    start = time.perf_counter()
    h = fit_trainer(tiny(), tok, rows.select(range(4)), rows.select(range(2)), looks=2)
    assert len(h.valid) == 2 and h.seconds < time.perf_counter() - start - 1.3


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_is_left_as_it_was(engine, rows, tok, encoded):
    "Autocast and TRL's output layer replace `forward`, and Trainer switches the cache off"
    twin = as_peft(tiny())
    twin.config.use_cache = True
    fit_trainer(twin, tok, rows.select(range(2)), engine=engine, precision="bf16")
    assert twin.config.use_cache is True and not twin.training
    assert not any("forward" in vars(m) for m in (twin, twin.get_base_model())) and logits(twin, encoded, tok).dtype == torch.float32


def test_without_validation_and_with_an_empty_one(rows, tok):
    for valid in (None, [], rows.select([])): assert fit_trainer(tiny(), tok, rows.select(range(2)), valid).valid == []


# ---------- when it goes wrong

BAD = {"empty": (lambda r: r.select([]), "No row is left to train on"), "no answer": (lambda r: [r[0], {**r[1], "output": " "}], "Row 2: .*no answer"),
       "too long": (lambda r: [{**r[0], "input": "word "*700}], r"Row 1: 7\d\d tokens, and max_length is 512"),
       "a path": (lambda r: "my.csv", "train is 'my.csv': load its rows first")}

@pytest.mark.parametrize("case", BAD)
def test_bad_rows_raise_before_anything_changes(case, rows, tok):
    change, says = BAD[case]
    model = tiny()
    was = weights(model)
    with pytest.raises(ValueError, match=says): fit_trainer(model, tok, change(rows))
    assert torch.equal(weights(model), was)


@pytest.mark.parametrize("kw", [dict(epochs=0), dict(lr=-1.), dict(max_tokens=0), dict(accumulate=0), dict(clip=0.), dict(save_every=0), dict(engine="axolotl"),
                                dict(precision="int3")])
def test_a_setting_that_means_nothing_is_a_sentence(kw, rows, tok):
    with pytest.raises(ValueError, match=str(next(iter(kw.values()))) if "engine" in kw or "precision" in kw else next(iter(kw))):
        fit_trainer(tiny(), tok, rows, **kw)


def test_a_frozen_or_low_model_is_refused(rows, tok):
    with pytest.raises(ValueError, match="frozen"): fit_trainer(base().requires_grad_(False), tok, rows)
    with pytest.raises(ValueError, match="bfloat16"): fit_trainer(base().to(torch.bfloat16), tok, rows)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_no_number_stops_at_its_step(engine, rows, tok):
    model = tiny()
    with torch.no_grad(): lora.lora_parameters(model)[1][0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="The loss is nan at step 1: halve the learning rate"): fit_trainer(model, tok, rows.select(range(2)), engine=engine)


def test_a_gradient_that_is_no_number_is_not_passed_over(rows, tok):
    twin = as_peft(tiny())
    next(p for p in twin.parameters() if p.requires_grad).register_hook(lambda g: g*math.nan)
    with pytest.raises(FloatingPointError, match="gradient's length is nan at step 1"): fit_trainer(twin, tok, rows.select(range(2)))
    assert not twin.training
