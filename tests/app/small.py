"""The smallest input that the tests run."""

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
"""
