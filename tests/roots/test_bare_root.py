"""The README's commands in a bare Debian: debootstrap, a copy of the sources, ./quickstart.sh, as root.

test_bare_root.py SUITE FOLDER [--tests]: the suite ("bookworm", "trixie") is unpacked once and kept in FOLDER as
SUITE.tar. --tests adds the README's second command, ./test.sh, with what it skips and why: half an hour.
Skipped (77), with the reason, without root, debootstrap or the mirror. Python 3, standard library only.
"""

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


def unpacked(suite, kept, folder):
    """Unpacks the suite below `folder`, from `kept` or from the mirror."""
    archive = kept / f"{suite}.tar"
    if not archive.is_file():
        fresh = folder / "fresh"
        source = mirror()
        command = ["debootstrap", "--variant=minbase", suite, fresh, source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            skip(f"no bare {suite} from {source} ({(done.stdout + done.stderr).strip().splitlines()[-1]})")
        kept.mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "cf", f"{archive}.new", "-C", fresh, "."], check=True)
        os.replace(f"{archive}.new", archive)
        return fresh
    root = folder / "root"
    root.mkdir()
    subprocess.run(["tar", "xf", archive, "-C", root], check=True)
    return root


def furnish(root):
    """Sources as a clone has them, the settings that reach the mirror, and the file systems of a running system."""
    files = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True)
    archive = subprocess.Popen(["tar", "c", "-C", ROOT, "--null", "-T", "-"] if files.returncode == 0 else
                               ["tar", "c", "-C", ROOT, "--exclude=./build", "."],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    (root / "src").mkdir()
    unpack = subprocess.Popen(["tar", "x", "-C", root / "src"], stdin=archive.stdout)
    archive.stdin.write(files.stdout)
    archive.stdin.close()
    assert unpack.wait() == 0 and archive.wait() == 0
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    shutil.copy("/etc/hosts", root / "etc/hosts")
    for path in pathlib.Path("/etc/apt/apt.conf.d").glob("*"):
        if re.search("Acquire", path.read_text(errors="replace")):
            shutil.copy(path, root / "etc/apt/apt.conf.d")
    subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
    for name in ("dev", "sys"):
        subprocess.run(["mount", "--rbind", f"/{name}", root / name], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root / "dev/shm"], check=True)


def commands(suite, kept, *options):
    """Runs the README's commands in a fresh root and prints their figures."""
    tests = "--tests" in options
    with tempfile.TemporaryDirectory(prefix="nsa-root-") as folder:
        root = unpacked(suite, kept, pathlib.Path(folder))
        furnish(root)
        start = time.monotonic()
        try:
            done = subprocess.run(
                ["chroot", root, "/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
                 "LANG=C.UTF-8", "NSA_COMMIT=bare", "sh", "-c",
                 "cd /src && apt-get update -qq && ./quickstart.sh" + (" && ./test.sh" if tests else "")],
                capture_output=True, text=True)  # fmt: skip
            left = os.listdir(root / "dev/shm")
            compiler = subprocess.run(["chroot", root, "c++", "--version"], capture_output=True, text=True).stdout
        finally:
            for name in ("dev", "sys", "proc"):
                subprocess.run(["umount", "-R", "-l", root / name], check=False)
    said = done.stdout + done.stderr
    print(said[-3000:])
    if tests:
        figures = r"^.*(?:% tests passed|Total Test time|\*\*\*(?:Failed|Timeout)|skipped: ).*$"
        print("\n".join(re.findall(figures, said, re.MULTILINE)))
    print(f"{suite}: {time.monotonic() - start:.0f} s, {compiler.splitlines()[0] if compiler else 'no compiler'}")
    assert done.returncode == 0, f"exit code {done.returncode}"
    assert "RESULT: VALID" in said
    warnings = [line for line in said.splitlines() if re.search(r"warning: ", line)]
    assert not warnings, "\n".join(warnings[:10])
    assert not left, f"left in /dev/shm: {left}"


def main(suite, kept, *options):
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
    commands(suite, pathlib.Path(kept), *options)


if __name__ == "__main__":
    main(*sys.argv[1:])
