"Readers refuse with line and remedy, splits don't leak, labels are exact under well-known templates"
import copy, csv, json, os, random, subprocess, sys, time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings as hyp, strategies as st
from tokenizers import AddedToken
from ftcourse import corpora, formats, models
from ftcourse.formats import (batches, check_labels, collate, encode, encode_all, find_columns, fingerprint, is_label,
                              load, prepare, read, render, split, to_messages)

root = Path(__file__).resolve().parent.parent
quick = hyp(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def tok(): return models.load()[1]


@pytest.fixture
def put(tmp_path):
    "Write a file, give its path"
    def write(name, data, encoding="utf-8"):
        (tmp_path/name).write_bytes(data if isinstance(data, bytes) else data.encode(encoding))
        return tmp_path/name
    return write


def pairs(ds): return list(zip(ds["input"], ds["output"]))


# ---------- reading: what must be understood

@pytest.mark.parametrize("name,sep", [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_delimiters(put, name, sep):
    rows = [("Where is it?", "On its way"), ("a, b; c", "d"), ("two\nlines", "x, y"), ('say "hi"', "tab\there")]
    text = "\n".join(sep.join('"' + c.replace('"', '""') + '"' for c in r) for r in [("question", "answer"), *rows])
    assert pairs(read(put(name, text))) == rows


@pytest.mark.parametrize("eol", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_marks_and_empty_lines(put, eol, bom, last):
    text = bom + eol.join(["question;answer", "a;b", "", "c;d", "", ""]) + (eol if last else "")
    assert pairs(read(put("a.csv", text))) == [("a", "b"), ("c", "d")]


def test_a_quoted_line_break_survives_with_crlf(put):
    assert pairs(read(put("a.csv", 'question,answer\r\n"x\r\ny",z\r\n')))[0][0].split() == ["x", "y"]


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_ends_end_a_line(put, char):
    "str.splitlines knows ten kinds of line end; a CSV file has three"
    assert pairs(read(put("a.csv", f"question,answer\none{char}two,b\nc,d\n"))) == [(f"one{char}two", "b"), ("c", "d")]


@pytest.mark.parametrize("have,why", [(["text", "answer", "label"], "'answer', 'label' could be the output"),
                                      (["question", "context", "answer"], "'question', 'context' could be the input")])
def test_two_candidates_are_a_question_for_the_reader(have, why):
    with pytest.raises(ValueError, match=why): find_columns(have)
    assert find_columns([*have, "input", "output"]) == {"input": "input", "output": "output"}
    assert find_columns(have, {"input": have[0], "output": have[-1]}) == {"input": have[0], "output": have[-1]}


@pytest.mark.parametrize("name,data,why", [
    ("a.jsonl", '{"input": "Q", "output": "A"}\n{"input": "Q", "output": "Right.", "output": "Wrong."}\n', "line 2: 'output' stands twice"),
    ("a.json", '[{"input": "Q", "output": "A", "input": "R"}]', "'input' stands twice"),
    ("a.json", '[{"input": "Q?", "output": NaN}]', "row 1: 'output' is empty"),
    ("a.json", '[{"input": "Q\\u0000", "output": "A"}]', "row 1: 'input' holds a NUL byte"),
    ("a.json", '[{"instruction": "I", "output": "A", "history": [["q", "a"]]}]', "row 1: 'history' holds earlier turns"),
    ("a.csv", "question,answer\na,b\n".encode("utf-16"), "is UTF-16.*iconv -f UTF-16"),
    ("a.csv", '"Question, long"x;Answer\na;b\n', "after line 0.*quote"),
])
def test_what_would_be_lost_in_silence(put, name, data, why):
    with pytest.raises(ValueError, match=why): read(put(name, data))


def test_columns_are_found_whatever_their_case(put):
    r = read(put("a.csv", "id, Question ,REPLY\n1,a,b\n"))
    assert r[0] == {"instruction": "Reply to the message.", "input": "a", "task": "a", "output": "b"}


def test_columns_named_by_the_reader(put):
    f = put("a.csv", "mail,queue,text\na,b,c\n")
    assert pairs(read(f, {"input": "mail", "output": "queue"})) == [("a", "b")]
    assert find_columns(["text", "label"], {"output": "text", "input": "label"}) == {"output": "text", "input": "label"}


def test_upper_case_suffix_of_windows(put):
    assert len(read(put("MAILS.CSV", "question,answer\na,b\n"))) == 1


def test_blank_lines_before_the_header(put):
    assert pairs(read(put("a.csv", "\n\nquestion,answer\na,b\n"))) == [("a", "b")]


def test_json_array_and_json_lines_are_the_same(put):
    recs = [{"input": "Größe\n42\u2028", "output": "b", "n": 1}, {"n": None, "output": 3, "input": "é"}]
    want = [("Größe\n42", "b"), ("é", "3")]
    for name, text in {"a.json": json.dumps(recs, indent=1), "b.json": json.dumps(recs),
                       "c.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in recs),
                       "d.json": "\r\n\r\n".join(map(json.dumps, recs)) + "\r\n",
                       "e.jsonl": "\ufeff" + "\n".join(map(json.dumps, recs))}.items():
        assert [(a.strip("\u2028"), b) for a, b in pairs(read(put(name, text)))] == want, name


def test_alpaca_file(put):
    r = read(put("a.json", json.dumps([{"instruction": "Do", "input": "", "output": "done"}])))
    assert r[0]["instruction"] == "Do" and r[0]["input"] == "" and r[0]["task"] == "a"


def test_instruction_for_a_file_without_one(put):
    few = put("few.csv", "text,answer\na,b\nc,d\n")
    assert read(few)["instruction"][0] == "Reply to the message."
    assert read(few, instruction="Say it")["instruction"][0] == "Say it"
    said = read(put("lab.csv", "text,label\n" + "".join(f"t{i},{'yes no'.split()[i % 2]}\n" for i in range(8))))
    assert said["instruction"][0].endswith("exactly one of: no, yes.")


@quick
@given(st.lists(st.tuples(*[st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\0"), max_size=30)]*2),
                min_size=1, max_size=8), st.sampled_from([",", ";", "\t"]))
def test_any_text_survives_csv(tmp_path_factory, rows, sep):
    "What the standard library writes we read, row for row"
    rows = [(f"q{a}q", f"a{b}a") for a, b in rows]
    path = tmp_path_factory.mktemp("csv")/"x.csv"
    with path.open("w", encoding="utf-8", newline="") as f: csv.writer(f, delimiter=sep).writerows([("input", "output"), *rows])
    assert pairs(read(path)) == rows


# ---------- reading: what must be refused, with place and remedy

BAD = {
    "no answer": ("a.csv", "question,answer\na,b\nc,\n", ["a.csv", "row 3", "'answer' is empty", "fill it in"]),
    "blank answer": ("a.csv", "question,answer\na,   \n", ["row 2", "'answer' is empty"]),
    "no answer, json": ("a.json", '[{"input":"a","output":"b"},{"input":"a","output":null}]', ["row 2", "'output' is empty"]),
    "nothing": ("a.csv", "", ["a.csv is empty", "header"]),
    "only spaces": ("a.jsonl", " \n\n", ["a.jsonl is empty"]),
    "only a mark": ("a.csv", b"\xef\xbb\xbf", ["a.csv"]),
    "header only": ("a.csv", "question,answer\n", ["a.csv", "no rows"]),
    "empty array": ("a.json", "[]", ["a.json", "no rows"]),
    "one field more": ("a.csv", "question,answer\na,b\nc,d,e\n", ["line 3", "more fields", "2 columns", "quotes"]),
    "one field fewer": ("a.csv", "question,answer\na\n", ["line 2", "fewer fields"]),
    "mixed columns": ("a.jsonl", '{"input":"a","output":"b"}\n{"q":"a","output":"b"}', ["row 2", "mixed columns", "'q'"]),
    "not utf-8": ("a.csv", "question,answer\na,b\nGröße,1\n".encode("latin-1"), ["line 3", "not UTF-8", "iconv"]),
    "utf-16": ("a.csv", "question,answer\na,b\n".encode("utf-16"), ["is UTF-16", "iconv -f UTF-16"]),
    "broken line": ("a.jsonl", '{"input":"a","output":"b"}\n{"input":\n', ["line 2", "not JSON", "one object a line"]),
    "broken array": ("a.json", '[{"input":"a","output":"b"},\n{"input":"a" "output":"b"}]', ["line 2", "not JSON"]),
    "numbers": ("a.json", "[1, 2]", ["row 1", "int"]),
    "a list inside": ("a.jsonl", '{"input":["a"],"output":"b"}', ["row 1", "'input'", "list"]),
    "no known column": ("a.csv", "mail,queue\na,b\n", ["mail, queue", "INPUT=", "columns="]),
    "unknown kind": ("a.xlsx", "x", ["'.xlsx'", ".csv, .tsv, .json, .jsonl"]),
    "lone surrogate": ("a.jsonl", '{"input":"x","output":"b"}\n{"input":"\\ud800","output":"b"}', ["a.jsonl", "row 2"]),
    "nested too deep": ("a.json", "["*50_000, ["a.json", "not JSON"]),
    "quote never closed": ("a.csv", 'question,answer\nx,"a\nc,d\ne,f\n', ["a.csv", "line"]),
    "header twice": ("a.csv", "answer,question,answer\na,b,c\n", ["a.csv", "'answer'"]),
    "no question": ("a.csv", "question,answer\na,b\n,c\n", ["row 3", "'question' is empty"]),
    "no instruction and no input": ("a.csv", "instruction,input,output\na,b,c\n,,d\n", ["row 3"]),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_files(put, case):
    name, data, says = BAD[case]
    with pytest.raises(ValueError) as e: read(put(name, data))
    assert type(e.value) is ValueError, f"{type(e.value).__name__} from the depths: {e.value}"
    assert all(s in str(e.value) for s in says), str(e.value)


def test_errors_about_names(put, tmp_path):
    with pytest.raises(FileNotFoundError, match="no.csv"): load(str(tmp_path/"no.csv"))
    with pytest.raises(ValueError, match="No corpus is called 'dsk'; there are: desk, desk_threads, e2e, banking77, legal"): load("dsk")
    f = put("a.csv", "text,label\na,b\n")
    with pytest.raises(ValueError, match="has no column 'mail'; there are: text, label"): read(f, {"input": "mail"})
    with pytest.raises(ValueError, match="'question' is not one of instruction, input, output, split"):
        read(f, {"question": "text"})


def test_unknown_split_is_named(put):
    f = put("a.csv", table(60))
    with pytest.raises(ValueError, match="No split 'dev'; there are: train, valid, test"): load(str(f), "dev")
    with pytest.raises(ValueError, match="dev"): load("desk", "dev")


# ---------- fingerprints and the split

WORDS = "refund parcel late tent torn jacket colour change order cancel size swap lost key help thanks soon bill".split()

def table(n, seed=0, labels=None):
    "A CSV of `n` different questions"
    rng = random.Random(seed)
    qs = [" ".join(rng.sample(WORDS, 7)) for _ in range(n)]
    out = lambda q: rng.choice(labels) if labels else f"About the {q.split()[0]} and {q.split()[3]}, {q.split()[5]}."
    return "question,answer\n" + "".join(f'{q},"{out(q)}"\n' for q in qs)


def prints(ds): return {fingerprint(t) for t in ds["input"]}


@pytest.mark.parametrize("a,b", [("Where is it?", "where  is IT"), ("order 12-34", "Order 99"), ("x", "x!"), ("Straße", "STRASSE"),
                                 ("caf\u00e9", "cafe\u0301")])
def test_fingerprints_that_agree(a, b): assert fingerprint(a) == fingerprint(b)

@pytest.mark.parametrize("a,b", [("12", "13"), ("?", "!"), ("no refund", "refund"), ("日本", "中国"), ("", "?")])
def test_fingerprints_that_differ(a, b): assert fingerprint(a) != fingerprint(b)


texts = st.lists(st.sampled_from(WORDS + ["12", "?", "Tent", "REFUND", "99!"]), min_size=1, max_size=4).map(" ".join)
labelled = st.lists(st.tuples(texts, st.sampled_from(["a", "b", "c"])), min_size=12, max_size=60)

def dataset(rows, instruction="Do."):
    return Dataset.from_list([{"instruction": instruction, "input": t, "output": o, "task": "t"} for t, o in rows])


def sides(rows, **kw):
    try: return split(rows, **kw)
    except ValueError as e:
        assert "too few" in str(e) and str(len(rows)) in str(e)


@quick
@given(labelled)
def test_split_never_parts_what_is_the_same(rows):
    ds = dataset(rows)
    s = sides(ds)
    if s is None: return
    assert not prints(s["train"]) & prints(s["test"])
    assert Counter(pairs(s["train"])) + Counter(pairs(s["test"])) == Counter(rows)   # no row lost, none twice
    again = split(ds)
    assert {k: pairs(v) for k, v in s.items()} == {k: pairs(v) for k, v in again.items()}
    if is_label(ds["output"]): assert set(s["test"]["output"]) <= set(s["train"]["output"])


@quick
@given(labelled, st.randoms(use_true_random=False))
def test_split_does_not_depend_on_the_order_of_the_rows(rows, rng):
    mixed = rows[:]
    rng.shuffle(mixed)
    a, b = sides(dataset(rows)), sides(dataset(mixed))
    if a and b: assert prints(a["test"]) == prints(b["test"])


@quick
@given(st.lists(texts, min_size=8, max_size=40), st.lists(texts, max_size=20))
def test_a_file_that_grows_keeps_its_test_rows(old, new):
    answers = lambda ts: [(t, f"a different answer to number {i}") for i, t in enumerate(ts)]
    a, b = sides(dataset(answers(old))), sides(dataset(answers(old + new)))
    if a: assert b and prints(a["test"]) <= prints(b["test"]) and not prints(a["train"]) & prints(b["test"])


def test_a_new_label_does_not_deal_the_cards_anew(put):
    text = table(200, labels=["bill", "tent", "refund"])
    a = split(read(put("a.csv", text)))
    b = split(read(put("a.csv", text + "quite another matter,new\n")))
    assert prints(a["test"]) <= prints(b["test"]) and len(a["test"]) > 10


def test_another_instruction_keeps_the_test_rows(put):
    f = put("a.csv", table(200))
    assert prints(split(read(f))["test"]) == prints(split(read(f, instruction="Be brief."))["test"])


def test_the_same_question_under_two_instructions_stays_on_one_side():
    qs = [" ".join(random.Random(i).sample(WORDS, 6)) for i in range(150)]
    rows = [{"instruction": ins, "input": q, "output": f"{ins} to number {i}", "task": "t"}
            for i, q in enumerate(qs) for ins in ("Route.", "Answer.")]
    s = split(Dataset.from_list(rows))
    assert not prints(s["train"]) & prints(s["test"])


def test_seed_of_the_split_means_something(put):
    rows = read(put("a.csv", table(200)))
    assert prints(split(rows, seed=0)["test"]) != prints(split(rows, seed=1)["test"])


def test_share_of_the_test_rows(put):
    rows = read(put("a.csv", table(2000)))
    for share in (.1, .2, .5): assert abs(len(split(rows, share)["test"])/len(rows) - share) < .03


def test_split_is_the_same_in_every_process():
    "Rows with the same words under different labels, and a set's order changes with PYTHONHASHSEED"
    code = """
import random, sys
from datasets import Dataset
from ftcourse.formats import fingerprint, split
W = [chr(97+i)*4 for i in range(26)]
rng = random.Random(5)
rows = [(" ".join(rng.sample(W, 2)), f"label {rng.randrange(60)}") for _ in range(300)]
ds = Dataset.from_list([dict(instruction="x", input=t, output=o, task="t") for t, o in rows])
print(sorted(map(fingerprint, split(ds, .9)["test"]["input"])))
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": str(s)}).stdout for s in (1, 2, 3)]
    assert len(set(runs)) == 1 and len(runs[0]) > 100


def test_too_few_rows_to_hold_some_out(put):
    with pytest.raises(ValueError, match="too few"): split(read(put("a.csv", "question,answer\na,b\n")))
    with pytest.raises(ValueError, match="too few"): split(read(put("a.csv", "question,answer\n" + "same?,b\n"*50)))


@pytest.mark.parametrize("labels", [None, ["bill", "tent", "refund", "lost"]])
def test_an_own_file_has_three_parts_that_share_nothing(put, labels):
    f = str(put("a.csv", table(400, labels=labels)))
    parts = {s: load(f, s) for s in ("train", "valid", "test")}
    p = {s: prints(d) for s, d in parts.items()}
    assert all(p.values()) and not p["train"] & p["valid"] and not p["train"] & p["test"] and not p["valid"] & p["test"]
    assert sum(map(len, parts.values())) == 400
    assert [len(load(f, s, n=7)) for s in parts] == [7, 7, 7]
    assert pairs(load(f, "train", 20)) == pairs(load(f, "train", 20)) != pairs(load(f, "train", 20, seed=1))


def test_an_own_file_is_prepared_for_the_lesson(put):
    f = put("queues.csv", table(400, labels=["bill", "tent", "refund", "lost"]).replace("question,answer", "mail;queue", 1).replace(",", ";"))
    cfg = SimpleNamespace(corpus=str(f), input="mail", output="queue", instruction="", train_rows=100, valid_rows=10,
                          test_rows=0, seed=0)
    d = prepare(cfg)
    assert (len(d.train), len(d.valid), d.kinds, d.guides, d.names) == (100, 10, {"queues": "label"}, {}, {})
    assert set(d.test["output"]) <= set(d.train["output"])


# ---------- the file's own split

def given_split(rows): return "question,answer,split\n" + "".join(f"{a},{b},{s}\n" for a, b, s in rows)

def test_own_split_is_kept(put):
    f = put("a.csv", given_split([(f"{a} {b} {w}", f"x {a} {b} {w}", "Training" if (i+j) % 4 else "TEST") for i, a in enumerate(WORDS)
                                  for j, b in enumerate(WORDS[:6]) for w in ("now", "then")]))
    raw = read(f)
    assert prints(load(str(f), "test")) == {fingerprint(r["input"]) for r in raw if r["split"] == "TEST"}
    assert len(load(str(f), "train")) + len(load(str(f), "valid")) == sum(r["split"] != "TEST" for r in raw)


def test_own_split_with_a_leak_a_strange_word_or_an_empty_side(put):
    with pytest.raises(ValueError, match=r"Test row 1 \('B!'\) stands in training too"):
        load(str(put("a.csv", given_split([("a", "x", "train"), ("b", "y", "train"), ("B!", "y", "test")]))), "test")
    with pytest.raises(ValueError, match="Row 2: split is 'later'; write train or test"):
        load(str(put("a.csv", given_split([("a", "x", "train"), ("b", "y", "later")]))), "test")
    for side in ("train", "test"):
        with pytest.raises(ValueError, match="No row is left"):
            load(str(put("a.csv", given_split([("a", "x", side), ("b", "y", side)]))), "test")


def test_own_split_with_a_leak_in_rows_without_input(put):
    text = "instruction,output,split\nName a river.,Rhine,train\nName a hill.,Brocken,train\nname a RIVER,Elbe,test\n"
    with pytest.raises(ValueError, match="stands in training too"): load(str(put("a.csv", text)), "test")


def test_a_label_that_training_never_saw(put):
    rows = [(f"{a} {b}", "yes" if i % 2 else "no", "train") for i, a in enumerate(WORDS) for b in WORDS[:3]]
    f = put("a.csv", given_split(rows + [("quite new", "maybe", "test")]))
    with pytest.raises(ValueError, match="Test row 1: the label 'maybe' never occurs in training. Add"): load(str(f), "test")
    with pytest.raises(ValueError, match="maybe"): load(str(f), "train")


def test_check_labels_of_a_task_that_training_lacks():
    row = lambda t, o: {"task": t, "output": o}
    with pytest.raises(ValueError, match="'b'"):
        check_labels(Dataset.from_list([row("a", "x")]*5), Dataset.from_list([row("b", "x")]))


def test_a_column_called_fold_is_not_a_split(put):
    "Cross-validation files have one, with numbers"
    text = table(200).replace("question,answer", "question,answer,fold")
    f = put("a.csv", "\n".join(l + ("," + str(i % 5) if i else "") for i, l in enumerate(text.splitlines())))
    assert len(load(str(f), "test")) > 10


# ---------- large files

@pytest.mark.parametrize("labels", [None, [f"label {i}" for i in range(77)]])
def test_twenty_thousand_rows_in_seconds(put, labels):
    rng = random.Random(0)
    pool = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(400)]
    f = put("big.csv", "question,answer\n" + "".join(
        f"{' '.join(rng.choices(pool, k=9))},{rng.choice(labels) if labels else ' '.join(rng.choices(pool, k=9))}\n" for _ in range(20_000)))
    start = time.process_time()
    rows = read(f)
    s = split(rows)
    assert len(rows) == len(s["train"]) + len(s["test"]) == 20_000 and time.process_time() - start < 5


# ---------- templates

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0]['content'] %}{% else %}"
          "{% set rest = messages %}{% set sys = false %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
          "{% if loop.index0 == 0 and sys != false %}{% set text = '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' + m['content'] %}"
          "{% else %}{% set text = m['content'] %}{% endif %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
          "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
LLAMA3 = ("{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' %}"
          "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
         "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
         "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
         "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}")
SILENT = GEMMA.replace("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}", "")
ZEPHYR = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\\n' + m['content'] + eos_token }}"
          "{% elif m['role'] == 'system' %}{{ '<|system|>\\n' + m['content'] + eos_token }}"
          "{% else %}{{ '<|assistant|>\\n' + m['content'] + eos_token }}{% endif %}{{ '\\n' }}"
          "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}")
PHI3 = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}")
# template, named special tokens, further special tokens, prompt of (S, Q), answer A, what it goes on with
FORMATS = {
    "chatml": (CHATML, {}, [], "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>"),
    "llama2": (LLAMA2, dict(bos_token="<s>", eos_token="</s>"), [], "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]", " A </s>"),
    "llama3": (LLAMA3, dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"), ["<|start_header_id|>", "<|end_header_id|>"],
               "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
               "Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "A<|eot_id|>"),
    "gemma": (GEMMA, dict(bos_token="<bos>", eos_token="<eos>"), ["<start_of_turn>", "<end_of_turn>"],
              "<bos><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\n", "A<end_of_turn>"),
    "zephyr": (ZEPHYR, dict(bos_token="<s>", eos_token="</s>"), [], "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\n", "A</s>"),
    "phi3": (PHI3, dict(eos_token="<|endoftext|>"), ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
             "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n", "A<|end|>"),
}
templates = pytest.mark.parametrize("name", FORMATS)

@pytest.fixture(scope="module")
def dressed(tok):
    "The bundled tokenizer in another model's clothes"
    def make(name):
        template, named, more, *_ = FORMATS[name]
        t = copy.deepcopy(tok)
        t.add_special_tokens(named)
        t.add_tokens([AddedToken(m, special=True, normalized=False) for m in more], special_tokens=True)
        t.chat_template = template
        return t
    return {n: make(n) for n in FORMATS}


def talk(*texts, system=None):
    msgs = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + msgs


def parts(e, t):
    "The conversation as (asked?, text) runs"
    out = []
    for i, l in zip(e["input_ids"], e["labels"]):
        assert l in (-100, i)
        if not out or out[-1][0] != (l != -100): out.append((l != -100, []))
        out[-1][1].append(i)
    return [(a, t.decode(ids)) for a, ids in out]


@templates
def test_one_turn_is_asked_for_exactly(dressed, name):
    t, (_, _, _, prompt, answer) = dressed[name], FORMATS[name]
    (no, given), (yes, asked) = parts(encode(talk("Q", "A", system="S"), t), t)
    assert (no, yes) == (False, True) and given == prompt and asked.startswith(answer)
    assert asked[len(answer):].strip() in ("", t.eos_token)


THINKS = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and loop.last %}"
          "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}"
          "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}")   # as Qwen3's does

def test_a_model_that_thinks_aloud_is_told_not_to(tok):
    "Else the prompt opens a thought, and training teaches the empty one as part of the answer"
    t = copy.deepcopy(tok)
    t.chat_template = THINKS
    (_, given), (_, asked) = parts(encode(talk("Q", "A", system="S"), t), t)
    assert given == render(talk("Q", system="S"), t, True) and given.endswith("</think>\n\n") and asked == "A<|im_end|>"
    with pytest.raises(ValueError, match="rows with one answer"): encode(talk("Q", "A", "Q2", "A2"), t)


@templates
def test_training_prompt_is_the_serving_prompt(dressed, name):
    t = dressed[name]
    for msgs in (talk("Where is it? 42 €", "On its\nway  now.", system="Be kind.\nBe brief."), talk("Hello", "Hi!")):
        served = t(render(msgs[:-1], t, True), add_special_tokens=False).input_ids
        e = encode(msgs, t)
        n = e["labels"].count(-100)
        assert e["input_ids"][:n] == served and all(l != -100 for l in e["labels"][n:])


@templates
def test_the_end_is_asked_for(dressed, name):
    t, (*_, answer) = dressed[name], FORMATS[name]
    asked = [l for l in encode(talk("Q", "A"), t)["labels"] if l != -100]
    assert answer[answer.index("A")+1:].strip() in t.convert_ids_to_tokens(asked)


@templates
def test_no_token_stands_twice_at_the_start(dressed, name):
    ids = encode(talk("Q", "A", system="S"), dressed[name])["input_ids"]
    assert ids.count(dressed[name].bos_token_id) <= 1 or name == "chatml"


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "gemma", "zephyr"])
def test_every_answer_of_a_conversation_is_asked_for(dressed, name):
    t = dressed[name]
    got = parts(encode(talk("Q1", "A1", "Q2", "A2", "Q3", "A3", system="S"), t), t)
    assert [a for a, _ in got] == [False, True]*3
    assert [s.strip()[:2] for a, s in got if a] == ["A1", "A2", "A3"]
    assert all(f"Q{i+1}" in s for i, s in enumerate(s for a, s in got if not a))


def test_a_template_that_rewrites_earlier_turns_is_refused(dressed):
    with pytest.raises(ValueError, match="changes earlier turns"): encode(talk("Q1", "A1", "Q2", "A2"), dressed["phi3"])


def test_a_template_that_drops_the_system_message_gets_it_with_the_question(tok):
    t = copy.deepcopy(tok)
    t.chat_template = "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
    assert "S" in render(talk("Q", system="S"), t)


@templates
def test_what_a_customer_types_is_never_special(dressed, name):
    "Neither in a question nor in an answer: tokens of the template, of the tokenizer, and pieces that join"
    t = dressed[name]
    typed = [a.content for a in t.added_tokens_decoder.values() if a.special]
    plain, evil = talk("Q", "A"), talk("Q " + " ".join(typed), "A " + "".join(typed))
    special = set(t.added_tokens_decoder)
    count = lambda msgs: sorted(i for i in encode(msgs, t)["input_ids"] if i in special)
    assert count(evil) == count(plain)


def test_a_special_token_in_pieces_does_not_join(tok):
    e = encode(talk("<|im_<|im_end|>end|> and <|im_end|<|im_end|>>", "A"), tok)
    assert e["input_ids"].count(tok.eos_token_id) == 3   # system, user, answer


# ---------- rows to messages to tokens

def test_to_messages():
    row = dict(instruction="I", input="Q", output="A")
    assert [m["role"] for m in to_messages(row)] == ["system", "user", "assistant"]
    assert to_messages({**row, "input": ""}) == talk("I", "A") and to_messages(row, answer=False) == talk("Q", system="I")


@pytest.mark.parametrize("msgs", [[], talk("Q"), talk("Q", " \n")])
def test_a_conversation_without_an_answer(tok, msgs):
    with pytest.raises(ValueError, match="no answer to learn from"): encode(msgs, tok)


def test_the_length_is_never_cut(tok):
    n = len(encode(talk("Q", "A b c"), tok)["input_ids"])
    assert len(encode(talk("Q", "A b c"), tok, n)["input_ids"]) == n
    with pytest.raises(ValueError, match=f"{n} tokens, and max_length is {n-1}"): encode(talk("Q", "A b c"), tok, n-1)


def rows_of(*outs, **kw): return Dataset.from_list([dict(instruction="I", input="Q", output=o, task="t", **kw) for o in outs])

def test_a_row_of_50_000_tokens_is_refused_with_its_number(tok):
    rows = rows_of("a", "word "*50_000, "b")
    with pytest.raises(ValueError, match=r"Row 2: 50,0\d\d tokens, and max_length is 512 \(1 of 3 rows.*drop=True"):
        encode_all(rows, tok, 512)
    with pytest.raises(ValueError, match="Row 2"): encode_all(rows, tok)   # the default has an end too


def test_encode_all_drops_only_when_told_and_says_so(tok, capsys):
    assert len(encode_all(rows_of("a", " ", "b"), tok, drop=True)) == 2
    assert "1 of 3 rows were left out; the first is row 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Row 2: the conversation has no answer"): encode_all(rows_of("a", " ", "b"), tok)
    with pytest.raises(ValueError, match="No row is left"): encode_all(rows_of(" "), tok, drop=True)


@pytest.mark.parametrize("bad", [{"output": None}, {"input": None}, {"instruction": None}])
def test_a_row_with_nothing_in_a_field(tok, bad):
    rows = [dict(instruction="I", input="Q", output="A"), {**dict(instruction="I", input="Q", output="A"), **bad}]
    try: out = encode_all(rows, tok)
    except ValueError as e: assert "Row 2" in str(e)
    else: assert bad == {"input": None} and len(out) == 2   # no input is what "" means


def test_every_row_of_the_desk_ends_in_an_asked_end_token(tok):
    rows = corpora.load("desk", "train", n=60)
    for r, e in zip(rows, encode_all(rows, tok)):
        asked = [l for l in e["labels"] if l != -100]
        assert asked[-1] == tok.eos_token_id and tok.decode(asked[:-1]) == r["output"]
        assert e["labels"][0] == -100 and len(e["labels"]) == len(e["input_ids"])


def test_show_escapes_and_colours(tok):
    page = formats.show(encode(talk("<script>alert(1)</script>", "A & B"), tok), tok)
    assert "<script" not in page and "&amp;" in page and "#009E7366" in page


# ---------- batches

lengths = st.lists(st.integers(1, 80), min_size=1, max_size=80)
def fake(ls): return [{"input_ids": [7]*n, "labels": [-100]*(n-1) + [7]} for n in ls]

@quick
@given(lengths, st.integers(1, 200), st.one_of(st.none(), st.integers(0, 5)))
def test_batches_hold_every_row_once_within_the_budget(ls, budget, seed):
    enc = fake(ls)
    out = batches(enc, budget, seed)
    assert sorted(i for b in out for i in b) == list(range(len(ls))) and all(out)
    for b in out: assert len(b) == 1 or len(b)*max(ls[i] for i in b) <= budget
    assert out == batches(enc, budget, seed)


@quick
@given(lengths, st.integers(20, 200))
def test_batches_waste_little(ls, budget):
    "Two neighbours in order of length could not have been one batch"
    out = batches(fake(ls), budget)
    for a, b in zip(out, out[1:]): assert (len(a) + 1) * ls[b[0]] > budget


def test_batches_by_seed():
    enc = fake([5]*40)
    assert batches(enc, 20, 1) != batches(enc, 20, 2) and batches(enc, 20, 1) == batches(enc, 20, 1)


def test_batches_of_nothing(): assert batches([], 100) == []


def test_collate_pads_right_and_never_asks_for_padding():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [2], "labels": [2]}]
    c = collate(rows, pad_id=2)   # the pad token is also the end token
    assert c["input_ids"].tolist() == [[1, 2, 3], [2, 2, 2]] and c["labels"].tolist() == [[-100, 2, 3], [2, -100, -100]]
    assert c["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and all(v.dtype == torch.int64 for v in c.values())
    assert rows[1] == {"input_ids": [2], "labels": [2]}   # untouched


@quick
@given(lengths)
def test_collate_keeps_every_token(ls):
    c = collate(fake(ls), 0)
    assert c["attention_mask"].sum(1).tolist() == ls and (c["labels"] != -100).sum().item() == len(ls)
    assert (c["input_ids"][c["attention_mask"] == 1] == 7).all() and (c["input_ids"][c["attention_mask"] == 0] == 0).all()


# ---------- is it a label?

@pytest.mark.parametrize("outs,want", [(["a", "b"]*4, True), (["a", "b", "c"], False), (["x"*70, "y"]*9, False), (["a"]*4, True),
                                       ([str(i) for i in range(201)]*4, False), ([], False)])
def test_is_label(outs, want): assert is_label(outs) is want
