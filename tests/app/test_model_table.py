"""scripts/model_table.py: floors by the formulas of docs/METRICS.md, and a row a time."""

import json
import os
import subprocess
import sys
import unittest

from harness import INPUTS, AppTest

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts", "model_table.py")


class ModelTable(AppTest):
    def table(self, *options):
        command = [sys.executable, TABLE, self.folder, "--inputs", os.path.join(INPUTS, "models"), *options]
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

    def test_before_kernel_and_heat_map(self):
        figures = {"decode_time_context_65536_batch_16": {"value": "85.8", "unit": "us"}}
        self.write("qwen3_235b_r1_h1_kv1.json", json.dumps({"figures": figures}))
        before = os.path.join(self.folder, "before")
        os.mkdir(before)
        figures["decode_time_context_65536_batch_16"]["value"] = "90.1"
        self.write("before/qwen3_235b_r1_h1_kv1.json", json.dumps({"figures": figures}))
        self.write("bench.txt", "   64/ 4  128 128    64  16     52.9     42.9   1.23x\n")
        picture = os.path.join(self.folder, "map.svg")
        done = self.table("--before", before, "--kernels", os.path.join(self.folder, "bench.txt"), "--svg", picture)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.splitlines()[2:],
                         ["| qwen3_235b | decode | 16 × 64K | 90.1 | 85.8 | 52.9 | 42.9 | 2.00 |"])
        with open(picture) as file:
            self.assertIn(">50%</text>", file.read())

    def test_no_result_is_an_error(self):
        self.assertEqual(self.table().returncode, 1)


if __name__ == "__main__":
    unittest.main()
