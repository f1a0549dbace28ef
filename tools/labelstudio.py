"""A real Label Studio for the tests: an environment of its own, a server on this machine alone, and nothing left running.

    python tools/labelstudio.py          # install once, start, run tests/labelstudio, stop: `make test-labelstudio`
    python tools/labelstudio.py --save   # and keep the server's exports, which tests/test_labeling.py reads without a server
    python tools/labelstudio.py -k study # some of the tests: what else is given goes to pytest
"""
import argparse, contextlib, hashlib, http.client, http.cookiejar, json, os, secrets, shutil, signal, socket, subprocess, sys, tempfile, time
import urllib.error, urllib.parse, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT/".venv-labelstudio"
PIN = "label-studio==1.23.2"
QUIET = dict(COLLECT_ANALYTICS="0", LATEST_VERSION_CHECK="0", SENTRY_DSN="", FRONTEND_SENTRY_DSN="", FEATURE_FLAGS_OFFLINE="1",
             DISABLE_SIGNUP_WITHOUT_LINK="1", DJANGO_DB="sqlite", HTTP_PROXY="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9",
             NO_PROXY="127.0.0.1,localhost")   # nothing is counted, asked or sent: what would leave this machine meets a dead proxy


class Stop(Exception): "A sentence for the reader: what is wrong and what to do"


def install(venv=VENV, pin=PIN):
    "Label Studio in `venv`, which is kept for the next time; the seconds it took, 0 if it was there. Raises `Stop`"
    start, python, stamp = time.time(), venv/"bin/python", venv/".stamp"
    want = hashlib.sha256(repr((pin, sys.version_info[:2], str(venv))).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == want: return 0.
    if shutil.disk_usage(venv.parent).free < 3e9: raise Stop(f"{pin} needs 3 GB of disk beside {venv}; make room and run this again.")
    print(f"Installing {pin} into {venv.name} (about 4 minutes, 1 GB, once) …", flush=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", pin])
    if done.returncode: raise Stop(f"pip could not install {pin}; its last words are above. It wants Python 3.10 to 3.13 (this is "
                                   f"{sys.version.split()[0]}) and a package index. An older one: --pin label-studio==1.20.0")
    if (venv/"empty").exists(): shutil.rmtree(venv/"empty")
    print("Making an empty database (about 2 minutes, once) …", flush=True)   # hundreds of migrations; each start copies the result
    log = (venv/"empty.log").open("w")
    if subprocess.run([venv/"bin/label-studio", "version", "--data-dir", venv/"empty"], env=environment(venv), cwd=venv,
                      stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT).returncode:
        raise Stop(f"{pin} could not make its database: see {venv.name}/empty.log")
    stamp.write_text(want)
    return time.time() - start


def environment(home):
    "Variables for Label Studio: its own home, and none of this project's or the reader's Python"
    keep = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith(("LABEL_STUDIO", "PYTHON", "FTCOURSE"))}
    return {**keep, **QUIET, "HOME": str(home)}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Client:
    "One person at the server: signs in as in a browser, then works by token"
    def __init__(self, url):
        self.url, self.headers, self.jar = url, {}, http.cookiejar.CookieJar()
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(self.jar))

    def call(self, method, path, body=None, form=False, raw=False, **headers):
        "The answer to a request, as JSON unless `raw`; HTTPError with the server's words"
        data = None if body is None else urllib.parse.urlencode(body).encode() if form else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/x-www-form-urlencoded" if form else "application/json"}
        request = urllib.request.Request(self.url + path, data, {**self.headers, **kind, **headers}, method=method)
        try:
            with self.opener.open(request, timeout=60) as r: text = r.read().decode()
        except urllib.error.HTTPError as e:
            e.words = e.read().decode(errors="replace")
            e.msg = f"{e.msg}: {method} {path}: {e.words[:500]}"
            raise
        return text if raw else json.loads(text or "null")

    def sign(self, email, password, invite=None):
        "Sign in, or up with the token of an invitation"
        page = "/user/login/" if invite is None else f"/user/signup/?token={invite}"
        self.call("GET", page, raw=True)
        self.call("POST", page, dict(email=email, password=password, csrfmiddlewaretoken=self.csrf()), form=True, raw=True, Referer=self.url + page)
        self.id = self.call("GET", "/api/current-user/whoami")["id"]   # 401 if that was not accepted
        return self

    def csrf(self): return next(c.value for c in self.jar if c.name == "csrftoken")

    def with_legacy_token(self):
        "What every version has: one key for ever, `Authorization: Token …`. New servers refuse it unless their owner allows it"
        key = self.call("GET", "/api/current-user/token")["token"]
        return self._as(f"Token {key}")

    def with_access_token(self):
        "What versions since 1.17 prefer: a personal token is traded for one that lasts minutes, `Authorization: Bearer …`"
        mine = self.call("POST", "/api/token/", {}, **{"X-CSRFToken": self.csrf(), "Referer": self.url})["token"]
        fresh = self._as(None).call("POST", "/api/token/refresh/", dict(refresh=mine))["access"]
        return self._as(f"Bearer {fresh}")

    def _as(self, authorization):
        "The same person without cookies"
        other = Client(self.url)
        other.id, other.headers = self.id, {"Authorization": authorization} if authorization else {}
        return other


