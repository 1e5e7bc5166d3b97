"""Prints measured points and writes them as a file of peers."""

import statistics

SHAPE = ("rows", "heads", "head_size", "blocks", "spans")


def medians(point):
    """The shape, and the median of each implementation in us."""
    times = {
        name: statistics.median(seconds[point["warmup"]:]) * 1e6
        for name, seconds in zip(point["implementations"], point["seconds"])
    }
    return {**{key: point["parameters"][f"kernels.{key}"] for key in SHAPE}, "us": times}


def run(points, program, input_toml, output):
    """Prints each of the points as it comes; with `output` writes them all, and needs h5py from the start."""
    if output:
        from . import result_file, selection

        start = result_file.now()
    measured = []
    for point in points:
        row = medians(point)
        print("selection " + " ".join(f"{row[key]:>5}" for key in SHAPE) + ": " +
              ", ".join(f"{name} {us:.1f} us" for name, us in row["us"].items()), flush=True)
        measured.append(point)
    if output:
        run = result_file.run_attributes(program, input_toml, "cuda", start)
        result_file.write(output, run, result_file.system_columns(**selection.system()), measured)
        print(f"{output}: {len(measured)} shapes of {program}")
