"""`nsa run --dry-run --advise`: layouts in order, memory, warnings, and what a bad machine file or input gets."""

import json
import os
import re
import unittest
from pathlib import Path

from harness import INPUTS, AppTest

MACHINE = """# --advise
name = "a machine"
backend = "host"
memory = {memory}
node = 8

[decode]
measured = "here"
fixed = 10e-6
bandwidth = 1e12
exchange = {exchange}
ranks = {ranks}
{more}
[decode.input]
"model.d_k" = 64
"""
SMALL = """[task]
kind = "decode"
[model]
n_heads = 8
n_kv_groups = 4
d_k = 64
d_v = 64
[run]
context = 65536
fill = "synthetic"
scope = "attention"
"""
MACHINES = Path(INPUTS).parent / "machines"


class Advice(AppTest):
    def machine(self, memory="1e12", exchange="5e-6", ranks=4, more="error_median = 0.05\nerror_worst = 0.1"):
        self.write("in.toml", SMALL)
        return self.write("m.toml", MACHINE.format(memory=memory, exchange=exchange, ranks=ranks, more=more))

    def advise(self, *more, ranks=4):
        return self.nsa("run", "in.toml", "--dry-run", "--ranks", str(ranks), "--advise", "m.toml", *more)

    def layouts(self, out):
        return re.findall(r"^ +(\d+ x \d+) ", out.split("advice:")[1], re.M)

    def test_the_fastest_layout_comes_first(self):
        """Three exchanges of 5 us against none: heads. Where exchanges cost nothing, all are the same within 10%."""
        self.machine()
        out = self.assert_ok(self.advise("--json", "plan.json")).out
        self.assertEqual(self.layouts(out)[0], "4 x 1")
        self.assertRegex(out, r"4 x 1 .*the fastest: exchanges 15\.0 us less than")
        self.assertIn("the error of these times is 5% in the median and 10% at worst", out)
        with open(os.path.join(self.folder, "plan.json")) as file:
            layouts = json.load(file)["advice"]["points"][0]["layouts"]
        self.assertEqual([(layout["heads"], layout["kv"]) for layout in layouts], [(4, 1), (2, 2), (1, 4)])
        self.assertEqual(layouts[0]["parts"]["exchanges"], 0)
        for layout in layouts:
            self.assertTrue(layout["fits"])
            self.assertAlmostEqual(sum(layout["parts"].values()), layout["seconds"], 12)
        self.machine(exchange="0")
        self.assertIn("within the error of the first", self.assert_ok(self.advise()).out)

    def test_what_does_not_fit_comes_last(self):
        self.machine()
        plan = self.assert_ok(self.advise("--json", "plan.json"))
        with open(os.path.join(self.folder, "plan.json")) as file:
            needed = [layout["memory"] for layout in json.load(file)["advice"]["points"][0]["layouts"]]
        self.assertEqual(plan.code, 0)
        self.machine(memory=str(float(min(needed))))
        out = self.assert_ok(self.advise()).out
        self.assertIn("the only one that fits", out)
        self.assertEqual(out.count("does not fit: a rank has"), 2)

    def test_an_error_that_is_too_large_or_unknown_is_said(self):
        too_large = "error_median = 0.11\nerror_worst = 0.15"
        for more, warning in ((too_large, "above 10% and 20%: do not rely on the order"),
                              ("", "the error of these times is not known")):
            self.machine(more=more)
            self.assertIn(warning, self.assert_ok(self.advise()).out)
        self.machine(ranks=2)
        self.assertIn("exchanges were measured among up to 2 ranks; more are extrapolated",
                      self.assert_ok(self.advise()).out)
        out = self.assert_ok(self.advise("--set", "model.d_k=128")).out
        self.assertIn("warning: the error for this input is not known: model.d_k = 128 (measured: 64)", out)

    def test_ranks_that_own_nothing_are_named(self):
        self.machine()
        out = self.assert_ok(self.advise("--set", "run.context=2048", "--set", "run.steps=16", ranks=16)).out
        self.assertRegex(out, r"1 x 16 .*11 of 16 kv ranks own no block")

    def test_bad_machine_files_are_one_error(self):
        self.machine()
        for text, said in (
            ("", ["name is missing", "memory is missing"]),
            (MACHINE.format(memory="-1", exchange="5e-6", ranks=4, more=""),
             ["m.toml:4:10: memory holds something else"]),
            (MACHINE.format(memory="1e9", exchange="5e-6", ranks=4, more="bandwith = 3"),
             ["unknown key decode.bandwith; did you mean decode.bandwidth?"]),
            (MACHINE.format(memory="1e9", exchange="5e-6", ranks=4, more="") + '"model.dk" = 3',
             ["model.dk is no key of an input"]),
            ("name = ", ["not TOML"]),
        ):
            self.write("m.toml", text)
            done = self.advise()
            self.assertEqual((done.code, done.out), (2, ""), done.out + done.err)
            for part in said:
                self.assertIn(part, done.err)

    def test_what_the_machine_says_nothing_of_is_an_error(self):
        self.machine()
        for more, said in ((["--set", "task.kind=prefill"], "m.toml says nothing of prefill"),
                           (["--set", "task.kind=needle"], 'for task.kind = "decode" and "prefill"'),
                           (["--set", "run.backend=cuda"], 'describes a machine for run.backend = "host"')):
            done = self.advise(*more)
            self.assertEqual(done.code, 2, done.out + done.err)
            self.assertIn(said, done.err)
            self.assertNotIn("advice:", done.out)
        self.assertEqual(self.nsa("run", "in.toml", "--advise", "m.toml").code, 2)  # without --dry-run
        self.assertEqual(self.advise("--json", "m.toml").code, 6)

    def test_a_gpu_that_is_not_here(self):
        """[gpu] decides workspace and routes: more SMs need more of it, another capability takes other ones."""
        self.write("in.toml", SMALL)
        text = MACHINE.format(memory="1e12", exchange="5e-6", ranks=4, more="").replace('"host"', '"cuda"')

        def plan(gpu):
            self.write("m.toml", text.replace("[decode]", gpu + "[decode]"))
            done = self.assert_ok(self.advise("--json", "plan.json"))
            with open(os.path.join(self.folder, "plan.json")) as file:
                found = json.load(file)
            layouts = {(at["heads"], at["kv"]): at["memory"] for at in found["advice"]["points"][0]["layouts"]}
            point = found["points"][0]
            self.assertEqual(layouts[found["heads"], found["kv"]], point["memory"][0]["peak"])
            routes = {route["implementation"] for route in point["routes"]}
            return done.out, found["gpu"], point["memory"][0]["workspace"], routes

        out, gpu, whole, routes = plan("[gpu]\ncapability = 90\nsms = 132\n")
        self.assertEqual((gpu, routes), ("compute capability 9.0, 132 SMs (m.toml)", {"fused"}))
        self.assertNotIn("no [gpu]", out)
        self.assertGreater(plan("[gpu]\ncapability = 90\nsms = 13200\n")[2], whole)
        self.assertEqual(plan("[gpu]\ncapability = 89\nsms = 128\n")[3], {"sdpa"})
        self.write("m.toml", text)
        self.assertIn("the machine file has no [gpu]", self.assert_ok(self.advise()).out)
        for gpu, said in (("[gpu]\nsms = 132\n", "gpu.capability is missing"),
                          ("[gpu]\ncapability = 90\nsms = 0\n", "gpu.sms holds something else"),
                          ("[gpu]\ncapability = 90\nsms = 1\nsm = 1\n", "unknown key gpu.sm; did you mean gpu.sms?")):
            self.write("m.toml", text.replace("[decode]", gpu + "[decode]"))
            done = self.advise()
            self.assertEqual(done.code, 2)
            self.assertIn(said, done.err)
        of_host = text.replace('"cuda"', '"host"')
        self.write("m.toml", of_host.replace("[decode]", "[gpu]\ncapability = 90\nsms = 1\n[decode]"))
        self.assertIn("gpu holds something else", self.advise().err)

    def test_the_machine_files_here_can_be_read(self):
        for path in sorted(MACHINES.glob("*.toml")):
            for kind in ("decode", "prefill"):
                done = self.nsa("run", os.path.join(INPUTS, "scaling", f"scaling_gpu_{kind}.toml"), "--set",
                                "run.backend=auto", "--dry-run", "--ranks", "4", "--advise", str(path))
                self.assertIn("the fastest", self.assert_ok(done).out, kind)
        self.assertGreaterEqual(len(list(MACHINES.glob("*.toml"))), 3)


if __name__ == "__main__":
    unittest.main(verbosity=2)
