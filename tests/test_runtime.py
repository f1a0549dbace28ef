"Settings refuse what would go wrong later, files are whole or absent, the meter sees what was used"
import os, random, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from own_process import in_own_process
from ftcourse import runtime
from ftcourse.runtime import (Meter, cache_dir, find_settings, peak_bytes, precision, progress,
                              seed_everything, settings, write_atomic)

root = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "No setting of this shell and no file of this repository"
    for k in [k for k in os.environ if k.startswith("FTCOURSE_")]: monkeypatch.delenv(k)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "machine", lambda: "cpu")


def ini(text, encoding="utf-8"):
    Path("settings.ini").write_bytes(text.encode(encoding))
    return Path("settings.ini").resolve()


# ---------- settings: what wins

def test_without_a_file_the_built_in_values_hold():
    s = settings()
    assert (s.profile, s.corpus, s.train_rows, s.lr, s.test_rows, s.input) == ("cpu", "desk", 1000, 2e-3, 0, "")


def test_types_follow_the_defaults():
    s = settings(path=ini("[DEFAULT]\nlr = 1\nalpha = 32\nmodel = 7\n"))
    assert (type(s.lr), s.lr, type(s.alpha), s.alpha, s.model) == (float, 1., int, 32, "7")


def test_file_goes_before_built_in_and_environment_before_file(monkeypatch):
    path = ini("[DEFAULT]\ncorpus = desk\nseed = 5\n[cpu]\nepochs = 3\nr = 4\n")
    monkeypatch.setenv("FTCOURSE_R", "16")
    s = settings(path=path, alpha=99)
    assert (s.seed, s.epochs, s.r, s.alpha, s.train_rows) == (5, 3, 16, 99, 1000)
    assert settings(path=path, r=2).r == 2


def test_corpus_section_has_the_last_word_for_its_corpus_and_machine(monkeypatch):
    assert settings(corpus="banking77").train_rows == 3000
    assert settings(corpus="banking77", profile="test").train_rows == 40
    assert settings(corpus="desk").train_rows == 1000
    monkeypatch.setenv("FTCOURSE_CORPUS", "banking77")
    assert (settings().train_rows, settings().max_new_tokens) == (3000, 16)
    monkeypatch.setenv("FTCOURSE_TRAIN_ROWS", "77")
    assert settings().train_rows == 77
    assert settings(path=ini("[cpu:banking77]\ntrain_rows = 5\nmax_new_tokens = 9\n")).max_new_tokens == 9


def test_profile_of_the_environment(monkeypatch):
    monkeypatch.setenv("FTCOURSE_PROFILE", "test")
    assert settings().train_rows == 40 and settings("cpu").train_rows == 1000


def test_a_section_of_the_learners_own_is_a_profile():
    path = ini("[DEFAULT]\ncorpus = desk\n[mine]\ntrain_rows = 3\n")
    assert settings("mine", path=path).train_rows == 3


def test_shipped_file_says_what_the_package_says(monkeypatch):
    for p in ("cpu", "t4", "a100", "test"):
        for c in ("desk", "e2e", "banking77"):
            monkeypatch.chdir(root/"nbs" if (root/"nbs").is_dir() else root)
            theirs = vars(settings(p, path=root/"settings.ini", corpus=c))
            built = configured(monkeypatch, p, c)
            assert {**theirs, "runs": ""} == {**built, "runs": ""}


def configured(monkeypatch, profile, corpus):
    with monkeypatch.context() as m:
        m.setattr(runtime, "find_settings", lambda start=None: None)
        return vars(settings(profile, corpus=corpus))


def test_the_nearest_file_above_is_found_and_runs_lie_beside_it():
    path = ini("[DEFAULT]\ncorpus = desk\nruns = out\n")
    below = path.parent/"a"/"b"
    below.mkdir(parents=True)
    assert find_settings(below) == path
    os.chdir(below)
    assert Path(settings().runs).resolve() == path.parent/"out"


