"""Routes of the real binary: a requested route runs, an impossible one is one error, the dry run prints the choices."""

import os
import subprocess
import unittest

from harness import BINARY, MPIEXEC, SMALL, AppTest


class Routes(AppTest):
    def run_small(self, *arguments, environment=None, ranks=1):
        for name, value in (environment or {}).items():
            os.environ[name] = value
            self.addCleanup(os.environ.pop, name, None)
        self.write("in.toml", SMALL)
        return self.nsa("run", "in.toml", "--output", f"{len(os.listdir(self.folder))}.h5", *arguments, ranks=ranks)

    def assert_refused(self, done, *parts):
        self.assertEqual(done.code, 2, done.out + done.err)
        self.assertEqual(done.err.count("nsa: error:"), 1, done.err)
        for part in parts:
            self.assertIn(part, done.err)

    def test_every_route_of_the_host_runs(self):
        for cmp, sel, win in (["sdpa"] * 3, ["sdpa_gemm"] * 3, ["flash", "masked", "masked"],
                              ["fused", "fused", "flash"]):
            with self.subTest(sel=sel, win=win):
                done = self.assert_ok(self.run_small("--set", f"route.cmp={cmp}", "--set", f"route.sel={sel}", "--set",
                                                     f"route.win={win}"))
                self.assertIn("RESULT: VALID", done.out)
                self.assertNotIn("fallback", done.out)

    def test_the_dry_run_prints_choices_and_reasons(self):
        done = self.assert_ok(self.run_small("--dry-run", "--set", "runtime.sel_triton_min_L=4096",
                                             environment={"NSA_ROUTE_WIN": "sdpa"}, ranks=0))
        self.assertIn("route of decode sel: sdpa (67 rows are fewer than runtime.sel_triton_min_L = 4096)", done.out)
        self.assertIn("route of decode win: sdpa (asked for by NSA_ROUTE_WIN)", done.out)
        self.assertIn("route of prefill cmp: fused (", done.out)

    def test_a_missing_route_is_one_error(self):
        self.assert_refused(self.run_small("--set", "route.sel=flash", ranks=2), "route.sel", '"masked"')
        self.assert_refused(self.run_small("--set", "route.cmp=masked", ranks=2), "route.cmp")
        self.assert_refused(self.run_small("--set", "runtime.fa2_min_len_win=often"), "runtime.fa2_min_len_win")
        self.assert_refused(self.run_small(ranks=2, environment={"NSA_ROUTE_SEL": "quick"}), "NSA_ROUTE_SEL=quick",
                            "sdpa, sdpa_gemm, masked, fused")

    def test_ranks_with_other_environments_are_refused(self):
        self.write("in.toml", SMALL)
        # No "-n 1 ... : -n 1 ...": the mpirun of Open MPI 5.0.7 crashes on it.
        differs = '[ "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" = 1 ] && export NSA_ROUTE_SEL=sdpa\nexec "$@"\n'
        self.write("one_differs.sh", differs)
        command = [MPIEXEC, "--allow-run-as-root", "--oversubscribe", "-n", "2", "sh", "one_differs.sh", BINARY, "run",
                   "in.toml"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("NSA_ROUTE_SEL=sdpa", done.stderr)

    def test_a_bad_force_is_one_error(self):
        self.assert_refused(self.run_small(ranks=2, environment={"NSA_FORCE": "yes"}), "NSA_FORCE=yes")

    def test_info_prints_the_routes_of_every_known_device(self):
        done = self.assert_ok(self.nsa("info", "--routes"))
        for part in "host\n", "compute capability 8.9", "RTX 4090", "compute capability 9.0", "decode", "prefill":
            self.assertIn(part, done.out)


if __name__ == "__main__":
    unittest.main(verbosity=2)
