"A JupyterLab of its own for a test, and a Chromium that looks at it"
import json, os, shutil, signal, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
from setup import BROWSERS  # noqa: E402

BROWSER = next((b for b in map(shutil.which, BROWSERS) if b), None)
in_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome: apt install chromium")
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking".split()


def wait_for(true, seconds, what, log=None):
    end = time.time() + seconds
    while time.time() < end:
        try:
            if true(): return
        except OSError: pass
        time.sleep(.1)
    raise AssertionError(what + (":\n" + log.read_text()[-2000:] if log else ""))


def write_notebook(path, *sources):
    "A notebook with these code cells"
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=s) for i, s in enumerate(sources)]
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, cells=cells,
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})))


@contextmanager
def jupyterlab(home, notebook):
    "The address of `notebook` in a JupyterLab that has its settings, runtime and working folder all in `home`"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home), "IPYTHONDIR": str(home/".ipython"), "JUPYTER_CONFIG_DIR": str(home/".config"),
           "JUPYTER_RUNTIME_DIR": str(home/".run"), "JUPYTER_DATA_DIR": str(home/".data"), "JUPYTERLAB_SETTINGS_DIR": str(home/".set"),
           "JUPYTERLAB_WORKSPACES_DIR": str(home/".spaces")}
    quiet = home/".set/@jupyterlab/apputils-extension"   # no question about news over the page
    quiet.mkdir(parents=True)
    (quiet/"notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}')
    log = open(home/"lab.log", "w")
    p = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                          "--IdentityProvider.token=t", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                          f"--ServerApp.root_dir={home}"], cwd=home, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: urlopen(f"http://127.0.0.1:{port}/api/status?token=t", timeout=2).status == 200, 40, "JupyterLab does not answer", home/"lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/{notebook}?token=t"
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        try: p.wait(10)
        except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL)
        log.close()


@contextmanager
def opened(url):
    "`url` in a Chromium that reaches nothing but this machine"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1200, height=900))
        page.set_default_timeout(30_000)
        page.route("**/*", lambda r: r.continue_() if r.request.url.startswith(("http://127.0.0.1", "data:", "blob:")) else r.abort())
        page.goto(url)
        yield page
        browser.close()
