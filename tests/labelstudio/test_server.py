"A real Label Studio takes what lessons 05b and 08b write, and gives back what they read. `make test-labelstudio` starts the server"
import json, os, secrets, shutil, sys, urllib.error
from pathlib import Path
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent/"tools"))
import labelstudio  # noqa: E402
from setup import BROWSERS  # noqa: E402
from ftcourse.labeling import FLAG, Labeling, disagreements, majority, ratings
from ftcourse.rating import krippendorff_alpha, new_study

LABELS = ["Till", "Lookout", 'Q&A "fast"', "<b>Porch</b>"]
ROWS = [dict(instruction="Name the queue.", input=text, output=label, task="route") for text, label in (
    ("Where is my refund? <script>alert(1)</script>", "Till"), ("Does the tent come in green?", "Till"), ("你好 مرحبا 🙂 \n second line", "Lookout"),
    ("How long is the guarantee?", 'Q&A "fast"'), ("My late aunt's card was charged twice", "<b>Porch</b>"), ("asdf", "Till"), ("", "Lookout"),
    ("Nobody will look at this one", "Till"), ("Does the tent come in green?", "Till"))]
ANSWERS = [dict(instruction="Answer the customer.", input=f"Question {i}?", output=f"Answer {i}, \"quoted\"\nin two lines.") for i in range(3)]
SAID = {"anna": ["Till", "Lookout", "Lookout", 'Q&A "fast"', "Till", FLAG, "Lookout", "-", "Lookout"],
        "ben": ["Till", "Lookout", "Till", 'Q&A "fast"', "Till", FLAG, None, "-", "Till"]}   # None: skipped; "-": never seen
FINAL = ["Till", "Lookout", None, 'Q&A "fast"', "Till", FLAG, "Lookout", None]


@pytest.fixture(scope="module")
def who():
    assert "FTCOURSE_LABELSTUDIO" in os.environ, "run make test-labelstudio: it starts the server"
    return json.loads(os.environ["FTCOURSE_LABELSTUDIO"])


@pytest.fixture(scope="module")
def owner(who): return labelstudio.with_token(labelstudio.Client(who["url"]).sign(who["email"], who["password"]))


@pytest.fixture(scope="module")
def people(who, owner):
    "anna and ben, who signed up by the owner's invitation"
    invite = owner.call("GET", "/api/invite")["token"]
    def new(name): return labelstudio.with_token(labelstudio.Client(who["url"]).sign(f"{name}@example.org", secrets.token_urlsafe(12), invite))
    return {name: new(name) for name in SAID}


def project(owner, title, config, tasks, each=2):
    "A project with these tasks: its number, and the server's number of each task, in our order"
    made = owner.call("POST", "/api/projects", dict(title=title, label_config=config, **(dict(maximum_annotations=each) if each else {})))
    done = owner.call("POST", f"/api/projects/{made['id']}/import", tasks)
    assert done["task_count"] == len(tasks)
    there = owner.call("GET", f"/api/tasks?project={made['id']}&page_size=1000&fields=all")["tasks"]
    return made["id"], [t["id"] for t in sorted(there, key=lambda t: t["id"])], there


def annotate(person, task, result, **more):
    return person.call("POST", f"/api/tasks/{task}/annotations/", dict(result=result, lead_time=4.5, **more))


def export(owner, number, kind="JSON"):
    return owner.call("GET", f"/api/projects/{number}/export?exportType={kind}&download_all_tasks=true")


def entry(name, to, kind, **value): return dict(from_name=name, to_name=to, type=kind, value=value, origin="manual")


