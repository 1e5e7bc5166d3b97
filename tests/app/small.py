"""The smallest input that the tests run. Its copy bandwidth is that of a cache: to measure that of memory takes longer
than the rest of such a run."""

SMALL = """[task]
kind = "decode"
[model]
dim = 32
d_k = 16
d_v = 16
precision = "fp32"
[run]
backend = "host"
context = 64
steps = 3
warmup = 1
copy_bytes = 1048576
"""
