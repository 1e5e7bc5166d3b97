"""Scaling, balance, bandwidth, traffic, the cost model and the gate, computed from points."""
