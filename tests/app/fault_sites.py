"""What a program with fault hooks in it cannot hide: the variable's name and the names of the sites."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]


def sites():
    """Every site that the sources name."""
    found = set()
    for top in ("lib", "app"):
        for file in (ROOT / top).rglob("*.[chu]*"):
            found.update(re.findall(r'(?:fault::at|flip|refuse_launch)\(\s*"([^"]+)"', file.read_text()))
    return sorted(found)


def traces(binary):
    """Those of them that the program holds."""
    content = pathlib.Path(binary).read_bytes()
    return [name for name in ["NSA_FAULT:", *sites()] if name.encode() in content]
