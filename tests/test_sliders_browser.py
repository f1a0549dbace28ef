"The lessons' sliders, in a real JupyterLab in a real Chromium: a knob is turned by keyboard, and what is shown follows"
import base64, io, re
from pathlib import Path
import nbformat, pytest
from PIL import Image
from playwright.sync_api import expect
from lab import ROOT, in_browser, jupyterlab, opened, wait_for, write_notebook
from ftcourse.memory import planner_html

pytestmark = in_browser
expect.set_options(timeout=30_000)   # two test processes share the machine
# The picture of lesson 09c needs the update of a trained model; any matrices do to see that the sliders turn it
STANDS_IN = """import matplotlib.pyplot as plt, torch
from ftcourse.variants import captured
BLUE, ORANGE = "#0072B2", "#D55E00"
g = torch.Generator().manual_seed(0)
before = {f"model.layers.{i}.mlp.gate_proj.weight": torch.randn(300, 200, generator=g) for i in range(2)}
deltas = {n: m/torch.arange(1, 201) for n, m in before.items()}"""


def cells_with(lesson, *beginnings):
    "The code cells of a lesson that begin so, in this order"
    cells = [c.source for c in nbformat.read(ROOT/"nbs"/lesson, 4).cells if c.cell_type == "code"]
    return [next(c for c in cells if re.sub(r"^#\|.*\n", "", c).startswith(b)) for b in beginnings]


PLAN = cells_with("13_memory.ipynb", "planner(")[0]
PICTURE = cells_with("09c_variants.ipynb", "LAYER = next(", "import io\nimport ipywidgets as w", "panel")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "Both lessons' sliders in one notebook, run"
    home = tmp_path_factory.mktemp("lab")
    write_notebook(home/"sliders.ipynb", f"from ftcourse.memory import planner\n{PLAN}", "\n".join([STANDS_IN, *PICTURE]))
    with jupyterlab(home, "sliders.ipynb") as url, opened(url) as page:
        page.set_viewport_size(dict(width=1400, height=2400))   # both outputs at once: what is out of sight is not drawn
        page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
        for _ in range(2): page.keyboard.press("Shift+Enter")
        page.locator(".jp-OutputArea img[src^=blob]").wait_for(timeout=180_000)
        yield page


def slider(area, name): return area.locator(f'.widget-slider:has(label:text-is("{name}")) .noUi-handle')


def plain(html): return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html.split("</p>")[0])).strip()


def test_the_planner_follows_its_knobs(page):
    start = dict(model="Llama-2-7B", method="QLoRA", r=8, batch=1, length=512, checkpointing=True, loss="plain", optimizer="adamw", gpu="RTX 4090")
    verdict = page.locator(".widget-html-content p").first
    expect(verdict).to_have_text(plain(planner_html(**start)))
    slider(page, "batch").focus()
    for _ in range(3): page.keyboard.press("ArrowRight")
    expect(verdict).to_have_text(plain(planner_html(**{**start, "batch": 4})))
    page.get_by_label("gpu").select_option("T4")
    expect(verdict).to_have_text(plain(planner_html(**{**start, "batch": 4, "gpu": "T4"})))
    page.get_by_label("method").select_option("full")
    last = plain(planner_html(**{**start, "batch": 4, "gpu": "T4", "method": "full"}))
    assert "does not fit" in last
    expect(verdict).to_have_text(last)


def test_the_picture_of_rank_and_alpha_follows_its_sliders(page, tmp_path):
    picture = page.locator(".jp-OutputArea img[src^=blob]")
    area = page.locator(".jp-OutputArea:has(img[src^=blob])")
    def seen():
        "The picture as the browser has it, and not only its address"
        data = page.evaluate("""async () => { const b = await (await fetch(document.querySelector('.jp-OutputArea img[src^=blob]').src)).arrayBuffer();
                                return btoa(String.fromCharCode(...new Uint8Array(b))) }""")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.width > 400 and len(image.convert("L").getcolors()) > 20, "an empty picture"
        return image.tobytes()
    pictures = [seen()]
    for name, key in (("r", "ArrowRight"), ("r", "End"), ("alpha", "Home")):
        was = picture.get_attribute("src")
        slider(area, name).press(key)
        wait_for(lambda: picture.get_attribute("src") != was, 30, f"{key} on {name} turned nothing")
        pictures.append(seen())
    assert len(set(pictures)) == 4, "a picture came twice"
    page.screenshot(path=tmp_path/"sliders.png")
    assert Path(tmp_path/"sliders.png").stat().st_size > 20_000
