"""What stands under contrib/ against the tools it is written for, on a tiny run of the real binary.

usage: test_contrib.py reframe|jube|module|spack|syntax FOLDER     tools go into FOLDER; 77 where a tool cannot be had
"""

import csv
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONTRIB = ROOT / "contrib"
sys.path.append(str(ROOT / "tests" / "app"))

import spack_names  # noqa: E402

from small import SMALL  # noqa: E402


def skip(why):
    print(f"SKIPPED: {why}")
    sys.exit(77)


def run(*command, cwd=None, **environment):
    """Standard output; the test fails with what the command said when it fails."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def unpack(folder, *packages):
    if subprocess.run([HERE.parent / "unpack.sh", folder, *packages]).returncode == 77:
        sys.exit(77)


def check(truth, what):
    if not truth:
        sys.exit(f"FAILED: {what}")


def test_reframe(folder, work):
    """ReFrame runs the check on 1 and 4 ranks, finds it sane, and has the figures as performance variables, also by
    names that do not depend on the input. Nothing in the environment allows more ranks than cores."""
    python = folder / "bin" / "python"
    if not (folder / "bin" / "reframe").exists():
        for command in ([sys.executable, "-m", "venv", folder],
                        [python, "-m", "pip", "install", "--quiet", "--retries", "1", "ReFrame-HPC"]):  # fmt: skip
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode != 0:
                skip(f"pip cannot install ReFrame-HPC ({(made.stderr or made.stdout).strip().splitlines()[-1]})")
    for slots in ("OMPI_MCA_rmaps_base_oversubscribe", "PRTE_MCA_rmaps_default_mapping_policy"):
        os.environ.pop(slots, None)
    said = run(folder / "bin" / "reframe", "-C", CONTRIB / "reframe" / "settings.py", "-c",
               CONTRIB / "reframe" / "nsa_check.py", "-r", "--prefix", work, "--performance-report", "-n",
               "NsaCheck%ranks=1", "-n", "NsaCheck%ranks=4", "-S", f"NsaCheck.nsa={os.environ['NSA_BINARY']}", "-S",
               f"NsaCheck.input={work}/tiny.toml", cwd=work, HOME=str(work), TMPDIR=str(work))  # fmt: skip
    check(re.search(r"PASSED.*Ran 2/2 test case", said), said)
    for name in ("decode_time_context_64", "decode_time", "decode_peak_memory"):
        check(len(re.findall(rf" {name} +│ \S+ +│ +[\d.]+", said)) == 2, said)
    # One that prints no result is not sane. (ReFrame keeps reports in HOME and logs in TMPDIR.)
    bad = subprocess.run([folder / "bin" / "reframe", "-C", CONTRIB / "reframe" / "settings.py", "-c",
                          CONTRIB / "reframe" / "nsa_check.py", "-r", "--prefix", work, "-n", "NsaCheck%ranks=1", "-S",
                          "NsaCheck.nsa=/bin/true"], cwd=work, capture_output=True, text=True,
                         env={**os.environ, "HOME": str(work), "TMPDIR": str(work)})  # fmt: skip
    check(bad.returncode != 0, "ReFrame passed a run that printed no result")


def test_jube(folder, work):
    """JUBE runs the sweep and makes its table from the FOM lines."""
    unpack(folder, "jube")
    text = (CONTRIB / "jube" / "nsa.xml").read_text()
    for old, new in ((">1,2,4<", ">1,2<"), (">4096,16384<", ">64<")):
        check(old in text, f"{old} in nsa.xml")
        text = text.replace(old, new)
    definitions = work / "definitions"
    definitions.mkdir()
    (definitions / "nsa.xml").write_text(text)
    program = folder / "usr" / "bin" / "jube"
    system = shutil.which("python3", path="/usr/bin") or sys.executable  # Debian's modules are for Debian's Python
    jube = [system, program if program.exists() else "/usr/bin/jube"]
    environment = {"PYTHONPATH": str(folder / "usr/lib/python3/dist-packages"), "NSA": os.environ["NSA_BINARY"],
                   "NSA_INPUT": str(work / "tiny.toml")}  # fmt: skip
    run(*jube, "run", "-o", "nsa_jube", "definitions/nsa.xml", cwd=work, **environment)
    check([path.name for path in definitions.iterdir()] == ["nsa.xml"], "JUBE wrote beside its input")
    run(*jube, "analyse", "nsa_jube", cwd=work, **environment)
    table = run(*jube, "result", "nsa_jube", cwd=work, **environment)
    rows = list(csv.DictReader(line for line in table.splitlines() if "," in line))
    check([(row["context"], row["ranks"]) for row in rows] == [("64", "1"), ("64", "2")], table)
    for row in rows:
        positive = all(float(row[c]) > 0 for c in ("time[us]", "rate[tokens/s]", "memory[MB]"))
        check(row["result"] == "VALID" and positive, table)


def test_module(folder, work):
    """Environment Modules load the module file: PATH and NSA_ROOT are set, help and whatis are there."""
    if not shutil.which("tclsh"):
        skip("no tclsh; install tcl")
    unpack(folder, "environment-modules")
    command = next(folder.glob("usr/lib/*-linux-gnu/modulecmd.tcl"), None) or next(
        pathlib.Path("/usr/lib").glob("*-linux-gnu/modulecmd.tcl"))  # fmt: skip
    environment = {"MODULEPATH": str(CONTRIB / "modulefiles")}
    shell = run("tclsh", command, "bash", "load", "nsa", **environment)
    check("PATH=/opt/nsa/0.1.0/bin:" in shell and "NSA_ROOT=/opt/nsa/0.1.0;" in shell, shell)
    version = re.search(r"project\(nsa VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())[1]
    check((CONTRIB / "modulefiles" / "nsa" / version).exists(), f"the module file is of version {version}")


def test_spack(folder, work):
    """Spack, where PATH has it, reads the recipe and prints its variants and dependencies. Everywhere the
    recipe loads with the names that Spack documents, and says of CMake what CMakeLists.txt has."""
    path = CONTRIB / "spack" / "spack_repo" / "nsa" / "packages" / "nsa" / "package.py"
    names, recipe = spack_names.load(path)
    package, said = names["Nsa"], recipe.said
    sources = "".join(file.read_text() for file in [ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*.cmake")])
    version = re.search(r"project\(nsa VERSION (\S+)", sources)[1]
    check([a[0] for a, _ in said["version"]] == [version], f"{said['version']}, and the project is {version}")
    variants = {a[0] for a, _ in said["variant"]} | {"cuda", "cuda_arch"}
    for arguments, keywords in [*said["depends_on"], *said["conflicts"]]:
        for name in re.findall(r"[+~]([\w-]+)", keywords.get("when", "")):
            check(name in variants, f"{arguments}: no variant {name}")
    needed = {a[0].split("@")[0] for a, _ in said["depends_on"]}
    found = {"MPI": "mpi", "HDF5": "hdf5", "fmt": "fmt", "CLI11": "cli11", "CUDAToolkit": "cuda"}
    checked = set(re.findall(r"find_package\((\w+)", sources)) - {"Threads", "OpenMP", "Catch2", "Cblas", "Python3"}
    check(checked <= found.keys(), f"find_package of {checked - found.keys()}: which Spack package is it?")
    check({*found.values(), "tomlplusplus", "nlohmann-json", "nccl"} <= needed, f"dependencies: {sorted(needed)}")
    for on, cuda in ({"blas"}, "OFF"), ({"cuda"}, "ON"):
        made = package()
        made.spec = spack_names.Spec(on, cuda_arch=("80", "90"))
        defined = dict(re.fullmatch(r"-D(\w+):\w+=(.*)", argument).groups() for argument in made.cmake_args())
        for name in defined:
            check(re.search(rf"(option|set)\({name}\b|\${{{name}}}", sources), f"CMake reads no {name}")
        check((defined["NSA_CUDA"], defined["NSA_BLAS"]) == (cuda, "ON" if "blas" in on else "OFF"), defined)
        check(defined.get("NSA_CUDA_ARCHITECTURES") == ("80;90" if on == {"cuda"} else None), defined)
    program = shutil.which("spack")
    if not program:
        return print("no Spack here: the recipe was loaded with the documented names alone")
    apart = {"SPACK_USER_CONFIG_PATH": str(work / "config"), "SPACK_USER_CACHE_PATH": str(work / "cache")}
    run(program, "repo", "add", CONTRIB / "spack" / "spack_repo" / "nsa", **apart)
    told = run(program, "info", "nsa", **apart)
    for name in ("blas", "cuda", "tomlplusplus", version):
        check(name in told, f"spack info: no {name} in {told}")


def test_syntax(folder, work):
    """What cannot be run here at least parses: Python by its compiler, shell by bash and, where it is, shellcheck."""
    for path in sorted(CONTRIB.rglob("*.py")):
        compile(path.read_text(), path, "exec")
    post = re.search(r"^%post\n(.*?)^%", (CONTRIB / "apptainer" / "nsa.def").read_text(), re.DOTALL | re.MULTILINE)[1]
    (work / "post.sh").write_text("#!/bin/sh\nPRESET=host\n" + post.replace("{{ PRESET }}", "$PRESET"))
    scripts = [work / "post.sh", *ROOT.glob("jobscripts/slurm/*.sh"), ROOT / "tests" / "unpack.sh"]
    for script in scripts:
        run("bash", "-n", script)
    if shutil.which("shellcheck"):
        run("shellcheck", *scripts)


def main():
    name, folder = sys.argv[1], pathlib.Path(sys.argv[2]).resolve()
    with tempfile.TemporaryDirectory(prefix="nsa-contrib-") as work:
        work = pathlib.Path(work)
        (work / "tiny.toml").write_text(SMALL)
        tests = {"reframe": test_reframe, "jube": test_jube, "module": test_module, "spack": test_spack,
                 "syntax": test_syntax}  # fmt: skip
        tests[name](folder, work)
    print("passed")


if __name__ == "__main__":
    main()
