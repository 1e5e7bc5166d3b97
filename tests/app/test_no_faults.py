"""The program that users get holds no fault hooks: no names of sites, no symbols, no effect. Its counterpart, that the
same search finds them in a build that has them, is tests/faults/test_hooks.py."""

import os
import subprocess
import unittest

from fault_sites import traces
from harness import BINARY, SMALL, AppTest


class NoFaults(AppTest):
    def test_no_name_of_a_site_is_in_the_program(self):
        self.assertEqual(traces(BINARY), [])

    def test_no_symbol_of_theirs_is_in_the_program(self):
        symbols = subprocess.run(["nm", "-C", BINARY], capture_output=True, text=True, check=True).stdout
        self.assertIn("nsa::", symbols)
        self.assertNotIn("nsa::fault", symbols)

    def test_the_variable_does_nothing(self):
        self.write("in.toml", SMALL)
        os.environ["NSA_FAULT"] = "run.start:kill"
        self.addCleanup(os.environ.pop, "NSA_FAULT")
        self.assert_ok(self.nsa("run", "in.toml", ranks=2))


if __name__ == "__main__":
    unittest.main(verbosity=2)
