"""The README's commands in a bare Debian: debootstrap, a copy of the sources, ./quickstart.sh, as root.

The suite ("bookworm", "trixie") is downloaded once and kept in FOLDER as SUITE.tar, and what a run prints as SUITE.log.
Skipped (77), with the reason, without root, debootstrap or the mirror. Python 3, standard library only.
"""

import argparse
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
INSIDE = "NSA_TEST_INSIDE"  # environment variable: the process has a mount and PID namespace of its own
SKIPPED = 77
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# One rank without a launcher, which Open MPI starts in another way than those of the quick start.
ALONE = "build/host/nsa run inputs/quickstart.toml --set parallel.heads=1 --set parallel.kv=1 --output alone.h5"


def skip(why):
    print(f"SKIPPED: {why}")
    sys.exit(SKIPPED)


def mirror():
    """NSA_DEBIAN_MIRROR, or the first repository that apt of this machine installs Debian packages from."""
    if "NSA_DEBIAN_MIRROR" in os.environ:
        return os.environ["NSA_DEBIAN_MIRROR"]
    if not shutil.which("apt-get"):
        skip("no apt-get here to say where Debian packages come from; set NSA_DEBIAN_MIRROR")
    command = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"^Debian Debian (\S+)$", listed, re.MULTILINE)
    return found[1] if found else skip("apt has no Debian repository; set NSA_DEBIAN_MIRROR")


