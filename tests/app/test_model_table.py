"""scripts/model_table.py: floors by the formulas of docs/METRICS.md, and a row a time."""

import json
import os
import subprocess
import sys
import unittest

from harness import INPUTS, AppTest

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts", "model_table.py")


class ModelTable(AppTest):
    def table(self):
        command = [sys.executable, TABLE, self.folder, "--inputs", os.path.join(INPUTS, "models")]
        return subprocess.run(command, capture_output=True, text=True)

    def test_times_stand_beside_their_floors(self):
        figures = {"decode_time_context_65536_batch_16": {"value": "85.8", "unit": "us"},
                   "decode_copy_rate_context_65536_batch_16": {"value": "80", "unit": "%"},
                   "prefill_time_context_32768": {"value": "8.22", "unit": "ms"}}
        self.write("qwen3_235b_r1_h1_kv1.json", json.dumps({"figures": figures}))
        done = self.table()
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.splitlines()[2:],
                         ["| qwen3_235b | decode | 16 × 64K | 85.8 | 42.9 | 2.00 |",
                          "| qwen3_235b | prefill | 1 × 32K | 8220.0 | 4114.2 | 2.00 |"])

    def test_no_result_is_an_error(self):
        self.assertEqual(self.table().returncode, 1)


if __name__ == "__main__":
    unittest.main()
