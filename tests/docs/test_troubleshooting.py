#!/usr/bin/env python3
"""docs/TROUBLESHOOTING.md and the messages in the sources: every error that a user can get has a row, and every symptom
on the page is still printed by something. Python 3, standard library only.

A symptom is text in backticks in the first column; its parts between dots occur in this order in one message.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "TROUBLESHOOTING.md"
# Errors whose text comes from where they are thrown: each place, with its reason in brackets and what to do.
GENERAL = {"lib/nsa/config/lengths.cpp", "lib/nsa/config/toml.hpp", "lib/nsa/results/hdf5/h5.cpp"}
TEST_BUILDS = {"lib/kernels/diagnostics/fault_injection.cpp", "lib/kernels/diagnostics/fault_injection.hpp"}
# What launchers, batch systems, libraries and CMake print; and names.
OTHERS = """Could NOT find|There are not enough slots|mpirun has detected|error while loading|Illegal instruction|
Unable to find reachable|ncclSystemError|unhandled system error|ORTE has lost|Requested node|Segmentation fault|
Failing at address|srun|HDF5_USE_FILE_LOCKING|cv|RESULT: INVALID|--advise|[input] file|selection|batch.file|/dev/shm|
--gpus-per-task|--gpu-bind|JobRequeue=0|--no-requeue|mixed|PMIx|unknown key|in.toml|--strict|FALLBACK|
nsa-analysis model --machine|nsa: warning: ... cannot reach|memory holds something else|FILE:4:10""".replace("\n", "")


def messages():
    """(place, text): the literals of every UserError, joined by dots where a value stands between them."""
    for top in ("app", "lib"):
        for file in sorted((ROOT / top).rglob("*")):
            name = file.relative_to(ROOT).as_posix()
            if file.suffix not in {".cpp", ".hpp", ".cu", ".cuh"} or name in TEST_BUILDS | GENERAL:
                continue
            text = file.read_text()
            for match in re.finditer(r"throw (?:UserError|AgreedError)\(", text):
                call, depth = "", 0
                for part in re.finditer(r'"((?:[^"\\]|\\.)*)"|[()]|[^"()]+', text[match.end() - 1 :]):
                    depth += {"(": 1, ")": -1}.get(part[0], 0)
                    call += part[1].replace('\\"', '"') if part[1] is not None else "" if part[0].isspace() else "..."
                    if depth == 0:
                        break
                call = re.sub(r"\{[^}]*\}", "...", call)
                if re.search(r"[a-z]{3}", call) and "NSA_FAULT" not in call:
                    yield f"{name}:{text.count(chr(10), 0, match.start()) + 1}", call


def symptoms():
    """Symptoms by row: [["cannot read", "give the path of"], ...]."""
    for line in PAGE.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| symptom"):
            for text in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
                yield text, [part for part in re.split(r"\s*\.\.\.\s*", text) if part]


def holds(text, parts):
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def main():
    printed, rows, problems = list(messages()), list(symptoms()), []
    for place, text in printed:
        if not any(len("".join(parts)) > 8 and holds(text, parts) for _, parts in rows):
            problems.append(f"{place}: no row of {PAGE.name} has this message: {text}")
    sources = "\n".join(file.read_text(errors="replace") for top in ("app", "lib", "cmake", "scripts", "analysis")
                        for file in sorted((ROOT / top).rglob("*"))
                        if file.suffix in {".cpp", ".hpp", ".cu", ".cuh", ".cmake", ".sh", ".py"})  # fmt: skip
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # literals that go on in the next line
    for text, parts in rows:
        known = any(other.strip() and other.strip() in text or text in other for other in OTHERS.split("|"))
        if not known and not all(part in sources or re.sub(r"\b\d+\b", "", part) == "" for part in parts):
            problems.append(f"{PAGE.name}: nothing prints `{text}`")
    print("\n".join(problems) or f"{len(printed)} messages, {len(rows)} symptoms: every message has a row")
    return 1 if problems or len(printed) < 40 else 0


if __name__ == "__main__":
    sys.exit(main())