def test_another_tools_settings_ini_is_not_ours():
    ini("[DEFAULT]\nlib_name = other\n")
    assert find_settings() is None or find_settings().parent != Path.cwd()


def test_a_file_of_one_key_is_ours(monkeypatch):
    path = ini("[DEFAULT]\nepochs = 1\n")
    assert find_settings() == path and settings().epochs == 1


def test_a_utf16_file_is_refused_and_not_passed_over():
    ini("[DEFAULT]\ncorpus = desk\n", "utf-16")
    with pytest.raises(ValueError, match="UTF-8"): settings()


def test_what_the_file_says_for_all_machines_is_not_undone_by_a_built_in_section():
    path = ini("[DEFAULT]\nmodel = owner/mine\nepochs = 5\n")
    assert settings("t4", path=path).model == "owner/mine"
    assert settings("cpu", path=path, corpus="e2e").epochs == 5
    assert settings("t4", path=path).max_tokens == 8192           # of which the file says nothing
    assert settings("test", path=path).epochs == 1                # the small budget of the tests stays
    path = ini("[DEFAULT]\nmodel = owner/mine\n[t4]\nmodel = owner/small\n")
    assert settings("t4", path=path).model == "owner/small"


def test_percent_signs_are_text():
    "An instruction may speak of 100%"
    assert settings(path=ini("[DEFAULT]\ninstruction = Be 100% sure\n")).instruction == "Be 100% sure"


def test_a_byte_order_mark_of_a_windows_editor_is_no_error():
    assert settings(path=ini("\ufeff[DEFAULT]\nseed = 3\n")).seed == 3


# ---------- settings: what is refused

@pytest.mark.parametrize("text,says", [
    ("[DEFAULT]\ntrian_rows = 3\n", "no setting is called 'trian_rows'; there are: corpus, model"),
    ("[DEFAULT]\ntrain_rows = many\n", "train_rows = 'many' is not a number; write for example train_rows = 1000"),
    ("[DEFAULT]\ntrain_rows = 3.5\n", "train_rows = '3.5' is not a number"),
    ("[DEFAULT]\nlr = fast\n", "lr = 'fast' is not a number"),
    ("[DEFAULT]\nr =\n", "r = '' is not a number"),
    ("[DEFAULT]\nepochs = True\n", "epochs = 'True' is not a number"),
    ("[DEFAULT]\nseed = __import__('os').getcwd()\n", "is not a number"),
    ("seed = 3\n", "can't be read"),
    ("[cpu]\nseed=1\n[cpu]\nseed=2\n", "can't be read"),
    ("[DEFAULT\nseed = 3", "can't be read"),
])
def test_a_bad_file_is_named_with_key_and_remedy(text, says):
    path = ini(text)
    with pytest.raises(ValueError) as e: settings(path=path)
    assert says in str(e.value) and str(path) in str(e.value)


def test_a_file_that_is_not_utf8_is_named():
    path = ini("[DEFAULT]\ncorpus = desk\ninstruction = Größe\n", "latin-1")
    for kw in ({"path": path}, {}):   # given, and found in the current folder
        with pytest.raises(ValueError, match="can't be read"): settings(**kw)


def test_a_settings_file_that_is_not_there_is_an_error():
    with pytest.raises((ValueError, FileNotFoundError), match="nope.ini"): settings(path="nope.ini")


def test_unknown_profile_and_unknown_override():
    with pytest.raises(ValueError, match="No profile 'gpu'; there are: cpu, t4, a100, test"): settings("gpu")
    with pytest.raises(ValueError, match="No profile 'cpu:e2e'"): settings("cpu:e2e")
    with pytest.raises(ValueError, match="no setting is called 'rows'"): settings(rows=3)


def test_bad_environment_value_is_refused(monkeypatch):
    monkeypatch.setenv("FTCOURSE_EPOCHS", "two")
    with pytest.raises(ValueError, match="epochs = 'two' is not a number"): settings()


