"""scripts/m4_record.sh with a stand-in for the program: which run counts, and that a failure replaces nothing."""

import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts/m4_record.sh"
# Runs write "INPUT, attempt N"; attempt N of an input has as many NOISY points as word N of its line in `noisy`.
PROGRAM = r"""#!/usr/bin/env bash
set -e
if [[ $1 == gate ]]; then
  [[ -e gate_fails ]] && exit 6
  [[ $5 == --adr ]] && cat "${@:2:3}" >"$6"
  echo "VERDICT: PROCEED"
  exit
fi
[[ "$*" == "run inputs/gate/"*" --set run.backend=host --output "* ]]
input=$(basename "$2" .toml)
attempt=$(($(cat "$input.count" 2>/dev/null || echo 0) + 1))
echo $attempt >"$input.count"
echo "$input, attempt $attempt" >"$6"
noisy=$(sed -n "s/^$input: //p" noisy | cut -d " " -f $attempt)
[[ $noisy == 0 ]] || echo "NOISY: $noisy of 10 points; something else than their own work decided their times"
[[ -e $input.invalid ]] && echo "RESULT: INVALID" && exit 3
echo "RESULT: VALID"
"""


class Record(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        for name in "scripts", "docs/adr", "docs/results":
            (self.folder / name).mkdir(parents=True)
        shutil.copy(SCRIPT, self.folder / "scripts")
        program = self.folder / "nsa"
        program.write_text(PROGRAM)
        program.chmod(0o755)

    def record(self, noisy, **environment):
        (self.folder / "noisy").write_text("\n".join(f"{name}: {counts}" for name, counts in noisy.items()) + "\n")
        command = [self.folder / "scripts/m4_record.sh", "host", self.folder / "nsa"]
        return subprocess.run(command, capture_output=True, text=True,
                              env={**os.environ, "M4_MAX_LOAD": "1000", **environment})

    def test_the_run_with_fewest_noisy_points_counts(self):
        done = self.record({"m4_decode": "4 2 3", "m4_kernels": "0", "flash_guard": "1 0"})
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual((self.folder / "docs/adr/host.md").read_text(),
                         "m4_decode, attempt 2\nm4_kernels, attempt 1\nflash_guard, attempt 2\n")
        self.assertEqual(sorted(path.name for path in (self.folder / "docs/results/host").iterdir()),
                         ["flash_guard.h5", "m4_decode.h5", "m4_kernels.h5"])
        self.assertIn("m4_decode, attempt 3: RESULT: VALID, 3 NOISY points", done.stdout)
        self.assertIn("VERDICT: PROCEED", done.stdout)

    def test_no_input_runs_again_when_the_time_is_over(self):
        done = self.record({"m4_decode": "4", "m4_kernels": "5", "flash_guard": "6"}, M4_SECONDS="-1")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("m4_kernels, attempt 1", (self.folder / "docs/adr/host.md").read_text())

    def test_a_failure_replaces_nothing(self):
        for why, code in ("flash_guard.invalid", 3), ("gate_fails", 6):
            (self.folder / why).touch()
            done = self.record({"m4_decode": "0", "m4_kernels": "0 0", "flash_guard": "0 0"}, M4_SECONDS="-1")
            self.assertEqual(done.returncode, code, done.stdout)
            self.assertFalse(list((self.folder / "docs/results").iterdir()))
            (self.folder / why).unlink()

    def test_a_busy_machine_is_refused(self):
        done = self.record({}, M4_MAX_LOAD="-1")
        self.assertEqual(done.returncode, 1)
        self.assertIn("which disturb the times; wait", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
