"A test of the whole process's memory means something only in a process of its own"
import os, subprocess, sys
from pathlib import Path


def in_own_process(test):
    "Run `test` in a fresh interpreter, with its fixtures"
    if os.environ.get("FTCOURSE_ALONE") == test.__name__: return test
    file = Path(test.__code__.co_filename)
    def wrapper():
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", f"{file}::{test.__name__}"], cwd=file.parent.parent,
                              env={**os.environ, "FTCOURSE_ALONE": test.__name__}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and ("1 passed" in done.stdout or "1 skipped" in done.stdout), done.stdout[-3000:]
    wrapper.__name__, wrapper.__doc__, wrapper.__module__ = test.__name__, test.__doc__, test.__module__
    return wrapper
