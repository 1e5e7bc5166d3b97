#!/usr/bin/env python3
"""A workload of a FlashInfer-Trace data set as an input file of nsa (docs/SCHEMA.md, "Tensors").

Reads definitions/ and workloads/ of the data set (flashinfer-ai/flashinfer-bench, docs/flashinfer-trace) and takes
operations of the kinds gqa_paged and gqa_ragged. One sequence of the workload becomes a run: of one query a decode
step, of several a prefill, onto a prefix (run.prefix) where positions before them have none. Lengths come from the
indptr tensors. q, K and V come from their safetensors; where one of them is "random", no file is written, and the
printed settings run on synthetic values. What the file does not have (gates; queries of positions that are not run) is
1/3 and 0.
Needs numpy and h5py.

usage: import_trace.py DATASET WORKLOADS.jsonl [--uuid UUID] [--sequence I] [--output FILE.h5]
e.g.   examples/import_trace.py flashinfer-trace workloads/gqa_paged/gqa_paged_decode_h32_kv8_d128_ps1.jsonl \
           --output q.h5
"""

import argparse
import json
import pathlib
import struct
import sys

import numpy as np
from captured import print_settings, write_input

TYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "BF16": "u2"}


class TraceError(Exception):
    """What is wrong with the data set, and what to do."""


def read_safetensors(path, key):
    """One tensor of a safetensors file; bf16 as float32. Format: 8 bytes of header length, JSON, data."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        if key not in header:
            names = ", ".join(sorted(set(header) - {"__metadata__"}))
            raise TraceError(f"{path} has no tensor {key}; it holds {names}")
        kind, (begin, end) = header[key]["dtype"], header[key]["data_offsets"]
        if kind not in TYPES:
            raise TraceError(f"{path}: {key} is of type {kind}; this tool reads {', '.join(TYPES)}")
        file.seek(8 + length + begin)
        values = np.frombuffer(file.read(end - begin), TYPES[kind]).reshape(header[key]["shape"])
    return (values.astype("u4") << 16).view("f4") if kind == "BF16" else values


class Workload:
    """A line of a file of workloads, with the constants of its definition."""

    def __init__(self, root, line):
        self.root, self.name, self.inputs = root, line["definition"], line["workload"]["inputs"]
        self.uuid = line["workload"]["uuid"]
        found = [path for path in sorted((root / "definitions").rglob("*.json"))
                 if json.loads(path.read_text()).get("name") == self.name]
        if not found:
            raise TraceError(f"{root}/definitions has no definition {self.name}; give the root of the data set")
        definition = json.loads(found[0].read_text())
        self.kind = definition["op_type"]
        self.axes = {axis: spec["value"] for axis, spec in definition["axes"].items() if spec["type"] == "const"}
        self.axes |= line["workload"]["axes"]
        if self.kind not in ("gqa_paged", "gqa_ragged"):
            raise TraceError(f"{self.name} is of kind {self.kind}; this tool takes gqa_paged and gqa_ragged")

    def tensor(self, name):
        """None where the input is random, or is none of the workload's."""
        spec = self.inputs.get(name, {"type": "random"})
        if spec["type"] != "safetensors":
            return None
        path = pathlib.Path(spec["path"])
        return read_safetensors(path if path.is_absolute() else self.root / path, spec["tensor_key"])

    def lengths(self, name):
        """An indptr tensor, which decides lengths and so cannot be random."""
        values = self.tensor(name)
        if values is None:
            raise TraceError(f"{self.name}, {self.uuid}: {name} is not stored, so that lengths are not known; "
                             "give a workload that stores it")
        return values.astype("i8")

    def rows_of_kv(self, sequence):
        """The rows of K and V of a sequence, in the caches flattened to rows: their indices."""
        indptr = self.lengths("kv_indptr")
        first, last = indptr[sequence:sequence + 2]
        if self.kind == "gqa_ragged":
            return np.arange(first, last)
        page = self.axes["page_size"]
        rows = (self.lengths("kv_indices")[first:last, None] * page + np.arange(page)).ravel()
        of_last_page = self.tensor("kv_last_page_len")
        if of_last_page is None and page > 1:
            raise TraceError(f"{self.name}, {self.uuid}: kv_last_page_len is not stored, and a page has {page} rows")
        return rows if of_last_page is None else rows[:len(rows) - page + int(of_last_page[sequence])]

    def rows_of_q(self, sequence):
        if "qo_indptr" not in self.inputs:  # decode: a row a sequence
            return np.array([sequence])
        return np.arange(*self.lengths("qo_indptr")[sequence:sequence + 2])

    def sequences(self):
        return len(self.lengths("kv_indptr")) - 1

    def queries_keys_values(self, sequence):
        """(q, k, v) of the sequence, or None where one of them is random. q is scaled for softmax(q k / sqrt(d))."""
        names = ("q", "k", "v") if self.kind == "gqa_ragged" else ("q", "k_cache", "v_cache")
        q, k, v = (self.tensor(name) for name in names)
        if q is None or k is None or v is None:
            return None
        rows = self.rows_of_kv(sequence)
        k, v = (x.reshape(-1, *x.shape[-2:])[rows].astype("f4") for x in (k, v))
        scale = self.inputs.get("sm_scale", {}).get("value")
        q = q[self.rows_of_q(sequence)].astype("f4")
        return q if scale is None else q * np.float32(scale * q.shape[-1] ** 0.5), k, v


def read_workload(root, path, uuid):
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    chosen = [line for line in lines if uuid in (None, line["workload"]["uuid"])]
    if not chosen:
        raise TraceError(f"{path} has no workload {uuid}; it has {len(lines)}, the first {lines[0]['workload']['uuid']}"
                         if lines else f"{path} is empty")
    return Workload(root, chosen[0])


def run(args):
    root = args.dataset
    workload = read_workload(root, args.workloads if args.workloads.exists() else root / args.workloads, args.uuid)
    if not 0 <= args.sequence < workload.sequences():
        raise TraceError(f"--sequence {args.sequence}: the workload has sequences 0 to {workload.sequences() - 1}")
    queries, positions = len(workload.rows_of_q(args.sequence)), len(workload.rows_of_kv(args.sequence))
    if not 0 < queries <= positions:
        raise TraceError(f"sequence {args.sequence} has {queries} queries and {positions} keys; "
                         "choose another --sequence")
    source = f"{workload.name}, workload {workload.uuid}, sequence {args.sequence}"
    values = workload.queries_keys_values(args.sequence)
    if values is None:
        heads, groups, d = (workload.axes[axis] for axis in ("num_qo_heads", "num_kv_heads", "head_dim"))
        return print_settings(source, (positions, heads, d), (groups, d), queries, None)
    if not args.output:
        raise TraceError("the workload has tensors; name the file to write with --output")
    q, k, v = values
    whole = np.zeros((positions, *q.shape[1:]), "f4")
    whole[positions - queries:] = q
    write_input(args.output, whole, k, v, source, queries)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=pathlib.Path, help="the root of the data set")
    parser.add_argument("workloads", type=pathlib.Path, help="a file of workloads, of it or of anywhere")
    parser.add_argument("--uuid", help="of the workload (default: the first)")
    parser.add_argument("--sequence", type=int, default=0, help="of the workload (default 0)")
    parser.add_argument("--output", help="the input file to write")
    try:
        run(parser.parse_args())
    except (TraceError, OSError, KeyError, ValueError) as error:
        sys.exit(f"import_trace.py: {error}")


if __name__ == "__main__":
    main()
