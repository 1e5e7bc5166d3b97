"""Selections that a run recorded, or another program wrote, are attended as they are, on every layout."""

import csv
import os
import unittest

import h5py
import numpy as np

from harness import SMALL, AppTest
from test_gate import KERNELS

FILE = 6  # exit code
L_SEL, N_SEL, GROUPS = 8, 8, 2
INPUT = SMALL.replace("context = 64", 'context = 200\nscope = "attention"').replace(
    "[run]", f"[nsa]\nl = 8\nd = 4\nl_sel = {L_SEL}\nn_sel = {N_SEL}\nw = 32\n[run]")


class Replay(AppTest):
    def setUp(self):
        super().setUp()
        self.write("in.toml", INPUT)

    def run_to(self, name, *settings, ranks=0, options=()):
        return self.assert_ok(self.nsa("run", "in.toml", "--output", name, *options, *(
            word for setting in settings for word in ("--set", setting)), ranks=ranks))

    def selected(self, name, point="0000"):
        with h5py.File(os.path.join(self.folder, name)) as file:
            tensors = file[f"points/{point}/tensors"]
            return tensors["selected"][()], tensors.attrs["first_position"]

    def write_lists(self, name, lists, first=0):
        with h5py.File(os.path.join(self.folder, name), "w") as file:
            file.create_dataset("selected", data=lists, compression="gzip")
            file.attrs["first_position"] = first

    def other_lists(self, positions=200):
        """Lists that no ranking would choose: the oldest blocks and that of the query."""
        lists = np.full((1, positions, GROUPS, N_SEL), -1, np.int32)
        for t in range(positions):
            own = t // L_SEL
            blocks = [*range(min(N_SEL - 1, own)), own]
            lists[:, t, :, :len(blocks)] = blocks
        return lists

    def test_a_run_is_replayed(self):
        self.run_to("a.h5", 'task.kind="prefill"', options=["--record-selection"])
        self.run_to("whole.h5", 'task.kind="prefill"', "output.tensors=true")
        lists, first = self.selected("a.h5")
        self.assertEqual(first, 0)
        with h5py.File(os.path.join(self.folder, "a.h5")) as file:
            self.assertNotIn("q", file["points/0000/tensors"])  # only what was asked for
        for layout in "heads", "kv":
            name = f"{layout}.h5"
            self.run_to(name, 'task.kind="prefill"', 'input.selection="a.h5"', f"parallel.{layout}=2",
                        "output.tensors=true", ranks=2)
            np.testing.assert_array_equal(self.selected(name)[0], lists)
            self.assertIn("DIFF: SAME", self.assert_ok(self.nsa("diff", "whole.h5", name)).out)
        self.steps_of_other_work("whole.h5", "kv.h5", "only A ranks")
        self.steps_of_other_work("kv.h5", "whole.h5", "only B ranks")
        with h5py.File(os.path.join(self.folder, "kv.h5")) as file:
            self.assertEqual(len(file.attrs["input_selection_sha256"]), 64)
            times = file["points/0000/time"]
            stages = [name.decode() for name in file["points/0000/stage"][()]]
            self.assertTrue(np.isnan(times[0, stages.index("rank")]).all())  # nothing was ranked

    def steps_of_other_work(self, a, b, why):
        """A step that ranks and one that does not are never called faster or slower; their stages may be."""
        self.assert_ok(self.nsa("diff", a, b, "--csv", "times.csv"))
        with open(os.path.join(self.folder, "times.csv"), newline="") as file:
            rows = {(row["mode"], row["stage"]): (row["verdict"], row["why"]) for row in csv.DictReader(file)}
        for mode in "total", "branches":
            self.assertEqual(rows[mode, "step"], ("UNCLEAR", why))
        self.assertNotEqual(rows["branches", "attend_sel"][1], why)
        self.assertNotIn(("branches", "rank"), rows)

    def test_a_file_whose_numbers_are_out_of_range(self):
        lists = self.other_lists()
        large = lists.astype(np.int64)
        large[0, 0, 0, 0] = (1 << 32) + 1  # 1 in 32 bits
        odd = lists.astype(np.int64)
        odd[0, 0, 0, 0] = (1 << 24) + 1  # no 32-bit float
        for data, first, part in ((lists[:0], 0, "/selected is empty"), (lists[..., :0], 0, "/selected is empty"),
                                  (lists, (1 << 63) - 1, "/selected begins at position 9223372036854775807"),
                                  (lists, -(1 << 63), "/selected begins at position -9223372036854775808"),
                                  (large, 0, "block 2147483647 is none of 0 to 0"),
                                  (odd, 0, "block 16777217 is none of 0 to 0")):  # fmt: skip
            with self.subTest(part=part):
                self.write_lists("s.h5", data, first)
                done = self.nsa("run", "in.toml", "--set", 'task.kind="prefill"', "--set", 'input.selection="s.h5"')
                self.assertEqual(done.code, FILE, done.out + done.err)
                self.assertIn("cannot use s.h5 (", done.err)
                self.assertIn(part, done.err)

    def test_a_prefill_onto_a_prefix_is_replayed(self):
        for scope in "attention", "layer":
            onto = ('task.kind="prefill"', "run.context=90", "run.prefix=77", "run.prefill_chunk=32",
                    f'run.scope="{scope}"')  # fmt: skip
            self.run_to(f"{scope}.h5", *onto, options=["--record-selection"])
            lists, first = self.selected(f"{scope}.h5")
            self.assertEqual((first, lists.shape[1]), (77, 90))
            name = f"{scope}_replayed.h5"
            self.run_to(name, *onto, f'input.selection="{scope}.h5"', "parallel.kv=2", "output.selection=true", ranks=2)
            np.testing.assert_array_equal(self.selected(name)[0], lists)

    def test_lists_of_another_program(self):
        lists = self.other_lists()
        self.write_lists("lists.h5", lists)
        outputs = []
        for layout, ranks in (("heads=1", 0), ("heads=2", 2), ("kv=2", 2)):
            for kind, context, steps in ("prefill", 200, 3), ("decode", 150, 40):
                name = f"{kind}_{layout}.h5"
                self.run_to(name, f'task.kind="{kind}"', f"run.context={context}", f"run.steps={steps}",
                            'input.selection="lists.h5"', f"parallel.{layout}", "output.tensors=true", ranks=ranks)
                found, first = self.selected(name)
                self.assertEqual(first, context if kind == "decode" else 0)
                np.testing.assert_array_equal(found, lists[:, first:first + found.shape[1]])
                outputs.append(name)
        for name in outputs[2:]:
            one = "prefill_heads=1.h5" if "prefill" in name else "decode_heads=1.h5"
            self.assertIn("DIFF: SAME", self.assert_ok(self.nsa("diff", one, name)).out)

    def test_kernels(self):
        self.write("in.toml", KERNELS)
        self.run_to("k.h5", options=["--record-selection"])
        lists, first = self.selected("k.h5")
        self.assertEqual((lists.shape, first), ((1, 32, 1, 4), 480))
        recorded = 'kernels.spans="recorded"'
        self.run_to("again.h5", recorded, 'input.selection="k.h5"', "output.selection=true")
        np.testing.assert_array_equal(self.selected("again.h5")[0], lists)
        self.write_lists("twice.h5", np.repeat(lists, 2, axis=1))  # the last rows count
        self.run_to("last.h5", recorded, 'input.selection="twice.h5"', "output.selection=true")
        np.testing.assert_array_equal(self.selected("last.h5")[0], np.repeat(lists, 2, axis=1)[:, -32:])
        self.refuses("as row 0 of 32: block 6 is none of 0 to 5, the whole blocks in front of the rows",
                     recorded, 'input.selection="k.h5"', "run.context=440")

    def refuses(self, message, *settings, code=FILE):
        done = self.nsa("run", "in.toml", "--output", "bad.h5",
                        *(word for setting in settings for word in ("--set", setting)))
        self.assertEqual(done.code, code, done.err)
        self.assertIn(message, done.err)
        self.assertLessEqual(len(done.err.splitlines()), 2, done.err)
        self.assertFalse(os.path.exists(os.path.join(self.folder, "bad.h5")))

    def test_lists_that_no_query_selects(self):
        prefill, given = 'task.kind="prefill"', 'input.selection="bad_lists.h5"'
        for where, values, message in (
            ((0, 100, 1), [0, 1, 2, 3, 4, 5, 12, 13], "position 100, sequence 0, group 1: block 13 is none of 0 to 12"),
            ((0, 100, 1), [0, 1, 2, 4, 3, 5, 6, 12], "block 3 follows block 4; a list ascends, without duplicates"),
            ((0, 100, 1), [0, 1, 2, 2, 3, 5, 6, 12], "block 2 follows block 2"),
            ((0, 100, 1), [0, 1, 2, 3, 4, 5, 12, -1], "it has 7 blocks, not 8"),
            ((0, 100, 1), [0, 1, 2, 3, 4, -1, 5, 12], "block 5 follows the end of the list, -1"),
            ((0, 100, 1), [-2, 1, 2, 3, 4, 5, 6, 12], "block -2 is none of 0 to 12"),
            ((0, 100, 1), [0, 1, 2, 3, 4, 5, 6, 7], "block 12, that of the query, is missing"),
            # 2^24 + 1 is no float; 2^32 + 1 is block 1 in 32 bits
            ((0, 100, 1), [0, 1, 2, 3, 4, 5, 6, 2**24 + 1], "block 16777217 is none of 0 to 12"),
            ((0, 100, 1), [0, 2**32 + 1, 2, 3, 4, 5, 6, 12], "block 2147483647 is none of 0 to 12"),
            ((0, 9, 0), [0, -1, -1, -1, -1, -1, -1, -1], "it has 1 blocks, not 2"),
        ):
            lists = self.other_lists().astype(np.int64)
            lists[where] = values
            self.write_lists("bad_lists.h5", lists)
            self.refuses(message, prefill, given)

    def test_files_without_such_lists(self):
        given = 'input.selection="lists.h5"'
        self.refuses("cannot use lists.h5 (no such file)", given)
        self.write("lists.h5", "text")
        self.refuses("cannot use lists.h5", given)
        self.write_lists("short.h5", self.other_lists(100))
        self.refuses("this input needs 1 sequences, positions 0 to 199, 2 groups, 8 blocks a query; "
                     "it holds 1 sequences, positions 0 to 99, 2 groups, 8 blocks a query", 'task.kind="prefill"',
                     'input.selection="short.h5"')
        self.write_lists("reals.h5", self.other_lists().astype(np.float32))
        self.refuses("/selected is not an array of integers", 'input.selection="reals.h5"')
        with h5py.File(os.path.join(self.folder, "other.h5"), "w") as file:
            file["x"] = [1.0]
        self.refuses("it holds no selected blocks", 'input.selection="other.h5"')

    def test_inputs_that_contradict(self):
        for message, *settings in (
            ("input.selection needs model.layers = 1", 'input.selection="a.h5"', 'run.scope="layer"', "model.layers=2"),
            ("input.selection needs run.steps_per_graph = 1", 'input.selection="a.h5"', "run.steps=4",
             "run.warmup=2", "run.steps_per_graph=2"),
            ('kernels.spans = "recorded" and input.selection need each other', 'task.kind="kernels"',
             'kernels.spans="recorded"', "kernels.rows=20", "kernels.blocks=4"),
        ):
            self.refuses(message, *settings, code=2)


if __name__ == "__main__":
    unittest.main()
