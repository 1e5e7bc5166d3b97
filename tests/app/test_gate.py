"""`nsa gate` on the real binary: CSVs that are audited, files that are judged or refused, exit codes."""

import json
import os
import re
import unittest

from harness import SMALL, AppTest

USAGE, FILE = 2, 6
STAY, INCONCLUSIVE, NOT_EVIDENCE = 10, 11, 12
HEADER = "S,ms_total,ms_cmp,ms_sel,ms_win,reads_actual,reads_expected\n"
NSA_VIBE_CSV = HEADER + """128,5.862,5.944,6.003,6.001,1159,1193
256,5.932,5.952,5.965,6.024,1159,1329
512,5.893,5.981,5.998,5.988,1159,1569
1024,5.987,6.070,6.122,6.132,1159,1601
"""


class Csv(AppTest):
    def test_the_csv_of_nsa_vibe_is_no_evidence(self):
        self.write("decode_gpu_v2.csv", NSA_VIBE_CSV)
        done = self.assert_ok(self.nsa("gate", "decode_gpu_v2.csv"))
        for part in ("305% of the total", "1159 at every S", "in 4 of 4 rows",
                     "VERDICT: NOT EVIDENCE (decode_gpu_v2.csv"):
            self.assertIn(part, done.out)
        self.assertEqual(self.nsa("gate", "decode_gpu_v2.csv", "--exit-verdict").code, NOT_EVIDENCE)
        audit = json.loads(self.nsa("gate", "decode_gpu_v2.csv", "--json").out)["audits"][0]
        self.assertEqual(audit["verdict"], "NOT EVIDENCE")
        self.assertEqual(len(audit["findings"]), 3)
        self.assertEqual([row["context"] for row in audit["rows"]], [128, 256, 512, 1024])

    def test_our_own_csv_is_consistent(self):
        self.write("in.toml", SMALL)
        self.assert_ok(self.nsa("run", "in.toml", "--csv", "own.csv", "--set", "run.context=[64, 256]",
                                "--set", "run.steps=12"))
        done = self.nsa("gate", "own.csv", "--exit-verdict")
        self.assertIn("VERDICT: CONSISTENT (own.csv", self.assert_ok(done).out)

    def test_what_is_wrong_with_a_csv(self):
        for text, parts in ((HEADER, ["a.csv (it has no row of data)"]),
                            ("", ["a.csv (it has no row of data)"]),
                            (NSA_VIBE_CSV.replace("ms_sel", "ms_selection"), ["a.csv (column ms_sel is missing"]),
                            (NSA_VIBE_CSV.replace("6.003", "fast"), ["a.csv:2 (column ms_sel holds 'fast'"]),
                            (NSA_VIBE_CSV.replace("1159,1601", "1159"),
                             ["a.csv:5 (6 cells, the header has 7 columns)"])):
            with self.subTest(text=text):
                self.write("a.csv", text)
                done = self.nsa("gate", "a.csv")
                self.assertEqual(done.code, FILE, done.err)
                self.assertEqual(done.err.count("nsa: error: "), 1, done.err)
                for part in parts:
                    self.assertIn(part, done.err)


class Files(AppTest):
    def refuses(self, code, parts, *arguments):
        done = self.nsa("gate", *arguments)
        self.assertEqual(done.code, code, done.out + done.err)
        self.assertEqual(done.err.count("nsa: "), 1, done.err)
        for part in parts:
            self.assertIn(part, done.err)

    def small_run(self, name, *more):
        self.write("in.toml", SMALL)
        self.assert_ok(self.nsa("run", "in.toml", "--output", name, "--set", "run.steps=20", "--set",
                                'run.modes=["branches", "total", "ablation"]', "--set", "route.sel=sdpa", *more))

    def test_bad_files(self):
        self.refuses(USAGE, ["FILES is required"])
        self.refuses(FILE, ["none.h5 (no such file)"], "none.h5")
        self.refuses(FILE, ["none.csv (no such file)"], "none.csv")
        self.write("text.h5", "not HDF5\n" * 100)
        self.refuses(FILE, ["text.h5"], "text.h5")
        self.small_run("a.h5")
        with open(os.path.join(self.folder, "a.h5"), "rb") as file:
            whole = file.read()
        schema = re.search(rb"1\.\d+\0", whole)[0]
        newer = b"9" + schema[1:]
        for name, text, other, part in (("damaged.h5", b"schema_version", b"another_thing!", "checksum"),
                                        ("newer.h5", schema, newer, f"its schema is '{newer[:-1].decode()}'"),
                                        ("stages.h5", b"attend_sel", b"attend_all", "its stages are")):
            with self.subTest(file=name):
                self.assertIn(text, whole)
                with open(os.path.join(self.folder, name), "wb") as file:
                    file.write(whole.replace(text, other))
                self.refuses(FILE, [name, part], name)
        os.truncate(os.path.join(self.folder, "a.h5"), 3000)
        self.refuses(FILE, ["a.h5"], "a.h5")

    def test_a_decode_run_alone_is_inconclusive_and_says_what_is_missing(self):
        self.small_run("a.h5", "--set", "run.context=[64, 128]")
        done = self.assert_ok(self.nsa("gate", "a.h5"))
        self.assertIn("VERDICT: INCONCLUSIVE", done.out)
        self.assertIn("nsa run inputs/gate/m4_kernels.toml", done.out)
        self.assertEqual(self.nsa("gate", "a.h5", "--exit-verdict").code, INCONCLUSIVE)
        device = json.loads(self.nsa("gate", "a.h5", "--json").out)["devices"][0]
        self.assertEqual([c["context"] for c in device["contexts"]], [64, 128])
        self.assertGreater(device["contexts"][0]["share"]["measured"]["value"], 0)
        self.assertIsNone(device["speedup"]["measured"]["value"])
        only = json.loads(self.nsa("gate", "a.h5", "--json", "--context", "128").out)["devices"][0]
        self.assertEqual([c["context"] for c in only["contexts"]], [128])

    def test_mixed_inputs_are_refused(self):
        self.small_run("a.h5")
        self.small_run("b.h5", "--set", "nsa.w=64", "--set", "run.context=128")
        self.refuses(USAGE, ["decode nsa.w: 512 in a.h5, 64 in b.h5"], "a.h5", "b.h5")
        self.refuses(USAGE, ["a.h5 and a.h5 both hold decode, context 64"], "a.h5", "a.h5")


