"Any make of record becomes messages or a reason; any file streams; labels are exact under any template; nothing is cut or leaks in silence"
import copy, csv, io, json, random, re, resource, subprocess, sys, zipfile
import pytest, torch
from hypothesis import HealthCheck, given, settings as hyp, strategies as st
from ftcourse import conversations as cv, formats, models
from ftcourse.conversations import (TEMPLATES, ChatEncoder, bins, block_mask, check_messages, check_rows, collate_blocks, conversations,
                                    copies_content, dress, length_report, shorten, sniff, to_conversation)
from ftcourse.formats import collate, render
from own_process import in_own_process

quick = hyp(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
templates = pytest.mark.parametrize("name", TEMPLATES)


@pytest.fixture(scope="module")
def tok():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(models.bundled())


@pytest.fixture(scope="module")
def dressed(tok): return {n: dress(tok, n) for n in TEMPLATES}


@pytest.fixture
def put(tmp_path):
    def write(name, data, encoding="utf-8"):
        (tmp_path/name).write_bytes(data if isinstance(data, bytes) else data.encode(encoding))
        return tmp_path/name
    return write


def talk(*texts, system=None):
    msgs = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + msgs


def said(talks): return [[m["content"] for m in t] for t in talks]


# ---------- records

def oai(*turns): return {"messages": [dict(role=r, content=c) for r, c in turns]}
def gpt(*turns): return {"conversations": [{"from": r, "value": c} for r, c in turns]}
def task(*answers, kind="choices", **kw):
    key = {"choices": "choices", "textarea": "text"}.get(kind, kind)
    return {"id": 1, "data": {"text": "Q"}, "annotations": [
        {"was_cancelled": a is None, "result": [] if a is None else [{"type": kind, "value": {key: a if isinstance(a, list) else [a]}}], **kw}
        for a in answers]}

MAKES = [
    ("messages", oai(("user", "Q"), ("assistant", "A")), talk("Q", "A")),
    ("messages", oai(("developer", "S"), ("user", "Q"), ("assistant", "A"), ("user", "Q2"), ("assistant", "A2")), talk("Q", "A", "Q2", "A2", system="S")),
    ("messages", oai(("user", [{"type": "text", "text": "Q"}, {"type": "text", "text": "q"}]), ("assistant", "A")), talk("Qq", "A")),
    ("ShareGPT", gpt(("system", "S"), ("human", "Q"), ("gpt", "A")), talk("Q", "A", system="S")),
    ("ShareGPT", {**gpt(("human", "Q"), ("gpt", "A")), "system": "S"}, talk("Q", "A", system="S")),
    ("ShareGPT", {"conversations": oai(("user", "Q"), ("assistant", "A"))["messages"]}, talk("Q", "A")),
    ("prompt–completion", {"prompt": " Q\n", "completion": " A"}, talk("Q", "A")),
    ("prompt–completion", {"system": "S", "prompt": "Q", "completion": "A"}, talk("Q", "A", system="S")),
    ("prompt–completion", {"prompt": talk("Q", system="S"), "completion": talk("x", "A")[1:]}, talk("Q", "A", system="S")),
    ("Alpaca", {"instruction": "I", "input": "Q", "output": "A"}, talk("Q", "A", system="I")),
    ("Alpaca", {"instruction": "I", "output": "A"}, talk("I", "A")),
    ("Alpaca", {"instruction": "I", "input": "Q", "output": "A", "system": "S", "history": [["q", "a"]]}, talk("q", "a", "I\nQ", "A", system="S")),
    ("Alpaca", {"instruction": "I", "input": None, "output": "A", "system": None, "history": []}, talk("I", "A")),
    ("Label Studio", task("A", None, "A"), talk("Q", "A")),
    ("Label Studio", task(["one\ntwo"], kind="textarea"), talk("Q", "one\ntwo")),
    ("Label Studio", {**task("A", ground_truth=True), "annotations": task("A", ground_truth=True)["annotations"] + task("B")["annotations"]}, talk("Q", "A")),
    ("Label Studio", task("one", kind="textarea"), talk("Q", "one")),
    ("columns", {"Question": "Q", "Reply": 3}, talk("Q", "3")),
    ("columns", {"context": "Q", "answer": "A"}, talk("Q", "A")),
    ("columns", {"text": "x", "input": "Q", "output": "A"}, talk("Q", "A")),
    ("columns", {"system": "S", "question": "Q", "answer": "A"}, talk("Q", "A", system="S")),
]

@pytest.mark.parametrize("make,rec,want", MAKES)
def test_makes(make, rec, want):
    assert sniff(rec) == make and to_conversation(rec) == want
    assert to_conversation(json.loads(json.dumps(rec)), system="T")[0]["content"] == (want[0]["content"] if want[0]["role"] == "system" else "T")


REFUSED = [
    (oai(("user", "Q")), "does not end with an answer"), (oai(), "does not end with an answer"), (oai(("system", "S")), "does not end"),
    (oai(("assistant", "A")), "turn 1 is of the assistant, and the user's was due"),
    (oai(("user", "Q"), ("user", "Q"), ("assistant", "A")), "turn 2 is of the user, and the assistant's was due"),
    (oai(("user", "Q"), ("system", "S"), ("assistant", "A")), "turn 2 is of the system"),
    (oai(("system", "S"), ("system", "S"), ("user", "Q"), ("assistant", "A")), "turn 2 is of the system"),
    (oai(("user", "Q"), ("tool", "x"), ("assistant", "A")), "turn 2 is of the role 'tool'.*without tools"),
    (oai(("user", "Q"), ("assistant", None)), "turn 2 .assistant. is a NoneType, not text"),
    (oai(("user", ["Q"]), ("assistant", "A")), "turn 1 .user. is a list, not text"),
    (oai(("user", [{"type": "image_url"}]), ("assistant", "A")), "is a list, not text"),
    (oai(("user", "Q"), ("assistant", " \n")), "turn 2 .assistant. is empty"),
    (oai(("user", "a\0b"), ("assistant", "A")), "turn 1: a NUL byte at character 2"),
    (oai(("user", "a\ud800b"), ("assistant", "A")), "turn 1: half a character"),
    ({"messages": "hello"}, "is a str, not a list of turns"), ({"messages": ["hello"]}, "turn 1 is 'hello'"),
    ({"messages": [{"role": "user"}]}, "needs role and content"),
    ({**oai(("user", "Q"), ("assistant", "A")), "tools": [{}]}, "the record has tools"),
    ({"messages": [dict(role="user", content="Q"), dict(role="assistant", content="", tool_calls=[1])]}, "calls a tool"),
    ({"messages": [dict(role="user", content="Q"), dict(role="assistant", content="A", weight=0)]}, "weight 0"),
    ({"messages": [dict(role="user", content="Q"), dict(role="assistant", content="A", weight="0")]}, "turn 2 has the weight '0'"),
    ({"messages": [dict(role="user", content="Q"), dict(role="assistant", content="A", function_call={"name": "f"})]}, "turn 2 has function_call"),
    ({"messages": [dict(role="user", content="Q"), dict(role="assistant", content="A", reasoning_content="hm")]}, "turn 2 has reasoning_content"),
    ({"image": "a.jpg", **gpt(("human", "Q"), ("gpt", "A"))}, "the record has image"),
    ({"instruction": "I", "context": "C", "output": "A"}, "the record has context"),
    ({"context": "C", "question": "Q", "answer": "A"}, "'question', 'context' could be the input"),
    ({"question": "Q", "answer": float("nan")}, "turn 2 .assistant. is empty"),
    ({"prompt": "Q", "completion": ["A"]}, "turn 2 .assistant. is a list"),
    ({"instruction": "I", "input": "", "output": None}, "turn 2 .assistant. is a NoneType"),
    ({"instruction": "I", "output": "A", "history": [["q"]]}, "shorter"),
    ({"instruction": "I", "output": "A", "history": [3]}, "not a record of the make Alpaca"),
    (task("A", "B"), r"the annotators disagree \(A \| B\)"), (task(None), "nobody has answered"), (task(), "nobody has answered"),
    (task(["x"], kind="labels"), "'labels' is no text"), ({"chosen": "a", "rejected": "b"}, "columns chosen, rejected"),
    ({"question": ["Q"], "answer": "A"}, "is a list, not text"), ([1], "a list instead of an object"), ("x", "a str instead"), ({}, "columns"),
]

@pytest.mark.parametrize("rec,why", REFUSED)
def test_what_is_refused(rec, why):
    with pytest.raises(ValueError, match=why) as e: to_conversation(rec)
    assert type(e.value) is ValueError


@quick
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(
                        "messages conversations role content from value prompt completion instruction input output history data annotations result text".split()), x, max_size=5), max_leaves=12))
