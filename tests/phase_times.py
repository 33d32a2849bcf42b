"""What the phases of the embedded policy took on this machine, for the plans of people who have run nothing
yet (`valor run --dry-run`). By hand, after runs: of each kind of phase, in the runs folder and in
figures/phase_times.csv, the one that was disturbed least by other work (the fastest) is written there.

python tests/phase_times.py"""

import json

import pandas as pd

from valor.config import cpu_model, figures_dir
from valor.runs.plan import KIND, past_phases

KEYS = ["phase", "kind"]  # what must be equal for one phase to tell how long another takes


def measured_here() -> pd.DataFrame:
    "A row for each finished phase of the runs folder whose policy is the embedded one."
    rows = []
    for past in past_phases():
        *kind, device, processes = past.kind
        if past.gpu or device != cpu_model() or kind[KIND.index("base")] != "embedded":
            continue
        said = dict(threads=kind[KIND.index("threads")], seconds=round(past.seconds, 1), cpu=device)
        size = dict(memory=round(past.memory), disk=past.disk, work=past.work)
        rows.append(dict(phase=past.phase) | said | size | dict(kind=json.dumps([*kind, "", processes])))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    place = figures_dir() / "phase_times.csv"
    place.parent.mkdir(parents=True, exist_ok=True)
    tables = [measured_here()] + ([pd.read_csv(place)] if place.exists() else [])
    rows = pd.concat(tables, ignore_index=True)
    fastest = (rows.seconds / rows.work).sort_values(kind="stable").index
    rows = rows.loc[fastest].drop_duplicates(KEYS).sort_values(KEYS, kind="stable")
    rows.to_csv(place, index=False)
    print(rows.drop(columns="kind").to_string(index=False))
