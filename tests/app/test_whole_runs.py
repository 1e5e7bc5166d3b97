"""Whole runs of the real binary: what it prints, what it writes, and that one result equals another."""

import csv
import json
import os
import re
import unittest
from pathlib import Path

from harness import INPUTS, SMALL, AppTest

FIGURE = re.compile(r"^FOM [a-z0-9_]+ = \S+ \S+$")


class WholeRuns(AppTest):
    def run_input(self, name, *arguments, ranks=0):
        return self.assert_ok(self.nsa("run", os.path.join(INPUTS, name), *arguments, ranks=ranks))

    def assert_complete(self, out):
        figures = [line for line in out.splitlines() if line.startswith("FOM ")]
        self.assertTrue(figures)
        for line in figures:
            self.assertRegex(line, FIGURE)
        self.assertEqual(out.splitlines()[-1], "RESULT: VALID")

    def test_quickstart_on_four_ranks(self):
        done = self.run_input("quickstart.toml", ranks=4)
        self.assert_complete(done.out)
        rows = [line.split() for line in done.out.splitlines() if re.match(r" +\d+ ", line)]
        self.assertEqual([row[0] for row in rows], ["1024", "4096", "16384"])
        for row in rows:
            counted, expected = next(word for word in row if "/" in word).split("/")
            self.assertEqual(counted, expected)
        self.assertEqual(done.out.count("slowest rank at context_"), 3)
        self.assertEqual(done.err, "")
        self.assertEqual(os.listdir(self.folder), ["quickstart.h5"])

    def test_report_prints_a_file_as_its_run_did(self):
        for name, ranks in (("quickstart.toml", 4), ("needle_64k.toml", 0)):
            printed = self.run_input(name, "--output", "a.h5", ranks=ranks).out
            done = self.assert_ok(self.nsa("report", "a.h5"))
            head, rest = done.out.split("\n", 1)
            self.assertRegex(head, rf"^a.h5: .+, host backend, {max(1, ranks)} ranks?, commit \S+, \d{{4}}-")
            self.assertEqual(rest, printed.replace("result: a.h5\n", ""))
            os.remove(os.path.join(self.folder, "a.h5"))

    def test_the_run_of_nsa_vibe_and_its_csv(self):
        self.assert_complete(self.run_input("rtx4090_v2.toml", "--csv", "decode.csv").out)
        with open(os.path.join(self.folder, "decode.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual(",".join(rows[0]), "S,ms_total,ms_cmp,ms_sel,ms_win,reads_actual,reads_expected,"
                         "reads_actual_decode,reads_expected_decode,reads_nsa_vibe")

        def column(name):
            return [int(row[name]) for row in rows]

        self.assertEqual(column("S"), [128, 256, 512, 1024])
        for name in ("reads_actual", "reads_expected", "reads_actual_decode", "reads_expected_decode"):
            self.assertEqual(column(name), [329, 593, 1089, 1569])
        self.assertEqual(column("reads_nsa_vibe"), [1193, 1329, 1569, 1601])
        for row in rows:
            for name in ("ms_total", "ms_cmp", "ms_sel", "ms_win"):
                self.assertGreater(float(row[name]), 0)

    def test_the_json_holds_the_content_of_the_fom_lines(self):
        done = self.run_input("prefill.toml", "--set", 'run.modes=["total"]', "--set", "run.context=[64,128]", "--json",
                              "run.json", ranks=2)
        self.assertIn("result: prefill.h5, run.json\n", done.out)
        with open(os.path.join(self.folder, "run.json")) as file:
            told = json.load(file)
        lines = [f"FOM {name} = {figure['value']} {figure['unit']}" for name, figure in told["figures"].items()]
        printed = [line for line in done.out.splitlines() if line.startswith("FOM ")]
        number = re.compile(r"(?<== )\S+")
        self.assertEqual([number.sub("", line) for line in lines], [number.sub("", line) for line in printed])
        self.assertEqual([float(number.search(line)[0]) for line in lines],
                         [float(number.search(line)[0]) for line in printed])
        self.assertEqual([told[key] for key in ("file", "result", "reason", "backend", "ranks")],
                         ["prefill.h5", "VALID", "", "host", 2])
        self.assertEqual(told["heads"] * told["kv"], 2)
        self.assertIn('run.modes=["total"]', told["argv"])

    def test_an_old_json_does_not_outlive_the_start_of_a_run(self):
        self.write("run.json", "{}")
        # The result cannot be written: nothing may look as if the run had ended.
        done = self.nsa("run", os.path.join(INPUTS, "prefill.toml"), "--output", "none/a.h5", "--json", "run.json")
        self.assertEqual(done.code, 6)
        self.assertEqual(os.listdir(self.folder), [])
        done = self.nsa("run", os.path.join(INPUTS, "prefill.toml"), "--output", "a.h5", "--json", "a.h5")
        self.assertEqual(done.code, 6)
        self.assertIn("cannot write a.h5 (it is the result file); choose another --json", done.err)

    def test_needles_are_found(self):
        done = self.run_input("needle_64k.toml")
        self.assertEqual(len(re.findall(r"^ +\d\.\d+ .* yes ", done.out, re.MULTILINE)), 7, done.out)
        self.assertIn("FOM needle_found_context_65536 = 100.00 %", done.out)

    def test_needles_are_found_along_many_heads(self):
        for number, seed in enumerate((1, 2, 3)):
            done = self.run_input("needle_64k.toml", "--set", "run.context=2048", "--set", "model.n_heads=16", "--set",
                                  "model.n_kv_groups=1", "--set", f"run.seed={seed}", "--output", f"needle{number}.h5")
            self.assertEqual(done.out.splitlines()[-1], "RESULT: VALID")

    def test_every_mode_alone(self):
        for mode in ("branches", "total", "ablation", "one_hot"):
            with self.subTest(mode=mode):
                done = self.run_input("prefill.toml", "--set", f'run.modes=["{mode}"]', "--set", "run.context=[512]",
                                      "--output", f"{mode}.h5")
                self.assertEqual(done.out.splitlines()[-1], "RESULT: VALID")

    def test_the_csv_replaces_neither_result_nor_input(self):
        done = self.nsa("run", os.path.join(INPUTS, "prefill.toml"), "--output", "same.h5", "--csv", "same.h5")
        self.assertEqual(done.code, 6)
        self.assertIn("it is the result file", done.err)
        self.assertEqual(os.listdir(self.folder), [])

    def test_the_other_inputs_can_be_planned(self):
        for name in sorted(str(path.relative_to(INPUTS)) for path in Path(INPUTS).rglob("*.toml")):
            with self.subTest(name=name):
                ranks = "4" if name == "quickstart.toml" else "1"
                done = self.run_input(name, "--dry-run", "--ranks", ranks)
                self.assertIn(f"plan: {ranks} ranks", done.out)
        self.assertEqual(os.listdir(self.folder), [])

    def test_every_model_names_its_source(self):
        models = list(Path(INPUTS, "models").glob("*.toml"))
        self.assertGreater(len(models), 0)
        for path in models:
            self.assertRegex(path.read_text(), r"^# [^[]*(Hugging Face|arXiv)", path.name)

    def test_a_plan_of_64_ranks_lists_owners(self):
        done = self.run_input("scaling.toml", "--dry-run", "--ranks", "64", "--set", "parallel.heads=4", "--set",
                              "parallel.kv=16", "--set", "parallel.kv_chunk_blocks=2", "--set", "run.context=8192")
        lines = done.out.splitlines()
        owners = [line.split() for line in lines[3:67]]
        self.assertEqual(owners[0][:5], ["0", "0", "0", "0", "0-3"])
        self.assertEqual(owners[63][:5], ["63", "3", "15", "3", "12-15"])
        self.assertEqual(owners[17][5:9], ["2-3", "34-35", "66-67", "98-99"])  # head shard 1, kv rank 1
        for exchange in ("lse", "candidates", "partials"):
            self.assertRegex(done.out, rf"exchange a step and layer: {exchange} +all_gather +over 16 ranks, ")
        self.assertEqual(os.listdir(self.folder), [])

    def test_the_result_is_no_larger_than_planned(self):
        self.write("in.toml", SMALL)
        tensors = ("--set", "output.tensors=true")
        for i, more in enumerate((["--set", "run.steps=500"], [*tensors, "--set", "run.context=1000"],
                                  [*tensors, "--set", "task.kind=prefill", "--set", "run.context=2000"],
                                  [*tensors, "--set", "run.scope=attention", "--set", "run.context=2000"],
                                  [*tensors, "--set", "nsa.phi=mlp", "--set", "model.layers=2"])):
            with self.subTest(more=more):
                plan = self.assert_ok(self.nsa("run", "in.toml", *more, "--dry-run")).out
                value, unit = re.search(r"^result file: about (\S+) (\S+)$", plan, re.MULTILINE).groups()
                planned = float(value) * {"kB": 1e3, "MB": 1e6}[unit]
                self.assert_ok(self.nsa("run", "in.toml", *more, "--output", f"{i}.h5"))
                self.assertLessEqual(os.path.getsize(os.path.join(self.folder, f"{i}.h5")), planned)

    def test_diff(self):
        self.write("in.toml", SMALL)
        self.assert_ok(self.nsa("run", "in.toml", "--output", "a.h5", "--set", "run.steps=12"))
        self.assert_ok(self.nsa("run", "in.toml", "--output", "b.h5", "--set", "run.steps=12", ranks=2))
        self.assert_ok(self.nsa("run", "in.toml", "--output", "c.h5", "--set", "run.steps=12", "--set", "nsa.w=32"))
        same = self.assert_ok(self.nsa("diff", "a.h5", "b.h5"))
        self.assertIn("DIFF: SAME (1 points compared)", same.out)
        self.assertRegex(same.out, r"run otherwise: heads x kv: 1 x 1, 2 x 1")
        self.assertRegex(same.out, r"branches +attend_sel .* us \[.* us, .* us\]")
        other = self.nsa("diff", "a.h5", "c.h5")
        self.assertEqual(other.code, 3)
        self.assertIn("differs: nsa.w: 512, 32", other.out)
        self.assertRegex(other.out, r"differs: reads: \d+, \d+ at the last step")

    def test_a_sweep_of_batches_and_forced_branches(self):
        self.write("in.toml", SMALL)
        done = self.assert_ok(self.nsa("run", "in.toml", "--set", "run.batch=[1, 3]", "--set",
                                       'run.force_branch=["none", "win"]'))
        self.assertRegex(done.out.splitlines()[0], "context +batch +forced +total")
        for name in ("context_64", "context_64_batch_3", "context_64_force_win", "context_64_batch_3_force_win"):
            self.assertIn(f"FOM decode_time_{name} = ", done.out)

    def test_version_help_and_info(self):
        self.assertRegex(self.assert_ok(self.nsa("--version")).out, r"^nsa \d+\.\d+\.\d+ \(commit \S+\)$")
        self.assertIn("Examples:", self.assert_ok(self.nsa("--help")).out)
        self.assertIn("--dry-run", self.assert_ok(self.nsa("run", "--help")).out)
        info = self.assert_ok(self.nsa("info")).out
        for name in ("compiler", "MPI", "HDF5", "BLAS", "CUDA", "threads", "host"):
            self.assertRegex(info, rf"(?m)^{name} +\S")


if __name__ == "__main__":
    unittest.main(verbosity=2)
