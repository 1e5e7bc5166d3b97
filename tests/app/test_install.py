"""What `cmake --install` and CPack leave works where it is moved to."""

import pathlib
import shutil
import subprocess
import unittest

from harness import BINARY, AppTest

BUILD = pathlib.Path(BINARY).parent
ROOT = pathlib.Path(__file__).resolve().parents[2]
INSTALLED = """bin/nsa
share/doc/nsa/LICENSE share/doc/nsa/THIRD_PARTY_LICENSES share/doc/nsa/copyright
share/nsa/inputs/quickstart.toml share/nsa/inputs/scaling/scaling.sweep share/nsa/examples/make_input.py
share/nsa/machines/h200.toml
share/nsa/jobscripts/slurm/cpu_nodes.sh share/nsa/scripts/sweep.py share/nsa/scripts/sweeps/cases.py""".split()


class Install(AppTest):
    def run_in(self, folder, *command):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def assert_works(self, prefix):
        """Everything is there, names no build folder, and runs; a sweep from a copy of the data uses this program."""
        for name in INSTALLED:
            self.assertTrue((prefix / name).is_file(), name)
        data = prefix / "share" / "nsa"
        for path in (path for folder in ("scripts", "jobscripts") for path in (data / folder).rglob("*.*")):
            source = (ROOT / path.relative_to(data)).read_text()
            self.assertEqual(path.read_text(), source.replace("build/host/nsa", "nsa").replace("build/cuda/nsa", "nsa"))
        self.assertIn("compiler", self.run_in(prefix, prefix / "bin" / "nsa", "info"))
        work = pathlib.Path(self.folder) / "work"
        shutil.copytree(data, work)
        small = ["--set", "run.context=[64]", "--set", "parallel.kv=1", "--set", "parallel.heads=1"]
        self.run_in(work, prefix / "bin" / "nsa", "run", "inputs/quickstart.toml", *small)
        self.assertIn("nsa", self.run_in(work, "scripts/sweep.py", "--help"))

    def test_a_prefix_that_is_moved(self):
        first, moved = pathlib.Path(self.folder, "first"), pathlib.Path(self.folder, "moved")
        self.run_in(self.folder, "cmake", "--install", BUILD, "--prefix", first)
        first.rename(moved)
        self.assert_works(moved)

    def test_the_tarball(self):
        self.run_in(BUILD, "cpack", "-G", "TGZ", "-B", self.folder)
        archive = next(pathlib.Path(self.folder).glob("nsa-*.tar.gz"))
        self.run_in(self.folder, "tar", "xf", archive)
        self.assert_works(pathlib.Path(str(archive)[:-len(".tar.gz")]))

    @unittest.skipUnless(shutil.which("dpkg-deb") and shutil.which("dpkg-shlibdeps"), "no dpkg-dev here")
    def test_the_debian_package(self):
        self.run_in(BUILD, "cpack", "-G", "DEB", "-B", self.folder)
        package = next(pathlib.Path(self.folder).glob("nsa_*.deb"))
        depends = self.run_in(self.folder, "dpkg-deb", "-f", package, "Depends", "Recommends")
        for library in ("libc6", "libopenmpi", "libhdf5", "openmpi-bin"):
            self.assertIn(library, depends)
        self.run_in(self.folder, "dpkg-deb", "-x", package, "root")
        self.assert_works(pathlib.Path(self.folder, "root", "usr"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