def test_no_record_is_answered_from_the_depths(rec):
    "Whatever JSON comes: messages, or a ValueError"
    try: check_messages(to_conversation(rec))
    except ValueError as e: assert str(e)


# ---------- files

def csv_of(rows, **kw):
    f = io.StringIO(newline="")
    csv.writer(f, **kw).writerows([("question", "answer"), *rows])
    return f.getvalue()

PAIRS = [("Größe 🙂 שלום?", "a; b, \"c\""), ("two\nlines\u2028x", "<b>x</b>")]

@pytest.mark.parametrize("name,text,encoding", [
    ("a.csv", csv_of(PAIRS), "utf-8"), ("a.csv", csv_of(PAIRS), "utf-8-sig"), ("a.csv", csv_of(PAIRS), "utf-16"),
    ("a.csv", csv_of(PAIRS, delimiter=";"), "utf-8-sig"), ("a.csv", "sep=;\r\n" + csv_of(PAIRS, delimiter=";"), "utf-8-sig"),
    ("a.tsv", csv_of(PAIRS, delimiter="\t"), "utf-16"), ("A.CSV", "\n\n" + csv_of(PAIRS) + "\r\n\r\n", "utf-8"),
    ("a.csv", csv_of(PAIRS, delimiter="|"), "utf-8"),
    ("a.jsonl", "\n".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in PAIRS), "utf-8"),
    ("a.jsonl", "\r\n\r".join(json.dumps({"question": q, "answer": a}) for q, a in PAIRS) + "\n\n", "utf-16"),
    ("a.json", json.dumps([{"question": q, "answer": a} for q, a in PAIRS], indent=1), "utf-8-sig"),
    ("a.json", " " + json.dumps([{"question": q, "answer": a} for q, a in PAIRS]) + "\r\n", "utf-16"),
    ("a.json", "\n".join(json.dumps({"question": q, "answer": a}, indent=2) for q, a in PAIRS), "utf-8"),
])
def test_files_that_must_be_understood(put, name, text, encoding):
    assert [tuple(s) for s in said(conversations(put(name, text, encoding)))] == PAIRS