def keep(root, archive):
    """Packs the folder `root`; an archive that is there is whole."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "cf", f"{archive}.new", "--one-file-system", "--exclude=./src", "-C", root, "."], check=True)
    os.replace(f"{archive}.new", archive)


def unpack(archive, root):
    root.mkdir()
    subprocess.run(["tar", "xf", archive, "-C", root], check=True)


def bare(suite, kept, root):
    """Unpacks the suite into `root`, from `kept` or from the mirror."""
    archive = kept / f"{suite}.tar"
    if archive.is_file():
        unpack(archive, root)
        return
    source = mirror()
    done = subprocess.run(["debootstrap", "--variant=minbase", suite, root, source], capture_output=True, text=True)
    if done.returncode != 0:
        skip(f"no bare {suite} from {source} ({(done.stdout + done.stderr).strip().splitlines()[-1]})")
    keep(root, archive)


def furnish(root):
    """Sources as a clone has them, the settings that reach the mirrors of Debian and of Python, and the file systems of
    a running system."""
    files = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True)
    archive = subprocess.Popen(["tar", "c", "-C", ROOT, "--null", "-T", "-"] if files.returncode == 0 else
                               ["tar", "c", "-C", ROOT, "--exclude=./build", "."],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    (root / "src").mkdir()
    unpack = subprocess.Popen(["tar", "x", "-C", root / "src"], stdin=archive.stdout)
    archive.stdin.write(files.stdout)
    archive.stdin.close()
    assert unpack.wait() == 0 and archive.wait() == 0
    for name in ("resolv.conf", "hosts", "pip.conf"):
        if os.path.exists(f"/etc/{name}"):
            shutil.copy(f"/etc/{name}", root / "etc" / name)
    if os.path.exists(CERTIFICATES):
        shutil.copy(CERTIFICATES, root / "etc/pip.crt")  # its own file changes with the packages
    for path in pathlib.Path("/etc/apt/apt.conf.d").glob("*"):
        if re.search("Acquire", path.read_text(errors="replace")):
            shutil.copy(path, root / "etc/apt/apt.conf.d")
    for name in ("proc", "dev", "sys"):
        (root / name).mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
    for name in ("dev", "sys"):
        subprocess.run(["mount", "--rbind", f"/{name}", root / name], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root / "dev/shm"], check=True)


def inside(root, command, log):
    """Runs a shell command in /src of the root, as a new user there. Returns its exit code and what it printed, which
    the file `log` keeps."""
    environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "NSA_COMMIT=bare"]
    if (root / "etc/pip.crt").exists():
        environment.append("PIP_CERT=/etc/pip.crt")
    with open(log, "wb") as out:
        done = subprocess.run(["chroot", root, "/usr/bin/env", "-i", *environment, "sh", "-c", f"cd /src && {command}"],
                              stdout=out, stderr=subprocess.STDOUT)  # fmt: skip
    return done.returncode, log.read_text(errors="replace")


def with_packages(suite, kept, root):
    """Furnishes the suite with the packages of scripts/setup.sh and ccache, kept until that script changes. What is
    compiled in it is kept too."""
    key = hashlib.sha256((ROOT / "scripts/setup.sh").read_bytes()).hexdigest()[:12]
    archive = kept / f"{suite}-{key}.tar"
    if archive.is_file():
        unpack(archive, root)
        furnish(root)
    else:
        bare(suite, kept, root)
        furnish(root)
        install = (
            "apt-get update -qq && scripts/setup.sh && "
            "apt-get install -y -qq --no-install-recommends ccache && apt-get clean")
        code, said = inside(root, install, kept / f"{suite}-packages.log")
        if code != 0:
            skip(f"no packages for {suite} ({said.strip().splitlines()[-1]})")
        for old in kept.glob(f"{suite}-*.tar"):
            old.unlink()
        keep(root, archive)
    cache = kept / f"{suite}-ccache"
    cache.mkdir(exist_ok=True)
    (root / "root/.cache/ccache").mkdir(parents=True)
    subprocess.run(["mount", "--bind", cache, root / "root/.cache/ccache"], check=True)


def commands(options):
    """Runs the README's commands in a fresh root and prints their figures."""
    suite = options.suite
    with tempfile.TemporaryDirectory(prefix="nsa-root-") as folder:
        root = pathlib.Path(folder) / "root"
        start = time.monotonic()
        try:
            command = f"./quickstart.sh && {ALONE}" + (" && ./test.sh" if options.tests else "")
            if options.keep_packages:
                with_packages(suite, options.folder, root)
            else:
                bare(suite, options.folder, root)
                furnish(root)
                command = "apt-get update -qq && " + command
            if options.only_packages:
                return
            code, said = inside(root, command, options.folder / f"{suite}.log")
            places = ["dev/shm"] if options.tests else ["dev/shm", "tmp"]
            left = [str(path) for name in places for path in (root / name).iterdir()]
            compiler = subprocess.run(["chroot", root, "c++", "--version"], capture_output=True, text=True).stdout
        finally:
            for name in ("root/.cache/ccache", "dev", "sys", "proc"):
                subprocess.run(["umount", "-R", "-l", root / name], check=False, stderr=subprocess.DEVNULL)
    print(said[-3000:])
    if options.tests:
        figures = r"^.*(?:% tests passed|Total Test time|\*\*\*(?:Failed|Timeout)|skipped: ).*$"
        print("\n".join(re.findall(figures, said, re.MULTILINE)))
    print(f"{suite}: {time.monotonic() - start:.0f} s, {compiler.splitlines()[0] if compiler else 'no compiler'}")
    assert code == 0, f"exit code {code}"
    assert "RESULT: VALID" in said
    warnings = [line for line in said.splitlines() if re.search(r"warning: ", line)]
    assert not warnings, "\n".join(warnings[:10])
    assert not left, f"left: {left}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tests", action="store_true", help="also ./test.sh, with what it skips and why: half an hour")
    parser.add_argument("--keep-packages", action="store_true",
                        help="keep installed packages and compiled objects in FOLDER for the next call")  # fmt: skip
    parser.add_argument("--only-packages", action="store_true", help="with --keep-packages: install them and end")
    options = parser.parse_args()
    if os.geteuid() != 0:
        skip("only root can change the root folder")
    if not shutil.which("debootstrap"):
        subprocess.run("apt-get install -y -qq --no-install-recommends debootstrap", shell=True, capture_output=True)
    if not shutil.which("debootstrap"):
        skip("no debootstrap, and apt-get cannot install it")
    if not os.environ.get(INSIDE):
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, "-B", *sys.argv]
        done = subprocess.run(command, env=os.environ | {INSIDE: "1"})
        sys.exit(done.returncode)
    commands(options)


if __name__ == "__main__":
    main()