KERNELS = """[task]
kind = "kernels"
[model]
precision = "fp32"
[run]
backend = "host"
context = 512
steps = 12
warmup = 2
[kernels]
rows = 32
heads = 2
head_size = 16
blocks = 4
implementations = ["fused", "sdpa", "sdpa_packed", "masked"]
"""


class Kernels(AppTest):
    def test_kernels_from_run_to_record(self):
        self.write("k.toml", KERNELS)
        done = self.assert_ok(self.nsa("run", "k.toml", "--output", "k.h5",
                                       "--set", 'kernels.spans=["mixed", "scattered"]'))
        name = "sel_N32_H2_D16_n4_mixed_context_512"
        same = self.assert_ok(self.nsa("diff", "k.h5", "k.h5"))  # paired by shape
        self.assertIn("DIFF: SAME (2 points compared)", same.out)
        self.assertRegex(same.out, r"\nkernels, sel_\S+_mixed_context_512, batch 1: the same result\n")
        self.assertRegex(same.out, r"  kernels +fused .* 1\.000 .*(SAME|UNCLEAR)\b")
        for figure in ("kernels_fused_time", "kernels_sdpa_time", "kernels_sdpa_packed_time", "kernels_speedup",
                       "kernels_speedup_packed", "kernels_mean_abs_err", "kernels_max_abs_err"):
            self.assertIn(f"FOM {figure}_{name} = ", done.out)
        self.assertEqual(done.out.splitlines()[-1], "RESULT: VALID")
        self.write("d.toml", SMALL)
        self.assert_ok(self.nsa("run", "d.toml", "--output", "d.h5", "--set", "run.steps=12", "--set", "route.sel=sdpa",
                                "--set", 'run.modes=["branches", "total", "ablation"]'))
        page = self.assert_ok(self.nsa("gate", "d.h5", "k.h5", "--adr", "adr.md")).out
        self.assertRegex(page, r"with the gather +\d+\.\d\dx \[")
        self.assertRegex(page, r"error +\d\.\de-0\d \[.*\] +<= 0.001 +met")
        self.assertRegex(page, r"VERDICT: (PROCEED|STAY|INCONCLUSIVE) \(")
        with open(os.path.join(self.folder, "adr.md")) as file:
            record = file.read()
        self.assertIn("| N=32 H=2 D=16 n=4 scattered |", record)
        self.assertIn("`d.h5`: `", record)

    def test_on_two_ranks(self):
        self.write("k.toml", KERNELS)
        done = self.assert_ok(self.nsa("run", "k.toml", ranks=2))
        self.assertEqual(done.out.splitlines()[-1], "RESULT: VALID")
        plan = self.nsa("run", "k.toml", "--dry-run", "--ranks", "2").out
        self.assertIn("plan: 2 ranks, each measures 1 shapes", plan)

    def test_flash_guard_shape(self):
        self.write("k.toml", KERNELS)
        done = self.assert_ok(self.nsa("run", "k.toml", "--set", 'kernels.branch=["win", "cmp"]',
                                       "--set", "kernels.rows=0", "--set", 'kernels.implementations=["flash", "sdpa"]'))
        self.assertIn("FOM kernels_sdpa_time_win_H2_D16_context_512 = ", done.out)
        self.assertEqual(done.out.splitlines()[-1], "RESULT: VALID")

    def test_what_is_wrong_with_an_input(self):
        self.write("k.toml", KERNELS)
        for settings, part in ((["kernels.rows=600"], "kernels.rows = 600 must be at most run.context = 512"),
                               (["kernels.rows=300"], "kernels.blocks = 4 needs as many blocks of 64 tokens"),
                               (["kernels.rows=0"], "kernels.blocks = 4 needs as many blocks"),
                               (["kernels.spans=[]"], "kernels.spans is empty"),
                               (["run.context=[]"], "run.context is empty"),
                               (["kernels.spans=diagonal"], '"contiguous", "mixed", "scattered"'),
                               (["run.batch=2"], "has one sequence and no gates"),
                               (["output.tensors=true"], "has no CSV and no tensors")):
            with self.subTest(settings=settings):
                done = self.nsa("run", "k.toml", *(word for key in settings for word in ("--set", key)))
                self.assertEqual(done.code, USAGE, done.out + done.err)
                self.assertIn(part, done.err)


if __name__ == "__main__":
    unittest.main(verbosity=2)
