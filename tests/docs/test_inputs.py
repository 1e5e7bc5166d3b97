#!/usr/bin/env python3
"""inputs/README.md lists every input and no other, and the paths of inputs that files name exist.

docs/adr holds the commands that result files recorded, under the names that inputs had then; they are not checked.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
INPUTS = ROOT / "inputs"
FOLDERS = ["app", "analysis", "contrib", "docs", "examples", "inputs", "jobscripts", "lib", "scripts", "tests", ".ci"]
INPUT = re.compile(r"\binputs/[\w/.-]*\w\.(?:toml|sweep|h5)\b")
SUFFIXES = {".cpp", ".def", ".hpp", ".md", ".py", ".sh", ".sweep", ".toml", ".xml", ""}


def listing_problems():
    """Differences between the first columns of inputs/README.md and the folder."""
    rows = re.findall(r"^\|([^|]*)\|", (INPUTS / "README.md").read_text(), flags=re.M)
    listed = set(re.findall(r"`([\w/]+\.(?:toml|sweep))`", " ".join(rows)))
    found = (path for path in INPUTS.rglob("*") if path.suffix in (".toml", ".sweep"))
    present = {path.relative_to(INPUTS).as_posix() for path in found}
    yield from (f"inputs/README.md does not list {name}" for name in sorted(present - listed))
    yield from (f"inputs/README.md lists {name}, which does not exist" for name in sorted(listed - present))


def files():
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in SUFFIXES)
    for folder in FOLDERS:
        yield from (path for path in (ROOT / folder).rglob("*")
                    if path.is_file() and path.suffix in SUFFIXES and path.parent.name != "adr")


def path_problems():
    for path in files():
        for name in set(INPUT.findall(path.read_text(errors="ignore"))):
            if not (ROOT / name).is_file():
                yield f"{path.relative_to(ROOT)} names {name}, which does not exist"


if __name__ == "__main__":
    found = [*listing_problems(), *path_problems()]
    print("\n".join(found))
    print(f"{len(found)} inputs that are not listed or do not exist")
    sys.exit(1 if found else 0)
