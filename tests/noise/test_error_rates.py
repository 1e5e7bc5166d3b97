"""The statistics and the counts of error_rates.py, on values that are known."""

import unittest

import error_rates


def row(verdict, ratio=1.0, low=0.99, high=1.01):
    return {"point": "p", "mode": "total", "stage": "step", "verdict": verdict, "a_median_s": "1", "ratio": str(ratio),
            "b_median_s": str(ratio), "ratio_low": str(low), "ratio_high": str(high)}


class ErrorRates(unittest.TestCase):
    def test_intervals_of_rates(self):
        for k, n, low, high in (0, 200, 0, 0.01828), (2, 200, 0.00121, 0.03565), (195, 200, 0.94260, 0.99183):
            found = error_rates.clopper_pearson(k, n)
            self.assertAlmostEqual(found[0], low, places=4)
            self.assertAlmostEqual(found[1], high, places=4)

    def test_intervals_of_medians(self):
        """docs/METRICS.md, "Statistics"."""
        for n, first, last in (10, 2, 9), (20, 6, 15), (30, 10, 21), (50, 18, 33), (100, 40, 61):
            self.assertEqual(error_rates.median_interval(range(1, n + 1), 0.05), (first, last))
        self.assertIsNone(error_rates.median_interval(range(5), 0.05))

    def test_verdicts(self):
        for interval, word in ((1.001, 1.5), "SLOWER"), ((0.9, 0.999), "FASTER"), ((0.99, 1.01), "SAME"), ((0.97, 1.01),
                                                                                                      "UNCLEAR"):
            self.assertEqual(error_rates.verdict(*interval, 0.02), word)

    def test_what_an_interval_allows(self):
        self.assertTrue(error_rates.allows(0.99, 1.01, 0.02))
        self.assertFalse(error_rates.allows(0.98, 1.02, 0.02))

    def test_counts_of_diff(self):
        pairs = [([row("SAME")], [row("SLOWER", 1.02, 1.01, 1.03)]), ([row("SLOWER")], [row("SLOWER")]),
                 ([row("UNCLEAR")], [row("UNCLEAR", 1.02, 0.9, 1.2)])]
        counts = error_rates.by_diff(pairs, 0.02)
        self.assertEqual(counts, {"comparisons": 3, "called different": 1, "series": 3, "series called different": 1,
                                  "found": 2, "allowed": 2, "found of allowed": 2, "unclear": 1})

    def test_counts_by_turns(self):
        equal = [([row("SAME", 1 + 0.001 * (i % 5 - 2))], [row("SLOWER")]) for i in range(40)]
        counts = error_rates.by_turns(equal, 24, 50, 0.02)
        self.assertEqual((counts["comparisons"], counts["found"], counts["allowed"]), (50, 50, 50))
        self.assertEqual((counts["called different"], counts["unclear"]), (0, 0))
        self.assertEqual(error_rates.by_turns(equal[:24], 24, 1000, 0.02)["comparisons"], 1)


if __name__ == "__main__":
    unittest.main()
