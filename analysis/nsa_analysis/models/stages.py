"""Where a step's time goes, and what each branch reads."""

import pandas as pd

from ..data.series import latest, one_series
from ..data.tables import points_table, stage_medians, stages_table
from ..errors import AnalysisError

# What is stacked: the columns of the program's own table, the projections apart.
PARTS = {
    "attend_cmp": "cmp",
    "rank": "rank",
    "attend_sel": "sel",
    "attend_win": "win",
    "comm": "comm",
    "project": "project, output",
    "output": "project, output",
    "append": "other",
    "compress": "other",
    "combine": "other",
}
PART_ORDER = ("cmp", "rank", "sel", "win", "comm", "project, output", "other")


def branches(points):
    """DataFrame, a row a (point, stage) of mode `branches`: statistics of the slowest rank in s, share of the stages'
    sum, and `part`, the group it is drawn in. The stages can add up to more than `step`: timed apart they do not
    overlap."""
    points = [p for p in points if stage_medians(p)]
    if not points:
        raise AnalysisError('no point has stages of mode `branches`; run with run.modes = ["branches", "total"]')
    points, _ = latest(one_series(points, "chart of stages"))
    frame = stages_table(points, modes=("branches",))
    frame = frame[frame.stage != "step"].copy()
    frame["part"] = frame.stage.map(PARTS)
    return frame.reset_index(drop=True)


def reads(points):
    """DataFrame, a row a (point, branch): tokens read for one query, sequence and group at the last step, counted and
    expected; branch `all` has nsa-vibe's formula too."""
    table = points_table([p for p in points if p.reads])
    rows = []
    for _, row in table.iterrows():
        what = row[["file", "point", "kind", "context", "batch", "forced", "ranks", "layout", "validity"]].to_dict()
        for branch in ("cmp", "sel", "win"):
            rows.append(
                what
                | {
                    "branch": branch,
                    "counted": row[f"reads_{branch}_counted"],
                    "expected": row[f"reads_{branch}_expected"],
                }
            )
        rows.append(
            what
            | {
                "branch": "all",
                "counted": row["reads_counted"],
                "expected": row["reads_expected"],
                "nsa_vibe": row["reads_nsa_vibe"],
            }
        )
    return pd.DataFrame(rows)
