"The site, built as `make docs` builds it: complete, without a broken link, and working in a real browser"
import functools, http.server, json, os, re, shutil, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import links, pages  # noqa: E402
from setup import BROWSERS  # noqa: E402

LESSONS = links.lessons()
FILES = "README.md CONTRIBUTING.md LICENSE CITATION.cff settings.ini constraints.txt pyproject.toml _quarto.yml index.qmd".split()
BROWSER = next((b for b in map(shutil.which, BROWSERS) if b), None)
in_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome: apt install chromium")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the repository with the site built in it"
    to = tmp_path_factory.mktemp("site")
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.tmp", "runs")
    for d in ("nbs", "ftcourse"): shutil.copytree(ROOT/d, to/d, ignore=skip)
    for f in FILES: shutil.copy2(ROOT/f, to/f)
    pages.build(to)
    return to


@pytest.fixture(scope="module")
def site(project): return project/"_proc/_docs"


class Page(HTMLParser):
    "Links, ids, text and code of a page"
    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.text, self.inside = [], set(), [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "".join(self.text)

    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if d.get("id"): self.ids.add(d["id"])
        self.links += [d[k] for k in ("href", "src") if d.get(k)]
        if tag in ("script", "style"): self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]: self.inside.pop()

    def handle_data(self, data):
        if not self.inside: self.text.append(data)


@pytest.fixture(scope="module")
def parsed(site): return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html")}


def html_of(path): return path.relative_to(ROOT).with_suffix(".html").as_posix()


def test_every_lesson_has_a_page(parsed):
    assert set(parsed) >= {"index.html", "CONTRIBUTING.html", *map(html_of, LESSONS)}


def test_smalldocs_finds_nothing_new(project):
    p = subprocess.run([Path(sys.executable).with_name("smalldocs"), "check", "_proc"], cwd=project, capture_output=True, text=True)
    assert [l for l in p.stdout.splitlines() if l.strip() and not pages.KNOWN.match(l)] == []


def test_no_broken_link(site, parsed):
    broken = []
    for name, page in parsed.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"): continue
            path, fragment = unquote(urlsplit(urljoin(f"/{name}", link)).path).lstrip("/"), unquote(parts.fragment)
            target = site/(path or "index.html")
            if target.is_dir(): target /= "index.html"
            if not target.is_file(): broken.append(f"{name}: {link}")
            elif fragment and target.suffix == ".html" and fragment not in parsed[target.relative_to(site).as_posix()].ids:
                broken.append(f"{name}: {link} (no such heading)")
    assert not broken


def test_pages_link_to_each_other_without_the_network(parsed):
    "nbdev's own links from names in prose go to the published site, to headings that our pages don't have"
    own = links.addresses()["site"] + "nbs/"
    assert not [l for p in parsed.values() for l in p.links if l.startswith(own)], "skip_procs in pyproject.toml must name add_links"


def test_broken_links_would_be_found(tmp_path):
    (tmp_path/"index.html").write_text('<a href="gone.html"></a><a href="#nowhere"></a>')
    found = {n: Page(tmp_path/n) for n in ("index.html",)}
    with pytest.raises(AssertionError, match="gone.html"): test_no_broken_link(tmp_path, found)


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_nothing_of_a_lesson_is_lost(path, parsed):
    "Title, badge, every paragraph's first words, and the exported code: nothing is a black box"
    page = parsed[html_of(path)]
    flat = re.sub(r"\W+", "", page.text)
    assert re.sub(r"\W+", "", links.title(path)) in flat
    assert any("colab.research.google.com/github" in l for l in page.links), "no badge: does it stand in the title cell?"
    lost = []
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        src = "".join(c["source"])
        if c["cell_type"] == "code" and not re.search(r"^#\|\s*(hide|default_exp|echo|include)\b", src, re.M):
            line = next((l for l in src.splitlines() if l.strip() and not l.startswith(("#|", "%"))), "")
            if re.sub(r"\W+", "", line) not in flat: lost.append(line)
        elif c["cell_type"] == "markdown":
            for m in re.finditer(r"^(?![#>|<\s`\[-])([A-Z][\w ,']{15,60})", src, re.M):
                if re.sub(r"\W+", "", m[1]) not in flat: lost.append(m[1])
    assert not lost


def test_front_page_is_the_readme(parsed):
    words = re.findall(r"^(?![#>|<\s`\[!-])([A-Z][\w ,']{15,60})", (ROOT/"README.md").read_text(encoding="utf-8"), re.M)
    assert words and all(re.sub(r"\W+", "", w) in re.sub(r"\W+", "", parsed["index.html"].text) for w in words)


# In a browser

@pytest.fixture(scope="module")
def url(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=BROWSER, args="--no-sandbox --disable-gpu --no-first-run --disable-background-networking".split())
        yield b
        b.close()


@pytest.fixture
def tab(chromium, url):
    "Opens a page of the site with nothing else within reach; `.errors` holds what went wrong with the site's own files"
    opened = []
    def open_(name, width=1300, height=900, **kw):
        page = chromium.new_page(viewport=dict(width=width, height=height), **kw)
        page.errors = []
        def note(m):
            where = (m.location or {}).get("url", "")
            if m.type == "error" and (not where or where.startswith(url)): page.errors.append(f"{m.text} {where}")
        page.on("console", note)
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        page.route("**/*", lambda r: r.continue_() if r.request.url.startswith((url, "data:")) else r.abort())
        page.goto(f"{url}/{name}")
        opened.append(page)
        return page
    yield open_
    for p in opened: p.close()