def keep(name, exported):
    "With --save: the export as the everyday tests read it, less what the server knows of itself"
    if not os.environ.get("FTCOURSE_LABELSTUDIO_SAVE"): return
    text = json.dumps(exported, ensure_ascii=False, indent=1)
    assert "/home" not in text and "127.0.0.1" not in text
    (HERE/name).write_text(text + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def routed(owner, people):
    "The project of labels, annotated by two people through the API"
    work = Labeling(ROWS, LABELS)
    number, ids, there = project(owner, "route", work.config(), work.tasks(predictions=True))
    for name, labels in SAID.items():
        for task, label in zip(ids, labels):
            if label is None: annotate(people[name], task, [], was_cancelled=True)
            elif label != "-": annotate(people[name], task, [entry("label", "input", "choices", choices=[label])])
    return work, number, there


def names(people): return {p.id: name for name, p in people.items()}


def test_server_takes_config_and_tasks(routed):
    work, _, there = routed
    assert sorted(t["data"]["row"] for t in there) == sorted(work.ids)
    assert {t["data"]["row"]: t["data"]["input"] for t in there} == dict(zip(work.ids, (r["input"] for r in ROWS)))


def test_predictions_are_there(owner, routed):
    task = next(t["id"] for t in routed[2] if t["data"]["row"] == routed[0].ids[0])
    found = owner.call("GET", f"/api/predictions?task={task}")
    assert [p["result"][0]["value"] for p in found] == [{"choices": ["Till"]}] and found[0]["model_version"] == "present"


def test_export_comes_back_exactly(owner, people, routed):
    work, number, _ = routed
    exported = export(owner, number)
    keep("route.json", exported)
    back = work.read(exported, names(people))
    want = {(i, n): label for n, labels in SAID.items() for i, label in enumerate(labels) if label != "-"}
    assert {(a.row, a.annotator): a.value for a in back} == want
    assert all(a.seconds == 4.5 and a.at and "annotation" in a.where for a in back)
    v = majority(back)
    assert [x.value for x in v][:7] == FINAL[:7] and v[7].row == 8 and v[7].tied and v[2].tied
    d, = disagreements(back)
    assert (d["first"], d["second"], d["both"], d["differ"], d["rows"]) == ("anna", "ben", 7, 2, [2, 8])
    merged = work.merge(back)
    assert merged.rows["output"] == ["Till", "Lookout", "Lookout", 'Q&A "fast"', "Till", "Lookout", "Till", "Till"]
    assert (merged.count("changed"), merged.count("tied"), merged.count("dropped")) == (2, 2, 1)
    assert -1 < krippendorff_alpha(ratings(back), resamples=10).value < 1


def test_json_min_says_the_same_but_for_skips(owner, people, routed):
    work, number, _ = routed
    flat = export(owner, number, "JSON_MIN")
    keep("route_min.json", flat)
    full = work.read(export(owner, number), names(people))
    def bare(xs): return {(a.row, a.annotator, a.value) for a in xs if a.value is not None}
    assert bare(work.read(flat, names(people))) == bare(full)
    assert any(t["annotation_id"] is None for t in flat), "the row that nobody saw is an annotation of nobody"


def test_answers(owner, people):
    work = Labeling(ANSWERS, [])
    number, ids, _ = project(owner, "answers", work.config(), work.tasks())
    def box(text, stars, *flag):
        return [entry("answer", "input", "textarea", text=[text]), entry("quality", "input", "rating", rating=stars),
                *(entry("flag", "input", "choices", choices=[f]) for f in flag)]
    better = 'Better: "yes" & <b>no</b>\nfor 40 days.'
    annotate(people["anna"], ids[0], box(ANSWERS[0]["output"], 5)), annotate(people["anna"], ids[1], box(better, 2))
    annotate(people["ben"], ids[1], box(better, 3)), annotate(people["ben"], ids[2], box(ANSWERS[2]["output"], 1, FLAG))
    for kind in ("JSON", "JSON_MIN"):
        exported = export(owner, number, kind)
        keep(f"answers{'_min' if kind == 'JSON_MIN' else ''}.json", exported)
        back = work.read(exported, names(people))
        assert [(a.row, a.annotator, a.value, a.quality) for a in back] == [(0, "anna", ANSWERS[0]["output"], 5), (1, "anna", better, 2),
                                                                           (1, "ben", better, 3), (2, "ben", FLAG, 1)]
        assert work.merge(back).rows["output"] == [ANSWERS[0]["output"], better]


def test_server_checks_the_page_but_not_the_answers(owner, people, routed):
    "What the lesson says of it; so `read` has to"
    with pytest.raises(urllib.error.HTTPError, match="not found in names"):
        owner.call("POST", "/api/projects", dict(title="bad", label_config='<View><Choices name="label" toName="nowhere"><Choice value="a"/></Choices></View>'))
    work = Labeling(ROWS[:1], LABELS)
    for result, says in (([entry("label", "input", "choices", choices=["Tills"])], "the label 'Tills' is none of"),
                         ([entry("mood", "input", "choices", choices=["cross"])], "ignore=.'mood'"), ([], "no 'label' among the answers")):
        number, ids, _ = project(owner, "odd", work.config(), work.tasks())
        annotate(people["anna"], ids[0], result)
        with pytest.raises(ValueError, match=says): work.read(export(owner, number))


def test_a_new_project_asks_one_person_only(owner, people):
    work = Labeling(ROWS[:1], LABELS)
    number, ids, _ = project(owner, "queue", work.config(), work.tasks(), each=None)
    annotate(people["anna"], ids[0], [entry("label", "input", "choices", choices=["Till"])])
    with pytest.raises(urllib.error.HTTPError, match="404"): people["ben"].call("GET", f"/api/projects/{number}/next")


def test_two_people_are_handed_the_same_task(owner, people):
    "With two annotations a task, the queue gives a task to the second person as well, and never twice to one"
    work = Labeling(ROWS[:1], LABELS)
    number, ids, _ = project(owner, "queue", work.config(), work.tasks())
    for p in people.values():
        assert p.call("GET", f"/api/projects/{number}/next")["id"] == ids[0]
        annotate(p, ids[0], [entry("label", "input", "choices", choices=["Till"])])
    with pytest.raises(urllib.error.HTTPError, match="404"): people["anna"].call("GET", f"/api/projects/{number}/next")


@pytest.mark.parametrize("kind", ["pairwise", "rubric"])
def test_rating_study_of_lesson_08b(tmp_path, owner, people, kind):
    rows = [dict(instruction="Answer.", input=f"question {i} & <b>", output=f"answer {i}") for i in range(6)]
    systems = {"old": [f"old reply {i} {'x'*i}" for i in range(6)], "new": [f"new reply {i} {'y'*i}" for i in range(6)]}
    if kind == "rubric": systems.pop("new")
    more = dict(kind=kind, n=6, criteria={"correct": ["no", "yes"], "tone": [1, 2, 3, 4, 5]} if kind == "rubric" else None)
    s, direct = (new_study(tmp_path/f"{name}.db", systems, rows, **more) for name in ("server", "direct"))
    number, ids, there = project(owner, f"study {kind}", s.label_studio_config(), s.to_label_studio())
    task_of = {t["data"]["item"]: t["id"] for t in there}
    def mine(name, i): return ["a", "b", "tie"][(i + (name == "ben")) % 3]
    for name, p in people.items():
        for i in range(6):
            said = [("preference", mine(name, i))] if kind == "pairwise" else [("correct", "yes" if i % 2 else "no"), ("tone", 1 + (i + len(name)) % 5)]
            for c, v in said: direct.save(name, i, c, v)
            annotate(p, task_of[i], [s._result(i, c, v) for c, v in said])
    assert s.from_label_studio(export(owner, number), names(people)) == len(direct.ratings())
    def key(x): return {(r["rater"], r["item"], r["criterion"]): r["rating"] for r in x.ratings()}
    assert key(s) == key(direct) and len(key(s)) == (12 if kind == "pairwise" else 24)


def test_tokens(who, owner):
    "The two kinds of key, as the lesson tells of them"
    me = labelstudio.Client(who["url"]).sign(who["email"], who["password"])
    assert owner.headers["Authorization"].startswith("Bearer ")
    with pytest.raises(urllib.error.HTTPError, match="legacy token authentication has been disabled"): me.with_legacy_token().call("GET", "/api/projects")


def test_legacy_token_where_its_owner_allows_it():
    "A second server, started with the switch that the lesson names"
    with labelstudio.server(legacy=True) as old:
        me = labelstudio.Client(old["url"]).sign(old["email"], old["password"])
        person = me.with_legacy_token()
        assert person.headers["Authorization"].startswith("Token ") and person.call("GET", "/api/current-user/whoami")["email"] == old["email"]


def test_strangers_stay_out(who):
    with pytest.raises(urllib.error.HTTPError, match="401"): labelstudio.Client(who["url"]).call("GET", "/api/projects")
    with pytest.raises(urllib.error.HTTPError, match="403"): labelstudio.Client(who["url"]).sign("eve@example.org", "long-enough-2", "guessed")


BROWSER = next((b for b in map(shutil.which, BROWSERS) if b), None)


@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome: apt install chromium")
def test_by_hand_in_a_browser(who, owner):
    "The page as a person sees it: a label chosen, a prediction changed and one left, an answer mended and one left as it is"
    from playwright.sync_api import expect, sync_playwright
    me = labelstudio.Client(who["url"]).sign(who["email"], who["password"])
    routes, replies = Labeling(ROWS[:3], LABELS), Labeling(ANSWERS, [])
    r, r_ids, _ = project(owner, "by hand: labels", routes.config(), routes.tasks(predictions=True))
    a, a_ids, _ = project(owner, "by hand: answers", replies.config(), replies.tasks())
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args="--no-sandbox --disable-gpu --no-first-run --disable-background-networking".split())
        page = browser.new_context(viewport=dict(width=1400, height=900)).new_page()
        page.context.add_cookies([dict(name=c.name, value=c.value, url=who["url"]) for c in me.jar])
        page.on("dialog", lambda d: pytest.fail(f"a script of the data has run: {d.message}"))
        def at(number, task):
            page.goto(f"{who['url']}/projects/{number}/data?task={task}", timeout=90_000)
            expect(page.locator("button", has_text="Submit").first).to_be_visible(timeout=60_000)
        def submit():
            page.locator("button", has_text="Submit").first.click()
            expect(page.locator("button", has_text="Update").first).to_be_visible(timeout=60_000)
        at(r, r_ids[0])
        expect(page.get_by_text("<script>alert(1)</script>").first).to_be_visible()
        page.get_by_role("checkbox").filter(visible=True).first.wait_for(timeout=60_000)
        page.get_by_text(LABELS[3]).first.click(); submit()     # changed
        at(r, r_ids[1]); submit()                               # left as it was predicted
        at(a, a_ids[0])
        box = page.locator("textarea").first
        expect(box).to_have_value(ANSWERS[0]["output"], timeout=60_000)
        box.fill("Mended by hand"); page.wait_for_timeout(1000); submit()   # the page takes typed text over a moment later
        at(a, a_ids[1]); expect(page.locator("textarea").first).to_have_value(ANSWERS[1]["output"], timeout=60_000); submit()
        browser.close()
    done = export(owner, r)
    keep("by_hand.json", done)
    assert [x.value for x in routes.read(done)] == [LABELS[3], "Till"]
    assert [n["result"][0]["origin"] for t in done for n in t["annotations"]] == ["prediction-changed", "prediction"]
    assert [x.value for x in replies.read(export(owner, a))] == ["Mended by hand", ANSWERS[1]["output"]]