def test_parquet(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    recs = [{"id": i, **oai(("user", f"Q{i}"), ("assistant", "A"))} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(recs), tmp_path/"a.parquet")
    assert said(conversations(tmp_path/"a.parquet")) == [[f"Q{i}", "A"] for i in range(2500)]
    (tmp_path/"b.parquet").write_bytes((tmp_path/"a.parquet").read_bytes()[:500])
    with pytest.raises(ValueError, match="b.parquet, not parquet"): list(conversations(tmp_path/"b.parquet"))


def test_code_page_and_its_remedy(put):
    f = put("a.csv", "question;answer\r\nok;ok\r\nWie groß?;Zwei Meter\r\n", "cp1252")
    with pytest.raises(ValueError, match=r"(?s)a.csv, 1 bad row.*line 3: turn 1: byte 0xdf at character 8 .*'Wie groß\?'.*encoding='cp1252'"): list(conversations(f))
    assert said(conversations(f, encoding="cp1252"))[1] == ["Wie groß?", "Zwei Meter"]
    assert said(conversations(f, bad_rows=f.with_name("bad.jsonl"))) == [["ok", "ok"]]
    assert json.loads(f.with_name("bad.jsonl").read_text())["row"]["question"].encode("utf-8", "surrogateescape") == "Wie groß?".encode("cp1252")


G = json.dumps({"prompt": "Q", "completion": "A"})
BROKEN = {   # the file as a whole can't be read: it raises whatever is asked for
    "cut in a text": ("a.json", f'[{G},\n {{"prompt": "Q', r"line 2, column 13: not JSON: Unterminated string.*cut off"),
    "cut between": ("a.json", f"[{G},\n{G}", "line 2, column 35: the array is not closed.*cut off"),
    "cut after comma": ("a.json", f"[{G},\n", "not closed"),
    "cut in an object": ("a.json", f'[{G},\n{{"prompt":', "line 2, column 11.*cut off"),
    "no comma": ("a.json", f"[{G}\n {G}]", "line 2, column 2: not JSON: a comma"),
    "two commas": ("a.json", f"[{G},,{G}]", "column 37"), "comma at the end": ("a.json", f"[{G},]", "column 37: not JSON: Expecting value$"),
    "text after": ("a.json", f"[{G}] x", "column 38: text after the array"),
    "a control character": ("a.json", '[{"prompt": "a\nb"}]', "line 1, column 15.*control character"),
    "empty": ("a.json", " \n", "no row is left"), "empty array": ("a.json", "[]", "no row is left"),
    "empty csv": ("a.csv", "\n\n", "the file is empty"), "header only": ("a.csv", "question,answer\n", "no row is left"),
    "twice": ("a.csv", "question,answer,question\na,b,c\n", "two columns are called 'question'"),
    "utf-16 without mark": ("a.csv", "question,answer\na,b\n".encode("utf-16-le"), "utf-16-le"),
    "utf-16 with half a character": ("a.csv", "question,answer\na,b\n".encode("utf-16")[:-1], "not utf-16"),
    "a sheet": ("a.xlsx", b"PK", "can't read '.xlsx'.*CSV UTF-8"), "nested": ("a.json", "["*200_000, "nested too deep"),
}

@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("aside", [False, True])
def test_broken_files(put, tmp_path, case, aside):
    name, data, why = BROKEN[case]
    f = put(name, data)
    with pytest.raises(ValueError, match=f"(?s){name}, .*{why}"): list(conversations(f, bad_rows=tmp_path/"bad.jsonl" if aside else None))
    assert not list(tmp_path.glob(".*tmp"))


BAD_ROWS = {   # one row in three can't be read: the others can
    "not json": ("a.jsonl", [G, G[:20], G], "line 2: not JSON: .*cut off"),
    "key twice": ("a.jsonl", [G, '{"prompt": "a", "prompt": "b", "completion": "c"}', G], "line 2: the key 'prompt' stands twice"),
    "key twice inside": ("a.json", ["[" + G, ', {"messages": [{"role": "user", "role": "user", "content": "x"}]},', G + "]"], "row 2 .line 2.: the key 'role' stands twice"),
    "a number": ("a.jsonl", [G, "3", G], "line 2: a int instead"), "nested": ("a.jsonl", [G, "["*200_000, G], "line 2: JSON nested too deep"),
    "nul": ("a.csv", ["question,answer\na,b", "a\0,b", "c,d"], "line 3: turn 1: a NUL byte"),
    "fields": ("a.csv", ["question,answer\na,b", "a,b,c", "c,d"], "line 3: 3 fields, and the header has 2 columns"),
    "few fields": ("a.csv", ["question,answer\na,b", "a", "c,d"], "line 3: 1 fields"),
    "quote": ("a.csv", ["question,answer\na,b", '"a"b,c', "c,d"], "line 3: .*quote"),
    "no answer": ("a.csv", ["question,answer\na,b", "a,", "c,d"], "line 3: turn 2 .assistant. is empty"),
    "after a quoted break": ("a.csv", ['question,answer\n"a\n\nb",b', "a,", "c,d"], "line 5: turn 2"),
}

@pytest.mark.parametrize("case", BAD_ROWS)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_bad_rows_raise_or_go_aside(put, tmp_path, case, ends):
    name, lines, why = BAD_ROWS[case]
    f = put(name, "\n".join(lines).replace("\n", ends))
    with pytest.raises(ValueError, match=f"(?s)1 bad row.*{why}.*bad_rows="): list(conversations(f))
    assert len(list(conversations(f, bad_rows=tmp_path/"bad.jsonl"))) == 2
    one, = map(json.loads, (tmp_path/"bad.jsonl").read_text().splitlines())
    assert __import__("re").match(why, f"{one['place']}: {one['reason']}") and one["row"] is not None
    assert len(list(tmp_path.iterdir())) == 2


def test_first_ten_are_named_and_all_are_counted(put):
    f = put("a.jsonl", "\n".join([G] + ["{"]*25))
    with pytest.raises(ValueError) as e: list(conversations(f))
    assert "25 bad rows" in str(e.value) and "line 11:" in str(e.value) and "line 12:" not in str(e.value)


def test_side_file_is_atomic_and_never_the_source(put, tmp_path):
    f, bad = put("a.jsonl", "\n".join([G, "{", G])), tmp_path/"bad.jsonl"
    bad.write_text("old")
    it = conversations(f, bad_rows=bad)
    next(it)
    assert bad.read_text() == "old"
    it.close()
    assert bad.read_text() == "old" and len(list(tmp_path.iterdir())) == 2   # given up: nothing changes
    list(conversations(f, bad_rows=bad))
    assert json.loads(bad.read_text())["row"].strip() == "{"
    with pytest.raises(ValueError, match="bad_rows is the file itself"): list(conversations(f, bad_rows=f))
    with pytest.raises(ValueError, match="no row is left; see"): list(conversations(put("b.jsonl", "{\n"), bad_rows=bad))
    assert "{" in bad.read_text()
    with pytest.raises(FileNotFoundError): list(conversations(tmp_path/"no.csv"))


def test_keep_and_system_and_columns(put):
    f = put("a.csv", "mail,queue,split\na,b,train\nc,d,test\n")
    got = list(conversations(f, {"input": "mail", "output": "queue"}, "S", keep=lambda r: r["split"] == "train"))
    assert got == [talk("a", "b", system="S")]


@quick
@given(st.lists(st.tuples(*[st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=30)]*2), min_size=1, max_size=6),
       st.sampled_from([16, 64, 2**16]), st.sampled_from([None, 1]), st.booleans())