def with_token(client):
    "The person, by the kind of token that this server takes"
    try: return client.with_access_token()
    except urllib.error.HTTPError as e:
        if e.code != 404: raise
        return client.with_legacy_token()   # before 1.17


def _die_with_parent():
    "On Linux the kernel ends the server when this process goes, even by kill -9"
    with contextlib.suppress(Exception):
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextlib.contextmanager
def server(venv=VENV, legacy=False, seconds=240):
    "A running server in a folder of its own: `url`, and the owner's `email` and `password`. It ends with the block. Raises `Stop`"
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="labelstudio-"))
    who = dict(url=f"http://127.0.0.1:{port}", email="owner@example.org", password=secrets.token_urlsafe(16))
    env = {**environment(folder), "LABEL_STUDIO_USERNAME": who["email"], "LABEL_STUDIO_PASSWORD": who["password"]}
    shutil.copytree(venv/"empty", folder/"data")
    command = [venv/"bin/label-studio", "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port), "--data-dir", folder/"data"]
    log = (folder/"log").open("w")
    process = subprocess.Popen([*command, *["--enable-legacy-api-token"]*legacy], env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log,
                               stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent)
    try:
        _wait(process, who["url"], folder/"log", seconds)
        yield who
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(10)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL); process.wait()
        log.close(); shutil.rmtree(folder, ignore_errors=True)


def _wait(process, url, log, seconds):
    "Until the server says that it is well"
    end = time.time() + seconds
    while time.time() < end:
        if process.poll() is not None: break
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            if Client(url).call("GET", "/health")["status"] == "UP": return
        time.sleep(.5)
    why = f"ended with {process.returncode}" if process.poll() is not None else f"was not up after {seconds} s"
    raise Stop(f"Label Studio {why}. Its last words:\n{log.read_text(errors='replace')[-3000:]}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--pin", default=PIN, help=f"what to install; default {PIN}")
    p.add_argument("--save", action="store_true", help="keep the exports in tests/labelstudio")
    a, more = p.parse_known_args()   # the rest is pytest's: -k browser
    for s in (signal.SIGTERM, signal.SIGHUP): signal.signal(s, lambda *_: sys.exit(1))   # so that the server is stopped
    took = install(pin=a.pin)
    start = time.time()
    with server() as who:
        up = time.time() - start
        print(f"{a.pin} is up at {who['url']} after {up:.0f} s", flush=True)
        env = {**os.environ, "FTCOURSE_LABELSTUDIO": json.dumps(who), "FTCOURSE_LABELSTUDIO_SAVE": "1" if a.save else ""}
        failed = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/labelstudio", *more], cwd=ROOT, env=env).returncode
    print(f"Installing took {took:.0f} s, starting {up:.0f} s, all but installing {time.time() - start:.0f} s; the server is stopped.")
    return failed


if __name__ == "__main__":
    try: sys.exit(main())
    except Stop as e: sys.exit(str(e))
