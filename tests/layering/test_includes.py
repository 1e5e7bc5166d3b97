#!/usr/bin/env python3
"""Includes point one way: app -> nsa -> comm -> kernels; each foreign header has its room (CONTRIBUTING.md)."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYER = {"kernels": 0, "comm": 1, "nsa": 2, "app": 3}
# header (prefix) -> files that may include it
ROOMS = {
    "mpi.h": r"lib/comm/.*",
    "nccl.h": r"lib/comm/communicator_nccl\.cpp",
    "cuda": r"lib/kernels/cuda/.*|lib/comm/communicator_nccl\.cpp",
    "cublas": r"lib/kernels/cuda/.*",
    "hdf5": r"lib/nsa/(h5\.(hpp|cpp)|result_writer\.cpp|result_reader\.cpp|tensor_file\.cpp)",
    "toml++": r"lib/nsa/config.*\.(hpp|cpp)",
    "cblas.h": r"lib/kernels/host/.*",
    "omp.h": r"lib/kernels/host/.*",
    "CLI/": r"app/.*",
}
NO_HEADER_ROOM = {"mpi.h": r"lib/comm/communicator_impl\.hpp"}  # the only .hpp outside of which none may stand


def violations(root=ROOT):
    found = []
    suffixes = {".hpp", ".cpp", ".cu", ".cuh"}
    files = [f for top in ("lib", "app") for f in sorted((root / top).rglob("*")) if f.suffix in suffixes]
    for file in files:
        name = file.relative_to(root).as_posix()
        parts = name.split("/")
        layer = LAYER["app"] if parts[0] == "app" else LAYER[parts[1]]
        for number, line in enumerate(file.read_text().splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if not match:
                continue
            header = match.group(1)
            where = f"{name}:{number}: includes {header}"
            target = LAYER.get(header.split("/")[0]) if "/" in header else None
            if target is not None and target > layer:
                found.append(f"{where}, which is above it")
            for prefix, room in ROOMS.items():
                if header.startswith(prefix) and not re.fullmatch(room, name):
                    found.append(f"{where}, whose room is {room}")
            only = NO_HEADER_ROOM.get(header)
            if only and name.endswith(".hpp") and not re.fullmatch(only, name):
                found.append(f"{where} in a header that others see")
            cuda_host = header.startswith("kernels/cuda/") and not re.fullmatch(
                r"lib/kernels/(cuda/.*|backend\.cpp)|lib/comm/communicator_(nccl|peers)\.cpp", name)
            if cuda_host:
                found.append(f"{where}, which only backend.cpp and lib/comm's two CUDA sources may")
    return found, len(files)


if __name__ == "__main__":
    problems, count = violations()
    print("\n".join(problems))
    print(f"{count} files, {len(problems)} arrows the wrong way")
    sys.exit(1 if problems or count == 0 else 0)