def test_any_text_survives_json(rows, size, indent, array):
    "The window on the file may end anywhere: within a text, a number, an escape"
    recs = [{"q": a, "n": -12.5e3, "a": [b, True, None]} for a, b in rows]
    text = json.dumps(recs, indent=indent) if array else "\n".join(json.dumps(r, indent=indent) for r in recs)
    old = cv._Window.__init__.__defaults__
    cv._Window.__init__.__defaults__ = (size,)
    try: got = [(r, why) for _, r, why in cv._json_rows(io.StringIO(text))]
    finally: cv._Window.__init__.__defaults__ = old
    assert got == [(r, None) for r in recs]


@pytest.mark.parametrize("kind", [".csv", ".json", ".jsonl"])
def test_one_row_of_ten_megabytes(put, kind):
    big = "wörd \\ \" " * 1_200_000
    rows = [("Q", "A"), (big, "B"), ("Q", "C")]
    recs = [{"question": q, "answer": a} for q, a in rows]
    text = {".csv": csv_of(rows), ".json": json.dumps(recs), ".jsonl": "\n".join(map(json.dumps, recs))}[kind]
    got = said(conversations(put("a" + kind, text)))
    assert [s[1] for s in got] == ["A", "B", "C"] and got[1][0] == big.strip()


@in_own_process
def test_memory_is_flat():
    "A hundred thousand rows hold no more than ten thousand (of CSV and arrays ten and one), and encoding holds one batch"
    import tempfile
    from pathlib import Path
    from transformers import AutoTokenizer
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1e3 if sys.platform != "darwin" else 1e6)   # MB
    coder, folder = ChatEncoder(AutoTokenizer.from_pretrained(models.bundled())), Path(tempfile.mkdtemp())
    def write(n, kind):
        path = folder/f"{n}{kind}"
        rec = lambda i: {"question": f"Where is parcel {i}? " + "word "*9, "answer": f"On its way {i}"}
        with path.open("w") as f:
            if kind == ".csv": f.write("question,answer\n"); f.writelines(f"{r['question']},{r['answer']}\n" for r in map(rec, range(n)))
            elif kind == ".jsonl": f.writelines(json.dumps(rec(i)) + "\n" for i in range(n))
            else: f.write("["); f.writelines(json.dumps(rec(i)) + ",\n" for i in range(n-1)); f.write(json.dumps(rec(n)) + "]")
        return path
    for kind, n in ((".jsonl", 10_000), (".csv", 1_000), (".json", 1_000)):
        small, big = write(n, kind), write(10*n, kind)
        assert sum(1 for _ in conversations(small)) == n
        before = peak()
        assert sum(1 for _ in conversations(big)) == 10*n
        assert peak() - before < 8, f"{kind}: {peak()-before:.1f} MB more"
    one, ten = write(500, ".jsonl"), write(2_500, ".jsonl")
    assert sum(1 for _ in coder.stream(conversations(one))) == 500
    before = peak()
    assert sum(1 for _ in coder.stream(conversations(ten))) == 2_500
    assert peak() - before < 12, f"encoding: {peak()-before:.1f} MB more"


