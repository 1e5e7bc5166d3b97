#!/usr/bin/env python3
"""Runs the commands of README.md, block after block in one shell, in a copy of the repository's root.

Every ```sh and ```python block runs, in order. A block whose first line is a comment that begins with "# needs" or
"# takes" is skipped, and the line is printed as the reason. Nothing is built or installed:
- `scripts/build.sh` is replaced by a stand-in, so that ./quickstart.sh runs the program that was built before;
- `./test.sh` is replaced by one too: it would run this test;
- `python3 -m venv` and `pip install` are left to tests/analysis/run.sh, in whose environment this test runs; it checks
  that what they install can be imported.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = ["analysis", "contrib", "docs", "examples", "inputs", "jobscripts", "machines", "quickstart.sh", "tests"]
TIMEOUT = 500  # seconds
MODULES = {"./analysis": "nsa_analysis"}  # what `pip install` is told, and the module it gives


def blocks(text):
    """(line, language, text) of every block in backticks."""
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.M | re.S):
        yield text.count("\n", 0, match.start()) + 2, match.group(1), match.group(2)


def skip_reason(block):
    first = block.split("\n", 1)[0]
    return first.removeprefix("# ") if re.match(r"# (needs|takes) ", first) else None


def stand_in(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make_root(folder):
    """What the commands find in the repository's root."""
    for name in SHARED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "scripts").mkdir()
    for path in (ROOT / "scripts").iterdir():
        if path.name != "build.sh":
            (folder / "scripts" / path.name).symlink_to(path)
    stand_in(folder / "scripts/build.sh", "#!/bin/sh\n[ \"$1\" = host ]\n")
    stand_in(folder / "test.sh", "#!/bin/sh\necho 'not run: this test is part of it'\n")
    (folder / "build/host").mkdir(parents=True)
    (folder / "build/host/nsa").symlink_to(os.environ["NSA_BINARY"])


def check_install(line):
    """The packages of a `pip install` line are here."""
    for word in line.split("#")[0].split()[2:]:
        assert not word.startswith("./") or (ROOT / word / "pyproject.toml").is_file(), f"no package in {word}"
        module = MODULES.get(word, word)
        assert importlib.util.find_spec(module), f"{word} cannot be imported by this test's Python"


def script_of(text):
    """One bash script of all blocks; each says where it begins."""
    script = ["set -eo pipefail"]
    for number, language, block in blocks(text):
        if language not in ("sh", "python"):
            continue
        if reason := skip_reason(block):
            script.append(f"echo '== README.md:{number}: skipped: '" + repr(reason))
            continue
        script.append(f"echo '== README.md:{number}'")
        if language == "python":
            script.append(f"python3 - <<'EndOfBlock'\n{block}EndOfBlock")
            continue
        for line in block.splitlines():
            if re.match(r"pip install ", line):
                check_install(line)
            elif not re.match(r"python3 -m venv ", line):
                script.append(line)
    return "\n".join(script) + "\n"


def main():
    for name in ("quickstart.sh", "test.sh", "scripts/build.sh"):
        assert os.access(ROOT / name, os.X_OK), f"{name} is not there or cannot be run"
    text = (ROOT / "README.md").read_text()
    for command in ("./quickstart.sh", "./test.sh"):
        assert re.search(rf"^{re.escape(command)}( |$)", text, flags=re.M), f"README.md has no command {command}"
    script = script_of(text)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "NSA"))}
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + environment["PATH"]
    with tempfile.TemporaryDirectory(prefix="nsa-readme-") as folder:
        make_root(pathlib.Path(folder))
        done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT)
    print(done.stdout)
    if done.returncode != 0:
        print(f"a command of README.md ended with exit code {done.returncode}, in the last block above")
    return 1 if done.returncode != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
