"A real JupyterLab in a real Chromium: rate twenty, kill the kernel in between, resume, and the results are right"
import os, re, signal
import pytest
from lab import in_browser, jupyterlab, opened, wait_for, write_notebook
from ftcourse.rating import new_study, open_study

pytestmark = in_browser
EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
SYSTEMS = {"secret-tuned": [f"alpha says {i} {EVIL}" for i in range(20)], "secret-base": [f"beta says {i} <b>bold</b>" for i in range(20)]}
ROWS = [dict(input=f"question {i} {EVIL}") for i in range(20)]
CELL = """import os, pathlib
from ftcourse.rating import open_study
pathlib.Path("kernel.pid").write_text(str(os.getpid()))
open_study("ratings.db").rate("anna")"""


def wanted(number): return "tie" if number % 5 == 4 else "alpha" if number % 3 else "beta"   # what the rater thinks of question `number`


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A folder with a study, and the address of the notebook that rates it"
    home = tmp_path_factory.mktemp("lab")
    new_study(home/"ratings.db", SYSTEMS, ROWS)
    write_notebook(home/"rate.ipynb", CELL)
    with jupyterlab(home, "rate.ipynb") as url: yield home, url


@pytest.fixture
def page(lab):
    with opened(lab[1]) as page: yield page


def keys(page): return page.get_by_placeholder("click here, then use the keys")


def run_cell(page, home, old=None):
    "Run the cell, and wait for the rating screen of the kernel that ran it"
    page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
    page.keyboard.press("Control+Enter")
    pid = home/"kernel.pid"
    wait_for(lambda: pid.exists() and pid.read_text() not in ("", str(old)), 40, "the cell did not run")
    keys(page).wait_for()
    return int(pid.read_text())


def shows(page, done):
    "Wait until the screen says so, and is ready for the next key"
    from playwright.sync_api import expect
    page.locator(f'.ft-head[data-done="{done}"]').wait_for()
    expect(keys(page)).to_have_value("")


def choice(page):
    "The key for what the rater wants of the question on the screen"
    left, right = (page.locator(f".ft-{s}").inner_text() for s in ("left", "right"))
    assert EVIL in left + right, "text was not shown as text"
    want = wanted(int(re.search(r"says (\d+)", left)[1]))
    return "0" if want == "tie" else "1" if want in left else "2"


def rate(page, study, until, click=False):
    "Rate until so many are done; each must be on the disk before the screen moves on"
    while (n := study.done("anna")[0]) < until:
        shows(page, n)
        key = choice(page)
        if click: page.wait_for_timeout(350); page.locator(".jp-OutputArea button").filter(has_text=re.compile(rf"^{key} ·")).click()
        else: keys(page).press(key)
        shows(page, n + 1)
        assert study.done("anna")[0] == n + 1, "the screen said so before the disk had it"


def test_rate_twenty_with_a_kernel_killed_in_between(lab, page):
    home, _ = lab
    study = open_study(home/"ratings.db")
    pid = run_cell(page, home)
    rate(page, study, 9)
    rate(page, study, 11, click=True)
    page.wait_for_function("document.activeElement.placeholder == 'click here, then use the keys'")   # or a key would be a command
    page.keyboard.press("x")
    page.get_by_text("No choice has the key").wait_for()
    assert page.locator(".jp-Notebook .jp-Cell").count() == 1 and page.locator(".jp-CodeCell").count() == 1, "a key reached the notebook"

    os.kill(pid, signal.SIGKILL)
    keys(page).press("1")   # falls on a dead kernel
    dialog = page.locator(".jp-Dialog").filter(has_text="appears to have died")
    dialog.get_by_role("button", name="Ok").click()
    assert study.done("anna")[0] == 11 and len(study.ratings()) == 11, "neither lost nor invented"

    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
    assert run_cell(page, home, pid) != pid
    shows(page, 11)
    rate(page, study, 20)
    page.get_by_text("All done, and all saved. Thank you.").wait_for()

    assert "secret-" not in page.content(), "a system's name reached the browser"
    assert page.evaluate("window.hacked") is None
    votes = study.votes()
    assert len(votes) == 20
    name = {"alpha": "secret-tuned", "beta": "secret-base", "tie": None}
    for v in votes: assert v["winner"] == name[wanted(v["row"])], v
    wins = sum(v["winner"] == "secret-tuned" for v in votes) + .5*sum(v["winner"] is None for v in votes)
    assert study.strengths().versus("secret-tuned", "secret-base")[0] == pytest.approx((wins + .5)/21)