def test_a_misspelt_variable_is_refused(monkeypatch):
    monkeypatch.setenv("FTCOURSE_TRAINROWS", "100")
    with pytest.raises(ValueError, match="environment.*no setting is called 'trainrows'"): settings()


@pytest.mark.parametrize("over,says", [(dict(lr=0), "lr = 0.0 makes no sense"), (dict(train_rows=-5), "makes no sense"),
                                       (dict(epochs="many"), "epochs = 'many' is not a number"), (dict(r=2.5), "not a number")])
def test_a_value_given_in_the_call_is_checked_too(over, says):
    with pytest.raises(ValueError, match=says): settings(**over)


def test_a_number_given_in_the_call_gets_its_type():
    import numpy as np
    s = settings(epochs="3", train_rows=np.int64(7), lr=1)
    assert (s.epochs, s.train_rows, s.lr, type(s.lr)) == (3, 7, 1., float)


@pytest.mark.parametrize("text,word", [
    ("[t4]\ntrian_rows = 3\n", "trian_rows"),             # a section that this machine doesn't use
    ("[cpu:desk]\ntrian_rows = 3\n", "trian_rows"),
])
def test_a_misspelt_key_is_found_in_every_section(text, word):
    with pytest.raises(ValueError, match=word): settings("cpu", path=ini(text))


@pytest.mark.parametrize("key,value", [("epochs", "0"), ("train_rows", "-5"), ("r", "0"), ("batch_size", "0"),
                                       ("lr", "-1"), ("lr", "1e999"), ("seed", "-1"), ("shots", "-1")])
def test_numbers_that_mean_nothing_are_refused(monkeypatch, key, value):
    monkeypatch.setenv(f"FTCOURSE_{key.upper()}", value)
    with pytest.raises(ValueError, match=key): settings()


# ---------- machine

def test_precision_of_this_processor(monkeypatch):
    monkeypatch.setattr(runtime, "cpu_prefers_bf16", lambda: True)
    assert precision("cpu") == torch.bfloat16
    monkeypatch.setattr(runtime, "cpu_prefers_bf16", lambda: False)
    assert precision("cpu") == torch.float32


@pytest.mark.parametrize("f32,bf16,want", [(4., 1., True), (1., 2., False), (1.2, 1., False)])
def test_bf16_must_be_faster_and_not_only_known(monkeypatch, f32, bf16, want):
    "A clock that says how long each product took; some processors know bf16 and are slower with it"
    clock, ask = iter([0., f32, 10., 10.+bf16]*6), runtime.cpu_prefers_bf16.__wrapped__
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert ask() is want
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert ask() is False   # and the clock isn't asked: it would have run out


