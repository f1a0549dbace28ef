"What every test shares: no hub, one place for real data, no benchmark by accident"
import os
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")            # a test that needs the hub is no test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads and forks don't mix
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
if "FTCOURSE_DATA" not in os.environ and (ROOT.parent/"shared"/"data").is_dir():
    os.environ["FTCOURSE_DATA"] = str(ROOT.parent/"shared"/"data")


def pytest_ignore_collect(collection_path, config):
    "Benchmarks and the tests against a server run when asked for (`make bench`, `make test-labelstudio`), never with the tests"
    for folder in ("benchmarks", "labelstudio"):
        if folder in _parts(collection_path): return None if any(folder in _parts(str(a).split("::")[0]) for a in config.args) else True


def _parts(path): return Path(os.path.relpath(path, ROOT)).parts


def pytest_collection_modifyitems(items):
    "Cheap tests first, lessons last; those marked `cuda` wait for a GPU"
    last = ("test_site.py", "test_notebooks.py")
    items.sort(key=lambda i: last.index(i.path.name) + 1 if i.path.name in last else 0)
    for i in items:   # under `-n 2` a file stays in one process, for its fixtures' sake; lessons go one by one
        if i.config.pluginmanager.hasplugin("xdist") and i.path.name != "test_notebooks.py":
            i.add_marker(pytest.mark.xdist_group(i.path.stem))
    if not any(i.get_closest_marker("cuda") for i in items): return
    import torch
    if torch.cuda.is_available(): return
    for i in items:
        if i.get_closest_marker("cuda"): i.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root(): return ROOT
