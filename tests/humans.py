"What real systems wrote for the E2E challenge, and its references; `FTCOURSE_DATA` says where they are"
import csv, os
from functools import cache
from pathlib import Path
import pytest

ROOT = Path(os.environ.get("FTCOURSE_DATA") or Path(__file__).resolve().parents[2]/"shared"/"data")
OFFICIAL = dict(tgen=.6593, slug=.6619, nle=.6534, harv=.6496, gong=.6422, adapt=.5092, chen=.5859,
                tuda=.5657)
NIST = dict(tgen=8.5923, slug=8.5824, nle=8.4757, harv=8.4615, gong=8.3453, adapt=7.1954, chen=5.1265,
            tuda=7.4544)
CIDER = dict(tgen=2.2338)   # Dušek, Novikova and Rieser 2018; with Java's PTB tokeniser
needs_e2e = pytest.mark.skipif(not (ROOT/"e2e_humans").is_dir(),
    reason="needs the E2E data: set FTCOURSE_DATA to the folder that holds e2e and e2e_humans")


def unquote(s):
    s = s.strip()
    q = s[:1]
    return s[1:-1].replace(q*2, q) if q in {'"', "'"} and s.endswith(q) else s


@cache
def tables():
    found = {}
    with open(ROOT/"e2e/testset_w_refs.csv", encoding="utf-8") as f:
        for r in csv.DictReader(f): found.setdefault(r["mr"], []).append(r["ref"])
    return found


def references(): return list(tables().values())


@cache
def outputs(system):
    text = (ROOT/"e2e_humans/outputs"/f"{system}.tsv").read_bytes().decode("utf-8-sig")
    pairs = [line.split("\t") for line in text.strip("\n").split("\n")[1:]]
    assert [unquote(p[0]) for p in pairs] == list(tables()), system   # aligned with the references
    return [unquote(p[1]) for p in pairs]


def systems(): return sorted(p.stem for p in (ROOT/"e2e_humans/outputs").glob("*.tsv"))


def streams(refs):
    "Rows of references as sacreBLEU wants them"
    return [[r[k] if k < len(r) else None for r in refs] for k in range(max(map(len, refs)))]
