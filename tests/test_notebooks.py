"Every lesson's unflagged cells run from top to bottom on the small budget (`[test]` in settings.ini)"
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
from lessons import run_lesson  # noqa: E402

LESSONS = sorted(p for p in (ROOT/"nbs").glob("**/*.ipynb") if p.name[0].isdigit() or p.parent.name == "cases")


def test_there_are_lessons(): assert LESSONS


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_runs(path, monkeypatch, tmp_path):
    before = path.read_bytes()
    monkeypatch.setenv("FTCOURSE_PROFILE", "test")
    monkeypatch.setenv("FTCOURSE_RUNS", str(tmp_path/"runs"))
    run_lesson(path, profile="test", save=False, timeout=900)
    assert path.read_bytes() == before, "the lesson wrote over itself"
