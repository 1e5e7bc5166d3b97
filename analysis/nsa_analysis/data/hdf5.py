"""Attributes and datasets of an HDF5 group through h5py's low-level interface, which takes half the time of the other.

A sweep has thousands of points with seventy attributes and a dozen small datasets each.
"""

import h5py
import numpy as np
from h5py import h5a, h5d, h5t

TEXT = h5py.string_dtype()
NATIVE = {  # class of a stored type -> type in memory, for NumPy and for HDF5
    h5t.INTEGER: ("i8", h5t.NATIVE_INT64),
    h5t.FLOAT: ("f8", h5t.NATIVE_DOUBLE),
    h5t.STRING: (TEXT, h5t.py_create(TEXT)),
}
SCALES = (b"DIMENSION_LIST", b"REFERENCE_LIST")  # by which HDF5 ties dimensions to datasets


def to_python(value):
    """A value of HDF5 as a Python value: text as str, arrays as lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, tuple)):
        return [to_python(v) for v in value]
    return to_python(value.tolist()) if isinstance(value, (np.ndarray, np.generic)) else value


def attributes_of(item):
    """{name: Python value} of the attributes of a file, group or dataset, in the order of their names."""
    names = []
    h5a.iterate(item.id, names.append)
    return {name.decode(): read_attribute(item.id, name) for name in sorted(names) if name not in SCALES}


def read_attribute(owner, name):
    """Value of one attribute."""
    attribute = h5a.open(owner, name)
    stored, shape = attribute.get_type(), attribute.shape
    kind = stored.get_class()
    memory = NATIVE.get(kind) if kind != h5t.STRING or stored.is_variable_str() else None
    dtype, memory = memory or (attribute.dtype, None)
    value = np.empty(() if shape is None else shape, dtype=dtype)
    attribute.read(value, memory)
    return to_python(value)


def open_dataset(group, name):
    """The low-level dataset. Raises KeyError where there is none, ValueError where the name is of something else."""
    if name not in group:
        raise KeyError(f"no '{name}'")
    try:
        return h5d.open(group.id, name.encode())
    except (KeyError, OSError) as error:
        raise KeyError(f"'{name}' cannot be opened ({error})") from None


def load_numbers(group, name, size, dimensions):
    """A numeric dataset with that many dimensions. Raises ValueError if it is larger than `size`, that of its file."""
    dataset = open_dataset(group, name)
    kind = dataset.dtype
    if kind.kind not in "if":
        raise ValueError(f"'{name}' is not numeric")
    if dataset.rank != dimensions:
        raise ValueError(f"'{name}' has {dataset.rank} dimensions (expected {dimensions})")
    if np.prod(dataset.shape, dtype=float) * kind.itemsize > size:
        raise ValueError(f"'{name}' is larger than its file")
    values = np.empty(dataset.shape, dtype=kind)
    if values.size:
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def load_labels(group, name, size):
    """A list of strings. Raises ValueError if it is another kind of dataset, or larger than its file."""
    dataset = open_dataset(group, name)
    if h5py.check_string_dtype(dataset.dtype) is None or dataset.rank != 1:
        raise ValueError(f"'{name}' is not a list of labels")
    if dataset.shape[0] > size:
        raise ValueError(f"'{name}' is larger than its file")
    values = np.empty(dataset.shape, dtype=dataset.dtype)
    if values.size:
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return to_python(values)