# ---------- labels: an oracle by bytes, which shares no code with the encoder

def oracle(name, msgs, neutral):
    "(prompt, answer) texts of each answer, as the format is documented; plain string work"
    strip = name in ("Llama-2", "Llama-3", "Gemma")
    text = [neutral(m["content"]) for m in msgs]
    system = None
    if msgs[0]["role"] == "system": system, text = text[0], text[1:]
    if name == "Gemma" and system is not None: text[0], system = system + "\n\n" + text[0], None
    if strip: text, system = [t.strip() for t in text], system and system.strip()
    qs, As = text[::2], text[1::2]
    out = []
    for k in range(len(As)):
        p = ""
        for i in range(k+1):
            q, last = qs[i], i == k
            if name == "ChatML":
                if i == 0 and system is not None: p += f"<|im_start|>system\n{system}<|im_end|>\n"
                p += f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" + (f"{As[i]}<|im_end|>\n" if not last else "")
            elif name == "Llama-2":
                if i == 0 and system is not None: q = f"<<SYS>>\n{system}\n<</SYS>>\n\n{q}"
                p += f"<s>[INST] {q} [/INST]" + (f" {As[i]} </s>" if not last else "")
            elif name == "Llama-3":
                if i == 0: p = "<|begin_of_text|>" + ("" if system is None else f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>")
                p += (f"<|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
                      + (f"{As[i]}<|eot_id|>" if not last else ""))
            elif name == "Mistral":
                if i == 0: p = "<s>"
                if last and system is not None: q = f"{system}\n\n{q}"
                p += f"[INST] {q}[/INST]" + (f" {As[i]}</s>" if not last else "")
            elif name == "Gemma":
                if i == 0: p = "<bos>"
                p += f"<start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n" + (f"{As[i]}<end_of_turn>\n" if not last else "")
            elif name == "Phi-3":
                if i == 0 and system is not None: p = f"<|system|>\n{system}<|end|>\n"
                p += f"<|user|>\n{q}<|end|>\n<|assistant|>\n" + (f"{As[i]}<|end|>\n" if not last else "")
            else:
                if i == 0 and system is not None: p = f"<|system|>\n{system}</s>\n"
                p += f"<|user|>\n{q}</s>\n<|assistant|>\n" + (f"{As[i]}</s>\n" if not last else "")
        end = {"ChatML": "{}<|im_end|>", "Llama-2": " {} </s>", "Llama-3": "{}<|eot_id|>", "Mistral": " {}</s>", "Gemma": "{}<end_of_turn>",
               "Phi-3": "{}<|end|>", "Zephyr": "{}</s>"}[name].replace("{}", As[k])
        out.append((p, end))
    return out


def bytes_of(tokenizer):
    "id → the bytes it stands for (GPT-2's table of visible characters, undone)"
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in seen} | {chr(256+n): b for n, b in enumerate(b for b in range(256) if b not in seen)}
    added = {i: a.content.encode() for i, a in tokenizer.added_tokens_decoder.items()}
    return {i: added.get(i) or bytes(table[c] for c in t) for t, i in tokenizer.get_vocab().items()}


PIECES = ["refund", "Zelt", " ", "  ", "\n", "\n\n", "\t", "42 €", "Größe", "🙂", "👩‍👩‍👧", "שלום", "日本", "<b>", "&amp;", "<script>", "'", "!", "###", "[INST]", "</s>",
          "<|im_end|>", "<|end|>", "<eos>", "<|eot_id|>", "user", "assistant\n", "system", "\u202e", "{{ x }}", "-100", "e\u0301"]

def generated(n, seed):
    rng = random.Random(seed)
    def text():
        t = rng.choice(["", " "]).join(rng.choice(PIECES) for _ in range(rng.randint(1, 8)))
        return t if t.strip() else "x" + t
    for _ in range(n):
        yield talk(*(text() for _ in range(2*rng.choice([1, 1, 1, 2, 2, 3]))), system=text() if rng.random() < .5 else None)


def check_masks(name, t, table, n):
    "Every answer asked for once, to the byte, after the tokens that a server would send; how many conversations need several rows"
    coder, talks, several = ChatEncoder(t), list(generated(n, name)), 0
    assert coder.plain
    truth = [oracle(name, m, lambda s: formats._neutral(s, t)) for m in talks]
    served = iter(t([p for o in truth for p, _ in o], add_special_tokens=False).input_ids)
    for (number, rows), want in zip(coder.stream(talks), truth, strict=True):
        left = [(p.encode(), a.encode(), next(served)) for p, a in want]
        several += len(rows) > 1
        for r in rows:
            ids, labels, done, start = r["input_ids"], r["labels"], b"", None
            assert len(ids) == len(labels) and all(l in (-100, i) for i, l in zip(ids, labels)) and labels[-1] != -100
            for k, (i, l) in enumerate(zip(ids, labels)):
                if l != -100 and start is None:
                    prompt, answer, sent = left.pop(0)
                    assert done == prompt and ids[:k] == sent, (number, name)
                    start = len(done)
                done += table[i]
                if l != -100 and (k+1 == len(ids) or labels[k+1] == -100):
                    assert done[start:] == answer, (number, name)
                    start = None
        assert not left, "every answer is learnt once"
    return several