def test_trying_bf16_draws_no_random_number():
    torch.manual_seed(3); want = torch.rand(1)
    torch.manual_seed(3); runtime.cpu_prefers_bf16.__wrapped__()
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize("major,want", [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_a_t4_gets_float16_and_an_a100_bfloat16(monkeypatch, major, want):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: (major, 0))
    assert precision("cuda") == want


def test_seeds_repeat_and_differ():
    def draw(s): seed_everything(s); return random.random(), np.random.rand(), torch.rand(1).item()
    assert draw(3) == draw(3) and not set(draw(3)) & set(draw(4))


# ---------- Meter

@in_own_process
def test_meter_sees_200_mb():
    with Meter() as m:
        if not m.resettable: pytest.skip("this system can't reset its high-water mark")
        before = m.peak_bytes
        x = np.ones(25_000_000); del x
    assert 190e6 < m.peak_bytes - before < 260e6


@in_own_process
def test_meter_forgets_what_was_before():
    x = np.ones(40_000_000); del x
    with Meter() as m: pass
    if not m.resettable: pytest.skip("this system can't reset its high-water mark")
    y = np.ones(40_000_000); del y
    assert m.peak_bytes < peak_bytes() - 200e6


@in_own_process
def test_a_meter_inside_another_does_not_blind_the_outer_one():
    with Meter() as outer:
        if not outer.resettable: pytest.skip("this system can't reset its high-water mark")
        before = outer.peak_bytes
        x = np.ones(25_000_000); del x
        with Meter(): pass
    assert outer.peak_bytes - before > 190e6


def test_meter_clock():
    with Meter() as m:
        time.sleep(.05)
        assert m.seconds >= .05
    was = m.seconds
    time.sleep(.02)
    assert m.seconds == was


def test_meter_measures_a_block_that_fails():
    with pytest.raises(KeyError):
        with Meter() as m: raise KeyError
    assert m.seconds >= 0 and m.peak_bytes > 0


# ---------- progress

def test_progress_writes_plain_lines(monkeypatch, capsys):
    monkeypatch.setenv("FTCOURSE_PLAIN", "1")
    bar = progress(range(3), desc="work", every=0)
    for i in bar: bar.set_postfix_str(f"note {i}")
    err = capsys.readouterr().err
    assert "work: 1 of 3" in err and "note 2" in err and err.count("\n") == 3


@pytest.mark.parametrize("plain", ["1", ""])
def test_progress_loses_nothing(monkeypatch, plain):
    monkeypatch.setenv("FTCOURSE_PLAIN", plain)
    assert list(progress(iter("abc"))) == list("abc") and list(progress([])) == []


# ---------- write_atomic

def test_write_atomic_text_and_bytes():
    assert write_atomic("a/b/c.txt", "Größe ⏎\n").read_bytes() == "Größe ⏎\n".encode()
    assert write_atomic("a/b/c.txt", b"\x00\xff").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in Path("a/b").iterdir()) == ["c.txt"]


WRITER = """
import sys
from ftcourse.runtime import write_atomic
i = 0
print("go", flush=True)
while True: i += 1; write_atomic(sys.argv[1], bytes([65 + i % 26]) * 4_000_000)
"""


def test_killed_in_the_middle_of_many_writes_leaves_a_whole_file(tmp_path):
    path, seen = tmp_path/"x.bin", set()
    p = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    try:
        p.stdout.readline()
        start = time.time()
        while time.time() < start + 1.5 or len(seen) <= 2 and time.time() < start + 60:   # readers meanwhile see whole files too
            if path.exists():
                got = path.read_bytes()
                assert len(got) == 4_000_000 and len(set(got)) == 1
                seen.add(got[0])
    finally:
        p.send_signal(signal.SIGKILL); p.wait()
    got = path.read_bytes()
    assert len(seen) > 2 and len(got) == 4_000_000 and len(set(got)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path):
    path = tmp_path/"old.txt"
    path.write_text("old")
    code = ("import resource, sys\nfrom ftcourse.runtime import write_atomic\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "try: write_atomic(sys.argv[1], 'x'*5000)\nexcept OSError as e: print(e)\n")
    r = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert f"{path} was not written" in r.stdout and "is the disk full?" in r.stdout, r.stderr
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["old.txt"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_no_space_left_on_device(monkeypatch, where):
    import errno
    Path("x").write_text("old")
    def full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="x was not written .No space left on device.; is the disk full") as e:
        write_atomic("x", "new")
    assert e.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [p.name for p in Path(e.value.args and ".").iterdir() if "tmp" in p.name] == []


def test_two_writers_at_once_leave_one_of_the_two():
    import threading
    errors = []
    def go(c):
        for _ in range(40):
            try: write_atomic("t.txt", c*100_000)
            except Exception as e: errors.append(e)
    ts = [threading.Thread(target=go, args=(c,)) for c in "ab"]
    for t in ts: t.start()
    for t in ts: t.join()
    assert not errors and len(set(Path("t.txt").read_text())) == 1


def test_cache_dir_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FTCOURSE_CACHE", str(tmp_path/"c"/"d"))
    assert cache_dir() == tmp_path/"c"/"d" and cache_dir().is_dir()
