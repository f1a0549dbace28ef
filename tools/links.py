"""Make badges, repository links and the site's sidebar agree with pyproject.toml, where the addresses stand.

    python tools/links.py           # rewrite what disagrees, and say which files
    python tools/links.py --check   # only say it; exit 1 if there is anything
"""
import argparse, json, os, re, sys, tomllib
from pathlib import Path
from urllib.parse import urlparse

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("README.md", "CONTRIBUTING.md", "CITATION.cff", "_quarto.yml", "index.qmd")
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
COLAB = re.compile(r"https://colab\.research\.google\.com/github/([\w.-]+)/([\w.-]+)/blob/([\w./-]+?)/(nbs/[\w/.-]+\.ipynb)")
SIDEBAR = re.compile(r'^( *- \{text: )"(.*)"(, href: (nbs/[\w/]+\.ipynb)\})$', re.M)


def addresses(root=ROOT):
    "What pyproject.toml says: `repo` (owner/name), `branch`, `site` (with a closing slash), `package`"
    d = tomllib.loads((root/"pyproject.toml").read_text(encoding="utf-8"))
    urls = d["project"]["urls"]
    return dict(repo=urlparse(urls["Repository"]).path.strip("/"), branch=d["tool"]["nbdev"].get("branch", "main"),
                site=urls["Documentation"].rstrip("/") + "/", package=d["project"]["name"])


def lessons(root=ROOT): return sorted(p for p in (root/"nbs").glob("**/*.ipynb") if p.name[0].isdigit() or p.parent.name == "cases")


def title(path):
    "A lesson's first heading"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = re.search(r"^# (.+)", "".join(cells[0]["source"]) if cells else "", re.M)
    return found[1].strip() if found else None


def ours(text, package):
    "Repositories (owner/name) that `text` takes for this one: in badges, set-up cells, the citation, or by the package's name"
    badges = {f"{m[1]}/{m[2]}" for m in COLAB.finditer(text)}
    named = re.findall(rf"github\.com[/:]([\w-]+/{re.escape(package)})(?![\w-])", text)
    setup = re.findall(rf"{re.escape(package)}(?:\[\w+\])? @ git\+https://github\.com/([\w.-]+/[\w-]+)", text)
    cited = re.findall(r"^repository-code: https://github\.com/([\w.-]+/[\w.-]+)$", text, re.M)
    return badges.union(named, setup, cited)


def mend_links(text, a, old):
    "`text` with every link to this repository, or one of its `old` names, and to its site as pyproject.toml has it"
    for name in old - {a["repo"]}:
        text = re.sub(rf"(github\.com[/:]|githubusercontent\.com/|com/github/){re.escape(name)}(?![\w-])", rf"\g<1>{a['repo']}", text)
    for owner, name in {tuple(o.split("/")) for o in old} | {(r"[\w-]+", a["package"])}:
        text = re.sub(rf"https://{owner}\.github\.io/{re.escape(name)}(?![\w-])/?", a["site"], text)
    text = re.sub(r"^(repository-code: https://github\.com/.*\nurl: ).*$", rf"\g<1>{a['site']}", text, flags=re.M)
    def branch(m): return m[0] if f"{m[1]}/{m[2]}" != a["repo"] else m[0].replace(f"/blob/{m[3]}/", f"/blob/{a['branch']}/")
    return COLAB.sub(branch, text)


def mend_sidebar(text, root=ROOT):
    "`_quarto.yml` with each lesson's number and title in the sidebar"
    def line(m):
        name = title(root/m[4]) if (root/m[4]).exists() else None
        if not name: return m[0]
        number = re.match(r"\d+[a-z]?", Path(m[4]).name)
        return m[1] + json.dumps(f"{number[0]} · {name}" if number else name, ensure_ascii=False) + m[3]
    return SIDEBAR.sub(line, text)


def badge(path, a, root=ROOT):
    "The line that opens the lesson at `path` in Colab"
    return f"{BADGE}(https://colab.research.google.com/github/{a['repo']}/blob/{a['branch']}/{path.relative_to(root).as_posix()})"


def problems(root=ROOT):
    "A sentence for each thing that no rewriting can mend"
    a, out = addresses(root), []
    side = (root/"_quarto.yml").read_text(encoding="utf-8")
    for p in lessons(root):
        rel = p.relative_to(root).as_posix()
        text = "\n".join("".join(c["source"]) for c in json.loads(p.read_text(encoding="utf-8"))["cells"])
        if badge(p, a, root) not in text: out.append(f"{rel}: no Colab badge; put this under the title: {badge(p, a, root)}")
        if rel not in side and not rel.startswith("nbs/cases/"): out.append(f"{rel}: not in the sidebar of _quarto.yml; add it to a chapter")
    for m in SIDEBAR.finditer(side):
        if not (root/m[4]).exists(): out.append(f"_quarto.yml: the sidebar has {m[4]}, which is not there")
    return out


def mend(root=ROOT, check=False):
    "Rewrite the files (unless `check`); returns the names of those that disagreed"
    a, changed = addresses(root), []
    files = [p for p in [root/t for t in TEXTS] + lessons(root) if p.exists()]
    texts = {p: p.read_bytes().decode("utf-8") for p in files}
    known = set().union(*(ours(t, a["package"]) for t in texts.values()))
    for p, old in texts.items():
        new = mend_links(old, a, known)
        if p.name == "_quarto.yml": new = mend_sidebar(new, root)
        if new == old: continue
        changed.append(p.relative_to(root).as_posix())
        if check: continue
        tmp = p.with_suffix(".tmp")
        tmp.write_bytes(new.encode("utf-8"))
        os.replace(tmp, p)
    return changed


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--check", action="store_true", help="change nothing")
    check = p.parse_args().check
    changed = mend(check=check)
    for f in changed: print(f"{f}: links or titles {'disagree with' if check else 'brought in line with'} pyproject.toml and the lessons")
    left = problems()
    for s in left: print(s)
    if not changed and not left: print("All links and titles agree with pyproject.toml.")
    sys.exit(bool(left or (check and changed)))


if __name__ == "__main__": main()