@templates
def test_the_mask_is_exact(dressed, name):
    "1,500 conversations for each of seven templates: 10,500"
    several = check_masks(name, dressed[name], bytes_of(dressed[name]), 1500)
    assert several if name in ("Mistral", "Llama-3") else True


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    "Mistral's SentencePiece files, out of a wheel that is not installed: transformers would take its tokenizer for its own"
    folder = tmp_path_factory.mktemp("mistral")
    p = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--retries=1", "-d", str(folder),
                        "mistral-common==1.13.1"], capture_output=True, text=True)
    if p.returncode: pytest.skip("the wheel of mistral-common can't be had: " + p.stderr[-200:])
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def sentencepiece(wheel, folder, version):
    "Mistral's own tokenizer as transformers reads it, and id → bytes"
    from transformers import LlamaTokenizerFast
    (folder/"tokenizer.model").write_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith(f".model.{version}"))))
    t = LlamaTokenizerFast.from_pretrained(folder, legacy=False)
    t.chat_template = TEMPLATES["Mistral"][0]
    def read(piece):
        byte = re.fullmatch("<0x(..)>", piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
    return t, {i: read(p) for p, i in t.get_vocab().items()}


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_the_mask_is_exact_with_a_real_sentencepiece_tokenizer(mistral, tmp_path, version):
    "Pieces that depend on what stands before them; in v1 [INST] is text, in v3 a token"
    t, table = sentencepiece(mistral, tmp_path, version)
    assert not cv.cuts_at_special(t)
    assert (len(t("[INST]", add_special_tokens=False).input_ids) == 1) == (version == "v3")
    assert check_masks("Mistral", t, table, 400)


@templates
def test_served_prompts_are_the_documented_ones(dressed, name):
    "The oracle, the fast path and `formats.render`, which serving calls, say the same"
    t = dressed[name]
    coder = ChatEncoder(t)
    for m in generated(150, 7):
        want = oracle(name, m, lambda s: formats._neutral(s, t))
        assert coder.texts(m) == coder.turns(m) == want
        at = [i for i, x in enumerate(m) if x["role"] == "assistant"]
        assert [render(m[:i], t, True) for i in at] == [p for p, _ in want]


@templates
@pytest.mark.parametrize("system", [None, "S"])
def test_one_turn_is_one_row_with_one_beginning_and_an_asked_end(dressed, name, system):
    t = dressed[name]
    row, = ChatEncoder(t)(talk("Q", "A", system=system))
    check_rows([row], t)
    assert row["input_ids"].count(t.bos_token_id) <= 1 or name == "ChatML"
    assert row["labels"][-1] in t.added_tokens_decoder


def test_turns_of_one_row_where_the_template_allows_it(dressed):
    n = {k: len(ChatEncoder(t)(talk("Q", "A", "Q2", "A2", "Q3", "A3", system="S"))) for k, t in dressed.items()}
    assert n["Mistral"] == 3 and n["ChatML"] == n["Llama-2"] == n["Gemma"] == n["Phi-3"] == n["Zephyr"] == 1
    assert len(ChatEncoder(dressed["Mistral"])(talk("Q", "A", "Q2", "A2"))) == 1


@templates
def test_pad_is_not_masked_end(dressed, name):
    "Even where the pad token is the end token"
    t = dressed[name]
    rows = ChatEncoder(t)([talk("Q", "A"), talk("Q is long", "A is longer than A")])
    b = collate(rows, rows[0]["labels"][-1])
    assert [(r != -100).sum().item() for r in b["labels"]] == [sum(l != -100 for l in r["labels"]) for r in rows]
    assert b["labels"][0][len(rows[0]["labels"])-1] == rows[0]["labels"][-1]


def test_weight_zero_is_shown_and_not_learnt(tok):
    m = talk("Q", "A", "Q2", "A2")
    m[1]["weight"] = 0
    row, = ChatEncoder(tok)(to_conversation({"messages": m}))
    assert tok.decode([l for l in row["labels"] if l != -100]) == "A2<|im_end|>"
    m[1]["weight"], m[3]["weight"] = 1, 0
    assert tok.decode([l for r in ChatEncoder(tok)(m) for l in r["labels"] if l != -100]) == "A<|im_end|>"


def test_equal_to_lesson_04(tok):
    m = [talk("Q", "A\n b", system="S"), talk(" Q ", " A "), talk("Q", "A", "Q", "A")]
    assert ChatEncoder(tok)(m) == [formats.encode(x, tok) for x in m]


def test_an_earlier_call_leaves_nothing_behind(tok):
    t = copy.deepcopy(tok)
    want = ChatEncoder(t)([talk("Q", "A"), talk("Q"*50, "A")])
    t(["a", "b c d"], padding=True, truncation=True, max_length=2, split_special_tokens=True)
    assert ChatEncoder(t)([talk("Q", "A"), talk("Q"*50, "A")]) == want


@templates
def test_pieces_that_are_kept_change_nothing(dressed, name):
    "Whole texts, and a cache that overflows, give the same rows"
    a, b = ChatEncoder(dressed[name]), ChatEncoder(dressed[name])
    b.clean = False
    talks = list(generated(300, 3)) + [talk("word "*200, "A")]*2
    a.known = dict.fromkeys(range(1990), [7])
    assert a(talks) == b(talks) and a.clean and all(len(s) <= 400 for s in a.known if isinstance(s, str))


def test_a_tokenizer_whose_pieces_depend_on_their_place(tok):
    "SentencePiece's blank before the first word"
    from tokenizers import Tokenizer, models as m, pre_tokenizers as p
    from transformers import PreTrainedTokenizerFast
    def make(pre):
        t = Tokenizer(m.BPE({"a": 0, "▁": 1, "</s>": 2, "Ġ": 3}, []))
        t.pre_tokenizer = pre
        return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>")
    assert cv.cuts_at_special(tok) and cv.cuts_at_special(make(p.ByteLevel(add_prefix_space=False)))
    for pre in (p.Metaspace(), p.ByteLevel(add_prefix_space=True), p.Sequence([p.Metaspace(prepend_scheme="first")])):
        assert not cv.cuts_at_special(make(pre))


THINKS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}{% if m.role == 'assistant' and not loop.last %}"
          "{% set c = c.split('</think>')[-1] %}{% endif %}{{ c }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

