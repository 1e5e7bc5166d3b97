"""Whole runs of the real binary: what it prints, what it writes, and that one result equals another."""

import csv
import json
import os
import re
import subprocess
import unittest
from pathlib import Path

from harness import BINARY, INPUTS, SMALL, AppTest

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

    def test_mixed_steps(self):
        changes = ("task.kind=mixed", "run.prefix=20", "run.prefill_chunk=13", "run.batch=3", "output.file=a.h5")
        arguments = [word for change in changes for word in ("--set", change)]
        self.write("small.toml", SMALL)
        plan = self.assert_ok(self.nsa("run", "small.toml", *arguments, "--dry-run")).out
        self.assertIn("\ncontext 64, batch 3; beside it a chunk of 13, onto a prefix of 20\n", plan)
        for branch in ("cmp", "sel", "win"):
            for phase in ("decode", "prefill"):
                self.assertEqual(plan.count(f"route of {phase} {branch}: "), 1)
        printed = self.assert_ok(self.nsa("run", "small.toml", *arguments)).out
        self.assert_complete(printed)
        name = "context_64_chunk_13_prefix_20_batch_3"
        seconds = 1e-6 * float(re.search(rf"FOM mixed_time_{name} = (\S+) us", printed)[1])
        rate = float(re.search(rf"FOM mixed_rate_{name} = (\S+) tokens/s", printed)[1])
        self.assertAlmostEqual(rate * seconds, 3 + 13, delta=0.01)
        shown = self.assert_ok(self.nsa("report", "a.h5")).out
        self.assertEqual(shown.split("\n", 1)[1], printed.replace("result: a.h5\n", ""))
        alone = self.nsa("run", "small.toml", "--set", "task.kind=mixed")
        self.assertEqual(alone.code, 2)
        self.assertIn('task.kind = "mixed" needs run.prefill_chunk', alone.err)

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
                # [input] selection is a path from the folder of the run.
                recorded = ["--set", f'input.selection="{INPUTS}/recorded/smollm2.h5"'] if "recorded" in name else []
                done = self.run_input(name, "--dry-run", "--ranks", ranks, *recorded)
                self.assertIn(f"plan: {ranks} ranks", done.out)
        self.assertEqual(os.listdir(self.folder), [])

    def test_every_model_names_its_source(self):
        models = list(Path(INPUTS, "models").glob("*.toml"))
        self.assertGreater(len(models), 0)
        for path in models:
            self.assertRegex(path.read_text(), r"^# [^[]*(Hugging Face|arXiv)", path.name)

    def test_a_plan_of_64_ranks_lists_owners(self):
        done = self.run_input("scaling/scaling.toml", "--dry-run", "--ranks", "64", "--set", "parallel.heads=4",
                              "--set", "parallel.kv=16", "--set", "parallel.kv_chunk_blocks=2", "--set",
                              "run.context=8192")
        lines = done.out.splitlines()
        owners = [line.split() for line in lines[3:67]]
        self.assertEqual(owners[0][:5], ["0", "0", "0", "0", "0-3"])
        self.assertEqual(owners[63][:5], ["63", "3", "15", "3", "12-15"])
        self.assertEqual(owners[17][5:9], ["2-3", "34-35", "66-67", "98-99"])  # head shard 1, kv rank 1
        for exchange in ("lse", "candidates", "partials"):
            self.assertRegex(done.out, rf"exchange a step and layer: {exchange} +all_gather +over 16 ranks, ")
        self.assertEqual(os.listdir(self.folder), [])

    def test_a_plan_as_json(self):
        """Owners, bytes and exchanges as the text has them; for a GPU that is not here too. Nothing else is written."""
        done = self.run_input("paper.toml", "--dry-run", "--ranks", "256", "--set", "run.backend=cuda", "--set",
                              "parallel.heads=4", "--set", "parallel.kv=64", "--set", "run.context=[65536]", "--json",
                              "plan.json")
        with open(os.path.join(self.folder, "plan.json")) as file:
            plan = json.load(file)
        self.assertEqual(os.listdir(self.folder), ["plan.json"])
        self.assertEqual((plan["ranks"], plan["heads"], plan["kv"], plan["warning"]), (256, 4, 64, ""))
        self.assertEqual(sum(owner["ranks"] for owner in plan["owners"]), 256)
        shard = [owner for owner in plan["owners"] if owner["head_shard"] == 0]
        blocks = -(-plan["positions"] // 64)
        self.assertEqual(sum(owner["ranks"] * owner["blocks_each"] for owner in shard), blocks)
        point = plan["points"][0]
        self.assertEqual(sum(memory["ranks"] for memory in point["memory"]), 256)
        for memory in point["memory"]:
            self.assertGreaterEqual(memory["peak"], memory["weights"] + memory["caches"])
        self.assertEqual({exchange["name"] for exchange in point["exchanges"]},
                         {"lse", "candidates", "partials", "outputs"})
        self.assertEqual(plan["workspace_of"], "cuda")
        if plan["gpu"]:  # no GPU here
            self.assertIn("workspace and routes of a GPU that is not here: compute capability 9.0, 132 SMs", done.out)
            self.assertEqual({(r["device"], r["implementation"]) for r in point["routes"]},
                             {("compute capability 9.0", "fused")})
        refused = self.nsa("run", os.path.join(INPUTS, "paper.toml"), "--dry-run", "--json", "none/plan.json")
        self.assertEqual((refused.code, refused.out), (6, ""))

    def test_the_result_is_no_larger_than_planned(self):
        self.write("in.toml", SMALL)
        tensors = ("--set", "output.tensors=true")
        repeated = ["--set", 'run.modes=["total", "ablation", "one_hot"]', "--set", "run.min_time=0.7"]
        for i, more in enumerate((["--set", "run.steps=500"], repeated, [*tensors, "--set", "run.context=1000"],
                                  [*tensors, "--set", "task.kind=prefill", "--set", "run.context=2000"],
                                  [*tensors, "--set", "run.scope=attention", "--set", "run.context=2000"],
                                  [*tensors, "--set", "task.kind=mixed", "--set", "run.prefill_chunk=2000"],
                                  [*tensors, "--set", "nsa.phi=mlp", "--set", "model.layers=2"])):
            with self.subTest(more=more):
                plan = self.assert_ok(self.nsa("run", "in.toml", *more, "--dry-run")).out
                value, unit = re.search(r"^result file: at most (\S+) (\S+)$", plan, re.MULTILINE).groups()
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

    def test_diff_pairs_prefills_of_one_prefix(self):
        self.write("in.toml", SMALL)
        for name, prefix in ("a.h5", 100), ("b.h5", 100), ("c.h5", 101):
            done = self.assert_ok(self.nsa("run", "in.toml", "--output", name, "--set", "task.kind=prefill", "--set",
                                           f"run.prefix={prefix}", "--set", "run.prefill_chunk=23"))
            self.assertIn(f"FOM prefill_time_context_64_prefix_{prefix} = ", done.out)
            self.assertIn(" context   prefix ", done.out)
        done = self.nsa("diff", "a.h5", "b.h5")
        self.assertIn("prefill, context 64 after 100, batch 1, forced branch none", done.out)
        self.assertIn("no point in common", self.nsa("diff", "a.h5", "c.h5").err)

    def test_diff_names_the_runs_and_fails_above(self):
        self.write("in.toml", SMALL)
        for name in "a.h5", "b.h5":
            self.assert_ok(self.nsa("run", "in.toml", "--output", name, "--set", "run.steps=12"))
        done = self.assert_ok(self.nsa("diff", "a.h5", "b.h5", "--csv", "times.csv", "--fail-above", "100000%"))
        self.assertRegex(done.out, r"^A: a.h5: .+, host backend, 1 rank, commit \S+, \d{4}-.*\nB: b.h5: .+, commit ")
        with open(os.path.join(self.folder, "times.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual({row["point"] for row in rows}, {"decode, context 64, batch 1, forced branch none"})
        self.assertEqual((rows[0]["mode"], rows[0]["stage"], rows[0]["a_n"]), ("total", "step", "11"))
        for row in rows:
            self.assertIn(row["verdict"], ("SAME", "FASTER", "SLOWER", "UNCLEAR"))
            self.assertAlmostEqual(float(row["ratio"]), float(row["b_median_s"]) / float(row["a_median_s"]), places=6)
        words = re.search(r"\nTIMES: (\d+) SAME (\d+) FASTER (\d+) SLOWER (\d+) UNCLEAR of (\d+) series\n", done.out)
        *counts, series = map(int, words.groups())
        self.assertEqual((sum(counts), series), (len(rows), len(rows)))
        self.assertEqual(self.nsa("diff", "a.h5", "b.h5", "--csv", "no/times.csv").code, 6)
        self.assertEqual(self.nsa("diff", "a.h5", "b.h5", "--fail-above", "x%").code, 2)

    def test_diff_fails_above(self):
        """A model that is 64 times as wide: other parameters, which count more than its time."""
        self.write("in.toml", SMALL.replace("steps = 3", "steps = 600\nfill = \"synthetic\"\nmodes = [\"total\"]"))
        for name, dim in (("a.h5", 32), ("b.h5", 2048)):
            self.assert_ok(self.nsa("run", "in.toml", "--output", name, "--set", f"model.dim={dim}"))
        done = self.nsa("diff", "a.h5", "b.h5", "--fail-above", "20%")
        self.assertEqual(done.code, 3)
        if "NOISY" not in done.out:  # as on a busy machine
            self.assertRegex(done.out, r"\nSLOWER than allowed: decode, context 64.*: total step takes \S+ times")

    def test_against_another_program(self):
        self.write("in.toml", SMALL)
        done = self.assert_ok(self.nsa("run", "in.toml", "--against", BINARY, "--pairs", "2", "--output", "p.h5",
                                       "--set", 'run.modes=["total"]'))
        self.assertRegex(done.out, r"^A: p.a1.h5: .*\nB: p.b1.h5: ")
        self.assertRegex(done.out, r"\n  total +step .* \d+\.\d+  UNCLEAR \(too few pairs\)\n")
        self.assertRegex(done.out, r"\nTIMES: 0 SAME 0 FASTER 0 SLOWER 1 UNCLEAR of 1 series, 2 pairs\nDIFF: SAME\n$")
        self.assertEqual(sorted(os.listdir(self.folder)), ["in.toml", "p.a1.h5", "p.a2.h5", "p.b1.h5", "p.b2.h5"])
        for binary, code, part in (("/no/such", 2, "cannot start /no/such"), ("false", 2, "false run in.toml "),
                                   (BINARY, 6, "p.a1.h5 exists")):
            output = "p.h5" if binary == BINARY else "q.h5"
            refused = self.nsa("run", "in.toml", "--against", binary, "--output", output)
            self.assertEqual(refused.code, code, refused.err)
            self.assertIn(part, refused.err)
        self.assertEqual(self.nsa("run", "in.toml", "--pairs", "2").code, 2)  # without --against

    def test_a_goal_for_the_interval(self):
        """All ranks stop together, when the interval is narrow or the time is over."""
        self.write("in.toml", SMALL)
        many = self.assert_ok(self.nsa("run", "in.toml", "--output", "a.h5", "--min-interval", "100%", ranks=2))
        self.assertIn("RESULT: VALID", many.out)
        late = self.assert_ok(self.nsa("run", "in.toml", "--output", "b.h5", "--min-interval", "0.000001", "--set",
                                       "run.interval_time=0.2", ranks=2))
        self.assertRegex(late.out, r"\n +64 .*  NOISY\n")
        self.assertRegex(late.out, r"noisy at .*: total: the median's 95% interval is \S+ wide, not the 0.0% of run")
        for name, reason in (("a.h5", b"min_interval"), ("b.h5", b"interval_time")):
            with open(os.path.join(self.folder, name), "rb") as file:
                self.assertRegex(file.read(), b"[^.\"n]" + reason + b"\0")  # not the key run.min_interval
        refused = self.nsa("run", "in.toml", "--min-interval", "2%", "--set", "task.kind=needle")
        self.assertEqual(refused.code, 2)
        self.assertIn("run.min_interval needs task.kind = \"decode\" or \"prefill\"", refused.err)

    def test_a_ragged_batch_on_every_layout(self):
        self.write("in.toml", SMALL.replace("context = 64\n", "") + "[batch]\ncontext = [1, 300, 40]\n")
        for ranks, layout in ((0, []), (2, ["--set", "parallel.kv=2", "--set", "parallel.kv_chunk_blocks=1"])):
            done = self.assert_ok(self.nsa("run", "in.toml", "--output", f"ragged{ranks}.h5", *layout, ranks=ranks))
            self.assertRegex(done.out, r"context +batch .* reads tokens/s\n +114 +3 ")
            self.assertRegex(done.out, r"\nFOM decode_rate_context_114_batch_3_listed = \S+ tokens/s\n")
            self.assertIn("RESULT: VALID", done.out)
            again = self.assert_ok(self.nsa("report", f"ragged{ranks}.h5"))
            self.assertIn("decode_time_context_114_batch_3_listed", again.out)

    def test_ragged_beside_equal_lengths(self):
        self.write("in.toml", SMALL + 'batch = 4\n[batch]\ndistribution = ["equal", "zipf"]\n')
        for name in ("a.h5", "b.h5"):
            done = self.assert_ok(self.nsa("run", "in.toml", "--output", name))
            self.assertRegex(done.out, r"\nragged at context_64_batch_4_zipf: \S+ x the time of equal lengths, ")
            self.assertRegex(done.out, r"\nFOM decode_ragged_cost_context_64_batch_4_zipf = \S+ 1\n")
        same = self.nsa("diff", "a.h5", "b.h5").out
        self.assertIn("decode, context 64, batch 4, forced branch none: the same result", same)
        self.assertIn("decode, context 64, batch 4, lengths zipf, forced branch none: the same result", same)

    def test_a_trace_of_requests(self):
        batch = '[batch]\ndistribution = "file"\nfile = "trace.csv"\n'
        self.write("in.toml", SMALL.replace("context = 64\n", "batch = [1, 2]\n") + batch)
        self.write("trace.csv", "ContextTokens,GeneratedTokens\n90,0\n10,0\n")
        done = self.assert_ok(self.nsa("run", "in.toml"))
        self.assertIn("FOM decode_time_context_90_file = ", done.out)
        self.assertIn("FOM decode_time_context_50_batch_2_file = ", done.out)
        self.write("trace.csv", "ContextTokens,GeneratedTokens\n90,0\n11,0\n")
        self.assertIn("another fingerprint", self.nsa("run", "in.toml", "--resume").err)

    def test_a_sweep_of_batches_and_forced_branches(self):
        self.write("in.toml", SMALL)
        done = self.assert_ok(self.nsa("run", "in.toml", "--set", "run.batch=[1, 3]", "--set",
                                       'run.force_branch=["none", "win"]'))
        self.assertRegex(done.out.splitlines()[0], "context +batch +forced +total")
        for name in ("context_64", "context_64_batch_3", "context_64_force_win", "context_64_batch_3_force_win"):
            self.assertIn(f"FOM decode_time_{name} = ", done.out)

    def test_completion(self):
        script = self.assert_ok(self.nsa("--completion", "bash")).out + """
complete_words() { COMP_WORDS=(nsa "$@"); COMP_CWORD=$#; _nsa; echo "${COMPREPLY[@]}"; }
complete_words re; complete_words run --dr; complete_words gate in.
"""
        self.write("in.toml", SMALL)
        done = subprocess.run(["bash", "-c", script], cwd=self.folder, capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout.splitlines(), ["report", "--dry-run", "in.toml"])
        self.assertEqual(self.nsa("--completion", "tcsh").code, 2)

    def test_version_help_and_info(self):
        self.assertRegex(self.assert_ok(self.nsa("--version")).out, r"^nsa \d+\.\d+\.\d+ \(commit \S+\)$")
        self.assertIn("Examples:", self.assert_ok(self.nsa("--help")).out)
        self.assertIn("--dry-run", self.assert_ok(self.nsa("run", "--help")).out)
        self.assertEqual(self.nsa("help").out, self.nsa("--help").out)
        self.assertEqual(self.nsa("help", "gate").out, self.nsa("gate", "--help").out)
        for command in ("run", "gate", "report", "diff", "info"):  # each has examples of its own, and no others
            examples = self.nsa(command, "--help").out.split("Example", 1)[1].split("Exit codes:")[0]
            self.assertTrue(all(f"nsa {command} " in line for line in examples.splitlines()[1:] if line), examples)
        self.assertIn("The implementation of each branch", self.nsa("info", "--routes").out)
        info = self.assert_ok(self.nsa("info")).out
        for name in ("compiler", "MPI", "HDF5", "BLAS", "CUDA", "threads", "host"):
            self.assertRegex(info, rf"(?m)^{name} +\S")


if __name__ == "__main__":
    unittest.main(verbosity=2)
