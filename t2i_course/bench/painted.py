"""`t2i bench painted`: quality against training time of the demo's recipe."""

from pathlib import Path

from t2i_course.core.files import write_json
from t2i_course.run.arms import put
from t2i_course.run.rows import measured_rows


def painted(
    stamp: dict,  # chapter, command, date, hardware, versions, seeds
    path: Path,  # results file
    seconds=(60, 180),  # training times
    seeds=(0, 1),  # of the runs
):
    "Rows of flow matching on painted digits, for each training time"
    for s in seconds:
        put(
            stamp, f"after_{s:g}s", measured_rows("flow_matching", "painted", seeds, s, Path("runs") / "rows")
        )
        write_json(path, stamp)
    print(f"wrote {path}")