def test_a_template_that_cuts_old_thoughts(tok):
    t = copy.deepcopy(tok)
    t.chat_template = THINKS
    coder = ChatEncoder(t)
    assert not coder.plain
    rows = coder(talk("Q", "<think>x</think>A", "Q2", "<think>y</think>B"))
    asked = [t.decode([l for l in r["labels"] if l != -100]) for r in rows]
    assert asked == ["<think>x</think>A<|im_end|>", "<think>y</think>B<|im_end|>"] and "x</think>" not in t.decode(rows[1]["input_ids"])
    assert "· template · asked for" in coder.view(talk("Q", "<think>x</think>A"))   # who speaks can't be told here; what is asked for can


@pytest.mark.parametrize("template,want", [
    ("{% for m in messages %}{{ m.content }}{% endfor %}", True), ("{% for m in messages %}{{ m['content'].strip() | trim }}{% endfor %}", True),
    ("{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}", True),
    ("{{ messages | length }}{% for m in messages %}{% set c = m.content if m.role == 'user' else 'x' + m.content %}{{ c }}{% endfor %}", True),
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", False), ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", False),
    ("{% for m in messages %}{{ m.content.strip('x') }}{% endfor %}", False), ("{% for m in messages %}{{ m | tojson }}{% endfor %}", False),
    ("{% for m in messages %}{% if 'x' in m.content %}y{% endif %}{% endfor %}", False), (THINKS, False),
    ("{% set ns = namespace(c='') %}{% for m in messages %}{% set ns.c = m.content %}{% if ns.c %}{{ ns.c }}{% endif %}{% endfor %}", False),
    ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", False), ("{% for m in messages %}{% for k in m %}{{ m[k] }}{% endfor %}{% endfor %}", False),
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", False), ("{% broken", False),
    ("{% macro f(x) %}{{ x|upper }}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}", False),
    ("{% for m in messages %}{{ m.content ~ m.role }}{{ 'a' if m.content else 'b' }}{% endfor %}", False),
])
def test_which_templates_only_copy(template, want): assert copies_content(template) is want


def test_a_template_that_asks_otherwise_than_it_writes(tok):
    t = copy.deepcopy(tok)
    t.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    with pytest.raises(ValueError, match="'assistant: .*where the prompt has 'ASSISTANT: '"): ChatEncoder(t)(talk("Q", "A"))


def test_a_template_without_an_end_gets_one(tok):
    t = copy.deepcopy(tok)
    t.chat_template = "{% for m in messages %}{{ m.role + ':' }} {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    rows = ChatEncoder(t)(talk("Q", "A", "Q2", "A2"))
    assert all(r["labels"][-1] == t.eos_token_id for r in rows) and len(rows) == 2
    check_rows(rows, t)


@pytest.mark.parametrize("change,why", [
    (lambda r: {**r, "labels": [-100]*len(r["labels"])}, "no token is asked for"), (lambda r: {**r, "labels": r["labels"][:-1]}, "labels"),
    (lambda r: {k: v[:-1] for k, v in r.items()}, "end of an answer is not asked for"), (lambda r: {**r, "labels": r["labels"][1:] + [-100]}, "not the token in its place"),
    (lambda r: {"input_ids": r["input_ids"][:1] + r["input_ids"], "labels": [-100] + r["labels"]}, "begins twice"),
])
def test_guard(tok, change, why):
    good = ChatEncoder(tok)(talk("Q", "A"))
    assert check_rows(good*2, tok) == good*2
    with pytest.raises(ValueError, match=f"Row 2: .*{why}"): check_rows([*good, change(good[0])], tok)


def test_guard_takes_other_tools_rows_and_looks_at_every_answer(tok):
    row, = ChatEncoder(tok)(talk("Q", "A", "Q", "A"))
    ids, labels, end = row["input_ids"], row["labels"], tok.eos_token_id
    line = tok("\n", add_special_tokens=False).input_ids             # as a collator that asks for all after the marker makes it
    check_rows([{"input_ids": ids + line, "labels": labels + line}], tok)
    first = labels.index(end)
    with pytest.raises(ValueError, match="end of an answer is not asked for"):
        check_rows([{"input_ids": ids, "labels": [-100 if k == first else l for k, l in enumerate(labels)]}], tok)


# ---------- length

rows_st = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=8)
def fake(ls): return [{"input_ids": list(range(p+a)), "labels": [-100]*p + list(range(p, p+a))} for p, a in ls]
def n_asked(rs): return sum(l != -100 for r in rs for l in r["labels"])

