#!/usr/bin/env python3
"""Every relative link, anchor and path in backticks on the pages exists. Python 3, standard library only.

A path in backticks is relative to the root of the repository or to its page; on pages of docs/kernels also to
lib/kernels/cuda. docs/kernels/log, CHANGELOG.md and the records of docs/adr, which repeat commands from result files,
are history: their links are checked, their paths are not.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = ["*.md", ".github/*.md", "docs/**/*.md", "analysis/*.md", "contrib/*.md", "jobscripts/**/*.md"]
TOP = ["app", "analysis", "contrib", "docs", "examples", "inputs", "jobscripts", "lib", "scripts", "tests"]
SOURCE = re.compile(r"\.(c|cpp|cu|cuh|def|hpp|in|md|py|sh|sweep|svg|toml|xml)$")
GENERATED = ("build/", "results/")  # of a build, and of the reader's own runs
EXAMPLES = {"big.toml", "in.toml", "INPUT.toml", "docs/adr/NAME.md"}  # names that the reader replaces


def history(page):
    record = page.parent.name == "adr" and page.name != "README.md"
    return page.name == "CHANGELOG.md" or "log" in page.parts or record


def prose(text):
    """The page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)


def anchors(page):
    """As GitHub names the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page.read_text()), flags=re.M):
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def link_problems(page, text):
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"link to {link}, which does not exist"
        elif anchor and anchor not in anchors(target):
            yield f"link to {link}, whose page has no such heading"


def path_exists(base, path):
    if re.search(r"[*{]", path):
        patterns = [path]
        while match := re.search(r"\{([^{}]*)\}", patterns[0]):
            patterns = [p.replace(match.group(0), word, 1) for p in patterns for word in match.group(1).split(",")]
        return all(any(base.glob(pattern.lstrip("/"))) for pattern in patterns)
    return (base / path).exists()


def is_path(word, page):
    """Whether a word in backticks names a file or folder of the repository."""
    if not re.fullmatch(r"[\w.+\-*/{},]+", word) or word.startswith(("/", ".", *GENERATED)):
        return False
    first, slash, rest = word.partition("/")
    if slash and (ROOT / first).is_dir():
        return True
    named = SOURCE.search(word) or word.endswith("/") or (slash and "." in rest)
    return bool(named) and (not slash or any((base / first).is_dir() for base in bases_of(page)))


def bases_of(page):
    """Folders that a path on the page may be relative to."""
    return [ROOT, page.parent] + ([ROOT / "lib/kernels/cuda"] if "kernels" in page.parts else [])


def path_problems(page, text, names):
    for token in re.findall(r"`([^`\n]+)`", text):
        for word in token.split():
            word = word.rstrip(",;:").removeprefix("./")
            if word in EXAMPLES or not is_path(word, page):
                continue
            if not any(path_exists(base, word) for base in bases_of(page)) and word not in names:
                yield f"`{word}`, which does not exist"


def problems():
    names = {path.name for path in ROOT.iterdir()}
    for top in TOP:
        names |= {path.name for path in (ROOT / top).rglob("*")}
    pages = sorted({page for pattern in PAGES for page in ROOT.glob(pattern)})
    found = []
    for page in pages:
        text = page.read_text()
        bad = list(link_problems(page, prose(text)))
        if not history(page):
            bad += path_problems(page, prose(text), names)
        found += [f"{page.relative_to(ROOT)}: {problem}" for problem in bad]
    return found, len(pages)


if __name__ == "__main__":
    found, count = problems()
    print("\n".join(found))
    print(f"{count} pages, {len(found)} paths or links that do not exist")
    sys.exit(1 if found or count == 0 else 0)
