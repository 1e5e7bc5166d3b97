"""Whether two result files hold the same run but for its times: what --resume promises. Needs h5py and numpy."""

import h5py
import numpy as np

# Times, and what follows from when and where a run was made.
ROOT_ATTRIBUTES = {"run_uuid", "start", "end", "argv", "resumed"}
POINT_ATTRIBUTES = {"copy_bandwidth", "noisy"}
DATASETS = {"time", "process_peak", "clock_mhz_before", "clock_mhz_after"}
NOISE = {"seconds", "steal", "sm_clock", "cv", "outlier_share", "voluntary_switches", "involuntary_switches",
         "minor_faults", "major_faults", "throttle_reasons", "throttled_passes"}


def attributes(item, but):
    found = {name: value for name, value in item.attrs.items() if name not in but}
    for bookkeeping in ("REFERENCE_LIST", "DIMENSION_LIST"):  # pointers of HDF5 inside the file
        found.pop(bookkeeping, None)
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}


def differences(a, b):
    """One line for each thing in which the files differ; the order of groups, attributes and dimensions counts."""
    found = []
    with h5py.File(a) as left, h5py.File(b) as right:
        items = []
        for file in (left, right):
            names = {"/": file}
            file.visititems(names.__setitem__)
            items.append(names)
        if list(items[0]) != list(items[1]):
            found.append(f"items: {sorted(set(items[0]) ^ set(items[1])) or 'in another order'}")
        for name in items[0].keys() & items[1].keys():
            one, other = items[0][name], items[1][name]
            but = ROOT_ATTRIBUTES if name == "/" else POINT_ATTRIBUTES
            if (first := attributes(one, but)) != (second := attributes(other, but)):
                found += [f"{name}.{key}: {first.get(key)!r}, {second.get(key)!r}"
                          for key in first.keys() | second.keys() if first.get(key) != second.get(key)]
            if not isinstance(one, h5py.Dataset):
                continue
            if (one.dtype, one.shape) != (other.dtype, other.shape):
                found.append(f"{name}: {one.dtype}{one.shape}, {other.dtype}{other.shape}")
            elif [d.label for d in one.dims] != [d.label for d in other.dims]:
                found.append(f"{name}: other dimensions")
            elif name.rsplit("/")[-1] not in DATASETS | NOISE and not np.array_equal(one[()], other[()]):
                found.append(f"{name}: other values")
            elif name.endswith("/time") and not np.array_equal(np.isnan(one[()]), np.isnan(other[()])):
                found.append(f"{name}: other stages are timed")
    return sorted(found)