@quick
@given(rows_st, st.integers(2, 70), st.integers(0, 10), st.integers(0, 10))
def test_windows_ask_each_token_once(ls, n, head, lap):
    rows = fake(ls)
    if head + lap >= n:
        with pytest.raises(ValueError, match="leave nothing"): shorten(rows, n, "window", head, lap)
        return
    for r in rows:
        out = shorten([r], n, "window", head, lap)
        assert all(len(w["input_ids"]) <= n and len(w["labels"]) == len(w["input_ids"]) for w in out)
        assert sorted(l for w in out for l in w["labels"] if l != -100) == [l for l in r["labels"] if l != -100]
        assert all(l in (-100, i) for w in out for i, l in zip(w["input_ids"], w["labels"]))


@quick
@given(rows_st, st.integers(2, 70))
def test_other_ways_and_the_report(ls, n):
    rows = fake(ls)
    drop, end, cut = (shorten(rows, n, how) for how in ("drop", "keep_end", "cut"))
    assert drop == [r for r in rows if len(r["labels"]) <= n] and len(end) == len(cut) == len(rows)
    for r, e, c in zip(rows, end, cut):
        assert e["input_ids"] == r["input_ids"][-n:] and c["input_ids"] == r["input_ids"][:n] and e["labels"][-1] == r["labels"][-1]
    table = length_report(rows, n)
    assert table["asked tokens lost"].tolist() == [n_asked(rows) - n_asked(x) for x in (cut, drop, end, rows)]
    assert table["rows lost"]["drop"] == len(rows) - len(drop) and table["answers without their end"]["cut"] == len(rows) - len(drop)
    assert table["rows with nothing asked"]["cut"] == sum(not n_asked([c]) for c in cut)


def test_how_must_be_said():
    with pytest.raises(ValueError, match="how = 'truncate'; there are: drop, cut, keep_end, window"): shorten(fake([(1, 1)]), 9, "truncate")
    with pytest.raises(TypeError): shorten(fake([(1, 1)]), 9)


# ---------- packing

@quick
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(10, 60))
def test_bins(ls, n):
    out = bins(ls, n)
    assert sorted(i for b in out for i in b) == list(range(len(ls))) and all(sum(ls[i] for i in b) <= n or len(b) == 1 for b in out)


def test_block_mask():
    m = block_mask([2, 3])[0, 0]
    assert m.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_is_equal_to_unpacked_and_the_leak_is_real(tok, attention):
    "Loss, logits and gradients, in float32"
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    m = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, attn_implementation=attention))
    rows = ChatEncoder(tok)([talk("Q", "A B C"), talk("Where is it?", "On its way."), talk("x", "y")])
    def of(batch):
        m.zero_grad()
        out = m(**batch)
        out.loss.backward()
        return out.loss.item(), out.logits, torch.cat([p.grad.flatten() for p in m.parameters()])
    (a, la, ga), (b, lb, gb) = of(collate(rows, tok.pad_token_id)), of(collate_blocks(rows))
    apart = torch.cat([la[k, :len(r["labels"])] for k, r in enumerate(rows)])
    assert abs(a-b) < 1e-6 and torch.allclose(apart, lb[0], atol=1e-5) and torch.allclose(ga, gb, atol=1e-6)
    leaky = {k: v for k, v in collate_blocks(rows).items() if k in ("input_ids", "labels")}
    assert not torch.allclose(of(leaky)[1][0], lb[0], atol=1e-3)


# ---------- the viewer

def test_view_escapes_and_marks(tok):
    evil = "<script>alert('1')</script> \" & <|im_end|> \u202eabc שלום"
    page = ChatEncoder(tok).view(talk(evil, "A", system=evil))
    assert "<script" not in page and "&lt;" in page and "\u202e" not in page and "\\u202e" in page and page.count("<bdi>") > 30
    from html.parser import HTMLParser
    tags = []
    class P(HTMLParser):
        def handle_starttag(self, tag, attrs): tags.append((tag, dict(attrs)))
    P().feed(page)
    assert {t for t, _ in tags} <= {"div", "span", "bdi", "hr", "br"}
    boxes = [a["class"].split() for t, a in tags if t == "span"][len(cv.SPEAKERS)+2:]   # the legend stands first
    row, = ChatEncoder(tok)(talk(evil, "A", system=evil))
    assert len(boxes) == len(row["labels"]) and [("asked" in b) for b in boxes] == [l != -100 for l in row["labels"]]
    assert [("special" in b) for b in boxes] == [i in tok.added_tokens_decoder for i in row["input_ids"]]
    assert [b[0] for b in boxes][-2:] == ["assistant", "template"] and "system" in boxes[3] and {b[0] for b in boxes} == set(cv.SPEAKERS)


@templates
def test_view_under_every_template(dressed, name):
    t = dressed[name]
    page = ChatEncoder(t).view(talk("Q", "A", "Q2", "A2", system="S"))
    assert page.count("· user · given") >= 2 and "· assistant · asked for" in page
    if name == "Mistral": assert "· assistant · given" in page   # the second row shows the first answer as given


def test_view_of_a_long_row_says_how_much_is_left(tok):
    assert "more tokens" in ChatEncoder(tok).view(talk("word "*3000, "A"), most=100)


def test_browse_turns_pages(tok):
    w = cv.browse([talk("first", "A"), talk("second", "B")], tok)
    head, page = w.children
    assert "first" in page.value
    head.children[0].value = 2
    assert "second" in page.value and "first" not in page.value