@in_browser
@pytest.mark.parametrize("width", [1300, 390], ids=["wide", "phone"])
def test_pages_open_without_errors(tab, parsed, width):
    for name in sorted(parsed):
        page = tab(name, width)
        page.wait_for_load_state("load")
        assert page.errors == [], name
        assert page.locator("h1").first.is_visible(), name
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, f"{name} is wider than the screen"
        dead = page.evaluate("[...document.images].filter(i => i.src.startsWith('data:') && !(i.complete && i.naturalWidth)).length")
        assert not dead, f"{name}: {dead} pictures don't show"
        page.close()


@in_browser
def test_dark_mode_stays_on(tab):
    page = tab("nbs/09_lora.html")
    def back(): return page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = back()
    page.locator(".quarto-color-scheme-toggle").first.click()
    page.wait_for_function(f"getComputedStyle(document.body).backgroundColor != '{light}'")
    dark = back()
    page.reload()
    assert back() == dark, "forgotten after a reload"
    rgb = list(map(int, re.findall(r"\d+", dark)[:3]))
    assert sum(rgb) < 200
    page.locator(".quarto-color-scheme-toggle").first.click()
    page.wait_for_function(f"getComputedStyle(document.body).backgroundColor == '{light}'")


CONTRAST = """() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const back = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > .5) return c; } return [255, 255, 255]; };
  const lum = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b; };
  const own = e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
  const bad = [];
  for (const e of document.querySelectorAll('#quarto-sidebar *, main *, #TOC *')) {
    if (!own(e) || !e.checkVisibility() || e.closest('.cell-output, .katex')) continue;
    const a = lum(rgb(getComputedStyle(e).color)), b = lum(back(e)), ratio = (Math.max(a, b) + .05)/(Math.min(a, b) + .05);
    if (ratio < 2.4) bad.push(`${e.tagName} ${e.className} ${ratio.toFixed(2)} ${e.textContent.trim().slice(0, 30)}`);
  }
  return bad; }"""


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(tab, scheme):
    "A theme's sidebar once stayed white in the dark, with white text on it"
    for name in ("index.html", "nbs/09_lora.html"):
        page = tab(name, color_scheme=scheme)
        assert page.evaluate(CONTRAST) == [], name


@in_browser
def test_search_finds_a_lesson(tab):
    page = tab("index.html")
    page.locator(".sd-search-toggle").first.click()
    page.locator(".smalldocs-search input").first.fill("LoRA from scratch")
    hit = page.locator(".search-result[href*='09_lora']").first
    hit.wait_for(timeout=30000)
    hit.click()
    page.wait_for_url("**/nbs/09_lora.html*")
    assert page.errors == []


@in_browser
def test_sidebar_leads_through_the_chapters(tab):
    page = tab("index.html")
    side = page.locator("#quarto-sidebar")
    assert [side.get_by_text(c, exact=True).count() for c in ("Start", "Ground", "Baseline and measuring", "Training")] == [1]*4
    hrefs = side.locator("a").evaluate_all("a => a.map(x => x.getAttribute('href'))")
    found = [m[1] for h in hrefs if h and (m := re.search(r"nbs/(\w+)\.html", h))]
    assert found == [p.stem for p in LESSONS if p.parent.name == "nbs"]
    side.get_by_text("09 ·").click()
    page.wait_for_url("**/nbs/09_lora.html")
    page.locator(".nav-page-next a, a.pagination-link[aria-label]").last.click()
    page.wait_for_url("**/nbs/09b_speed.html")


@in_browser
def test_sidebar_opens_on_a_phone(tab):
    page = tab("nbs/09_lora.html", 390, 844)
    side = page.locator("#quarto-sidebar")
    def in_sight(): return side.evaluate("""e => { const r = e.getBoundingClientRect(), t = document.elementFromPoint(r.left + r.width/2, (Math.max(r.top, 0) + Math.min(r.bottom, innerHeight))/2);
        return r.width > 100 && r.right > 100 && e.contains(t) }""")
    assert not in_sight()
    page.locator(".quarto-btn-toggle").first.click()
    for _ in range(100):
        if in_sight(): break
        page.wait_for_timeout(100)
    assert in_sight()
    side.get_by_text("04 ·").click()   # smalldocs' sidebar does not scroll on a phone: entries below the screen are out of reach there
    page.wait_for_url("**/nbs/04_formats.html")


@in_browser
def test_formulas_can_be_read(tab, parsed):
    "Drawn where the drawing script can be had, and as their plain source where it can't; never as a stray dollar"
    page = tab("nbs/09_lora.html")
    shown = page.locator("span.math").all_inner_texts()
    assert len(shown) >= 5 and all(t.strip() for t in shown)
    assert page.locator("span.math").first.is_visible()
    assert any(re.search(r"alpha|α", t) for t in shown)
    for name, p in parsed.items():
        if name.startswith("nbs/"): assert "$$" not in p.text, f"{name}: a formula was not recognised"


@in_browser
def test_solutions_unfold(tab):
    page = tab("nbs/09_lora.html")
    fold = page.locator("details").first
    assert not fold.evaluate("d => d.open")
    fold.locator("summary").click()
    assert fold.evaluate("d => d.open")
