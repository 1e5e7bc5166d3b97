#!/usr/bin/env python3
"""Includes point one way, folder by folder, and each foreign header stays in its module (docs/ARCHITECTURE.md).

Prints the folder graph. Fails on an arrow that ALLOWED lacks, on an arrow of ALLOWED that no include needs, on a
circle, on a foreign header outside its module, and on a folder (of TOPS) that shows more than a dozen entries.
"""
import collections
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUFFIXES = {".hpp", ".cpp", ".cu", ".cuh"}
MAX_ENTRIES = 12
TOPS = ("lib", "app", "analysis", "scripts", "inputs")

# Folder -> folders it may include, lowest first. A folder may name earlier ones only, so the graph has no circle.
ALLOWED = {
    "kernels/shared": "",
    "kernels/interface": "kernels/shared",
    "kernels/diagnostics": "kernels/interface",
    "kernels/host/runtime": "kernels/diagnostics kernels/interface",
    "kernels/host/simd": "kernels/host/runtime kernels/interface kernels/shared",
    "kernels/host/attention": "kernels/host/runtime kernels/host/simd kernels/interface",
    "kernels/host/layer": "kernels/host/runtime kernels/host/simd kernels/shared",
    "kernels/host": "kernels/host/attention kernels/host/runtime",
    "kernels/cuda/sizes": "kernels/diagnostics kernels/interface kernels/shared",
    "kernels/cuda/runtime": "kernels/cuda/sizes kernels/diagnostics kernels/interface",
    "kernels/cuda/primitives": "kernels/cuda/runtime kernels/shared",
    "kernels/cuda/exchange": "kernels/cuda/runtime kernels/cuda/sizes kernels/interface",
    "kernels/cuda/attention": "kernels/cuda/runtime kernels/cuda/sizes",
    "kernels/cuda/attention/rows": "kernels/cuda/attention kernels/cuda/primitives",
    "kernels/cuda/layer": "kernels/cuda/attention kernels/cuda/primitives kernels/cuda/runtime kernels/cuda/sizes "
                          "kernels/shared",
    "kernels/cuda/rank": "kernels/cuda/attention kernels/cuda/runtime",
    "kernels/cuda/decode/split_kv": "kernels/cuda/attention kernels/cuda/primitives kernels/cuda/runtime "
                                    "kernels/cuda/sizes",
    "kernels/cuda/attention/sdpa": "kernels/cuda/attention kernels/cuda/decode/split_kv kernels/cuda/runtime "
                                   "kernels/cuda/sizes",
    "kernels/cuda/decode/tokens": "kernels/cuda/decode/split_kv kernels/cuda/primitives",
    "kernels/cuda/decode/fused": "kernels/cuda/attention kernels/cuda/decode/split_kv kernels/cuda/layer "
                                 "kernels/cuda/primitives",
    "kernels/cuda/decode/fp8": "kernels/cuda/decode/fused kernels/cuda/decode/split_kv kernels/cuda/primitives",
    "kernels/cuda/decode/loans": "kernels/cuda/attention kernels/cuda/decode/fused kernels/cuda/sizes",
    "kernels/cuda/decode/sharded": "kernels/cuda/attention kernels/cuda/decode/fused kernels/cuda/exchange "
                                   "kernels/cuda/runtime",
    "kernels/cuda/decode": "kernels/cuda/attention kernels/cuda/decode/fused kernels/cuda/decode/loans "
                           "kernels/cuda/decode/split_kv kernels/cuda/layer kernels/cuda/rank kernels/cuda/runtime "
                           "kernels/cuda/sizes",
    "kernels/cuda/prefill": "kernels/cuda/attention kernels/cuda/primitives kernels/cuda/rank kernels/cuda/runtime "
                            "kernels/cuda/sizes",
    "kernels/cuda/prefill/dense": "kernels/cuda/prefill",
    "kernels/cuda/prefill/rank": "kernels/cuda/attention kernels/cuda/prefill",
    "kernels/cuda/prefill/selected": "kernels/cuda/prefill",
    "kernels/cuda": "kernels/cuda/attention kernels/cuda/decode kernels/cuda/decode/sharded "
                    "kernels/cuda/decode/split_kv kernels/cuda/layer kernels/cuda/prefill kernels/cuda/rank "
                    "kernels/cuda/sizes kernels/interface",
    "kernels": "kernels/cuda/runtime kernels/cuda/sizes kernels/diagnostics kernels/host/runtime kernels/interface",
    "comm": "kernels/diagnostics",
    "comm/collectives": "comm kernels/cuda/exchange kernels/diagnostics kernels/interface",
    "comm/watchdog": "comm kernels/diagnostics",
    "nsa/config": "kernels/diagnostics kernels/interface kernels/shared",
    "nsa/results/hdf5": "kernels/diagnostics",
    "nsa/results": "comm kernels/diagnostics nsa/config nsa/results/hdf5",
    "nsa/routing": "comm kernels/diagnostics kernels/interface nsa/config",
    "nsa/model": "comm/collectives kernels/diagnostics kernels/interface kernels/shared nsa/config nsa/results "
                 "nsa/routing",
    "nsa/forward": "comm kernels/diagnostics kernels/interface nsa/model nsa/results",
    "nsa/verify": "comm nsa/forward nsa/model nsa/results",
    "nsa/report": "kernels/diagnostics nsa/results",
    "nsa/tasks": "comm comm/collectives kernels/diagnostics kernels/interface kernels/shared nsa/config nsa/forward "
                 "nsa/model nsa/report nsa/results nsa/verify",
    "nsa/gate": "kernels/diagnostics kernels/shared nsa/config nsa/model nsa/report nsa/results",
    "nsa/experiment": "comm kernels/diagnostics kernels/interface nsa/config nsa/forward nsa/model nsa/report "
                      "nsa/results nsa/routing nsa/tasks",
    "app": "comm comm/collectives comm/watchdog kernels/diagnostics kernels/host/runtime kernels/interface nsa/config "
           "nsa/experiment nsa/gate nsa/model nsa/report nsa/results nsa/routing nsa/tasks",
}

