"""Attributes and datasets of an HDF5 group through h5py's low-level interface, which takes half the time of the other.

A sweep has thousands of points with seventy attributes and a dozen small datasets each.
"""

import functools
import math
import sys

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


@functools.lru_cache(maxsize=4096)
def name_of(name):
    """The text of a name; the same object for all points, which keeps them small in memory and between processes."""
    return sys.intern(name.decode())


def members_of(group):
    """Names of the members of a group."""
    names = set()
    group.id.links.iterate(lambda name: names.add(name_of(name)))
    return names


def attributes_of(item, shapes=None):
    """{name: Python value} of the attributes of a file, group or dataset, in the order of their names.

    `shapes` keeps the shapes of the attributes of one file from call to call: its points have the same ones, and an
    object of HDF5 for each shape takes longer than the value. So a list of one value and the value alone are not told
    apart under one name.
    """
    names = []
    h5a.iterate(item.id, names.append)
    shapes = {} if shapes is None else shapes
    return {name_of(name): read_attribute(item.id, name, shapes) for name in sorted(names) if name not in SCALES}


def read_attribute(owner, name, shapes):
    """Value of one attribute; `shapes` as in attributes_of."""
    attribute = h5a.open(owner, name)
    try:
        size = attribute.get_storage_size()
    except RuntimeError:  # 0 bytes, which h5py takes for an error: an attribute without a value
        return None
    shape = shapes.get((name, size, h5t.STRING))
    if shape is not None:
        try:  # HDF5 refuses to read as such text what is something else
            return read_value(attribute, shape, *NATIVE[h5t.STRING])
        except (OSError, TypeError, ValueError):
            pass
    stored = attribute.get_type()
    kind = stored.get_class()
    if (shape := shapes.get((name, size, kind))) is None:
        shape = attribute.shape
    if kind not in NATIVE or (kind == h5t.STRING and not stored.is_variable_str()):
        return read_value(attribute, attribute.shape, attribute.dtype, None)
    shapes[name, size, kind] = shape
    return read_value(attribute, shape, *NATIVE[kind])


def read_value(attribute, shape, dtype, memory):
    """Value of an attribute of this shape, through this type in memory."""
    value = np.empty(shape, dtype=dtype)
    attribute.read(value, memory)
    if shape != ():
        return to_python(value)
    value = value.item()
    return sys.intern(value.decode()) if type(value) is bytes else to_python(value)


def open_dataset(group, name):
    """The low-level dataset. Raises KeyError where there is none, ValueError where the name is of something else."""
    try:
        return h5d.open(group.id, name.encode())
    except (KeyError, OSError) as error:
        raise KeyError(f"'{name}' cannot be opened ({error})" if name in group else f"no '{name}'") from None


def load_numbers(group, name, size, dimensions):
    """A numeric dataset with that many dimensions. Raises ValueError if it is larger than `size`, that of its file."""
    dataset = open_dataset(group, name)
    kind, shape = dataset.dtype, dataset.shape
    if kind.kind not in "if":
        raise ValueError(f"'{name}' is not numeric")
    if len(shape) != dimensions:
        raise ValueError(f"'{name}' has {len(shape)} dimensions (expected {dimensions})")
    if math.prod(shape) * kind.itemsize > size:
        raise ValueError(f"'{name}' is larger than its file")
    values = np.empty(shape, dtype=kind)
    if values.size:
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def load_labels(group, name, size):
    """A list of strings. Raises ValueError if it is another kind of dataset, or larger than its file."""
    dataset = open_dataset(group, name)
    kind, shape = dataset.dtype, dataset.shape
    if h5py.check_string_dtype(kind) is None or len(shape) != 1:
        raise ValueError(f"'{name}' is not a list of labels")
    if shape[0] > size:
        raise ValueError(f"'{name}' is larger than its file")
    values = np.empty(shape, dtype=kind)
    if values.size:
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return list(map(name_of, values.tolist()))
