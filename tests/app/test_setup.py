"""scripts/setup.sh: what it installs where packages, but not what they hold, are missing. No package is installed."""

import os
import pathlib
import shutil
import subprocess
import unittest

from harness import AppTest

SETUP = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "setup.sh"
NOBODY = 65534


@unittest.skipUnless(shutil.which("dpkg-query"), "no dpkg here: setup.sh installs nothing")
class Setup(AppTest):
    def setUp(self):
        super().setUp()
        self.tool("dpkg-query", 'case "$*" in *$PRESENT*) echo install ok installed;; esac')
        self.tool("apt-get", f'echo "$@" >> {self.folder}/apt')

    def tool(self, name, text):
        path = pathlib.Path(self.folder, name)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def setup(self, *arguments, user=None, present="-none-", **environment):
        """Returns the end of setup.sh and what apt-get was asked to install."""
        path = self.folder + os.pathsep + os.environ["PATH"]
        os.chmod(self.folder, 0o755)
        done = subprocess.run([SETUP, *arguments], capture_output=True, text=True, user=user,
                              env=dict(os.environ, PATH=path, PRESENT=present, TMPDIR="/tmp", **environment))
        asked = pathlib.Path(self.folder, "apt")
        lines = asked.read_text().splitlines() if asked.exists() else []
        asked.unlink(missing_ok=True)
        words = [word for line in lines if "install" in line for word in line.split()]
        return done, [word for word in words if word != "install" and not word.startswith("-")]

    def test_what_cmake_finds_is_not_installed(self):
        done, installed = self.setup("--tests")
        self.assertEqual((done.returncode, installed, done.stdout), (0, [], ""), done.stderr)

    @unittest.skipIf(os.geteuid() != 0, "only root installs")
    def test_the_build_needs_no_catch2(self):
        self.tool("cmake", "exit 1")  # finds nothing
        done, installed = self.setup()
        self.assertIn("libhdf5-dev", installed, done.stderr)
        self.assertEqual({"catch2", "python3-venv"} & set(installed), set())
        self.assertIn("libopenblas-dev", installed)
        self.assertNotIn("libopenblas-dev", self.setup(NSA_WITHOUT_BLAS="1")[1])
        self.assertIn("catch2", self.setup("--tests")[1])
        self.assertEqual(self.setup("--tests", NSA_NO_APT="1")[1], [])

    @unittest.skipIf(os.geteuid() != 0, "becomes another user")
    def test_other_users_get_the_command(self):
        self.tool("cmake", "echo found: CXX; echo found: MPI; echo found: fmt; echo found: CLI11; echo found: CBLAS; "
                           "echo found: toml++; echo found: nlohmann-json; $MORE")  # fmt: skip
        done, _ = self.setup(user=NOBODY, MORE="")
        self.assertEqual(done.returncode, 2)
        self.assertIn("setup: 1 package is missing and only root can install it; run\n"
                      "  sudo apt-get install --no-install-recommends libhdf5-dev\n", done.stderr)
        self.assertIn("NSA_NO_APT=1", done.stderr)
        done, _ = self.setup("--tests", user=NOBODY, MORE="")
        self.assertIn("setup: 2 packages are missing and only root can install them", done.stderr)
        self.assertEqual(self.setup(user=NOBODY, MORE="echo found: HDF5")[0].returncode, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