# Header (prefix) -> the files that may include it.
FOREIGN = {
    "mpi.h": r"lib/comm/.*",
    "nccl.h": r"lib/comm/collectives/nccl\.cpp",
    "cuda": r"lib/kernels/cuda/.*|lib/comm/collectives/nccl\.cpp",
    "cublas": r"lib/kernels/cuda/.*",
    "hdf5": r"lib/nsa/results/hdf5/.*",
    "toml++": r"lib/nsa/config/.*\.(hpp|cpp)",
    "nlohmann/": r"lib/kernels/diagnostics/json\.hpp",
    "cblas.h": r"lib/kernels/host/.*",
    "omp.h": r"lib/kernels/host/.*",
    "CLI/": r"app/.*",
    "filesystem": r"lib/nsa/results/files\.cpp",  # most of its functions throw where a call is refused
}
# Header -> the only .hpp that may include it.
HEADERS_WITH = {"mpi.h": r"lib/comm/mpi_group\.hpp", "kernels/diagnostics/json.hpp": r"(?!)"}
# Host code reaches the CUDA folders only here.
CUDA_FROM_HOST = r"lib/kernels/(cuda/.*|open_backend\.cpp)|lib/comm/collectives/(nccl|peer_memory)\.cpp"


def folder_of(name):
    parts = name.split("/")
    return "app" if parts[0] == "app" else "/".join(parts[1:-1])


def includes(root):
    """Yields (file, line number, header) for every include of lib and app."""
    for top in ("lib", "app"):
        for file in sorted((root / top).rglob("*")):
            if file.suffix not in SUFFIXES:
                continue
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if match := re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line):
                    yield file.relative_to(root).as_posix(), number, match.group(1)


def foreign_problem(name, header):
    for prefix, module in FOREIGN.items():
        if header.startswith(prefix) and not re.fullmatch(module, name):
            return f"which only {module} may"
    only = HEADERS_WITH.get(header)
    if only and name.endswith(".hpp") and not re.fullmatch(only, name):
        return "in a header that others see"
    if header.startswith("kernels/cuda/") and not re.fullmatch(CUDA_FROM_HOST, name):
        return f"which only {CUDA_FROM_HOST} may"
    return None


def arrow_problems(arrows):
    order = list(ALLOWED)
    found = []
    for source, targets in ALLOWED.items():
        for target in targets.split():
            if order.index(target) >= order.index(source):
                found.append(f"ALLOWED lists {source} -> {target}, which points up")
            if target not in arrows[source]:
                found.append(f"ALLOWED lists {source} -> {target}, which no include needs")
    for source, targets in arrows.items():
        for target, where in targets.items():
            if target not in ALLOWED.get(source, "").split():
                found.append(f"{where}: a new arrow {source} -> {target}")
    return found


def crowded_folders(root):
    """Folders of TOPS with more than MAX_ENTRIES; a header and its source count once, as an input and its list do."""
    for top in TOPS:
        for folder in [root / top, *(p for p in (root / top).rglob("*") if p.is_dir())]:
            entries = {p.stem if p.is_file() else p.name + "/" for p in folder.iterdir()
                       if not p.name.startswith((".", "__")) and p.suffix not in {".egg-info", ".pyc"}}
            if len(entries) > MAX_ENTRIES:
                yield f"{folder.relative_to(root)} shows {len(entries)} entries: {' '.join(sorted(entries))}"


def main(root=ROOT):
    arrows, problems, files = collections.defaultdict(dict), list(crowded_folders(root)), set()
    for name, number, header in includes(root):
        files.add(name)
        if problem := foreign_problem(name, header):
            problems.append(f"{name}:{number}: includes {header}, {problem}")
        target = folder_of(f"lib/{header}") if not header.startswith("app/") else "app"
        source = folder_of(name)
        if target != source and ((root / "lib" / header).exists() or header.startswith("app/")):
            arrows[source].setdefault(target, f"{name}:{number}")
    problems += arrow_problems(arrows)
    for source in ALLOWED:
        print(f"{source} -> {', '.join(sorted(arrows[source])) or '-'}")
    print("\n".join(problems))
    print(f"{len(files)} files, {len(ALLOWED)} folders, {len(problems)} problems")
    return 1 if problems or not files else 0


if __name__ == "__main__":
    sys.exit(main())
