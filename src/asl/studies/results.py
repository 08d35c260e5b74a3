"""What a study leaves behind: every figure, a table and a picture."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from asl.atomic import write_result
from asl.errors import DataError
from asl.evaluation.pictures import arms_picture, grid_picture
from asl.studies.plan import Study
from asl.studies.tables import cells_table, rows, table

PAGES = Path("docs", "studies")
START, END = "<!-- table: written by study.py -->", "<!-- end -->"


def publish(study: Study, trials: Sequence[Mapping[str, Any]], output: str | Path) -> str:
    """Write NAME.json, NAME.md and NAME.png into `output`, and return the table.

    A page docs/studies/NAME.md of this folder gets the table too, between its two marks.

    Raises `DataError` where there is nothing yet, and `UsageError` where it cannot be written.
    """
    if not trials:
        raise DataError(f"study {study.name} has no figures yet: run it without --tables")
    found = rows(study.plan, trials)
    seconds = sum(trial["seconds"] for trial in trials)
    of = f"{len(trials)} of {len([*study.plan.trials()])} trainings"
    of += f", {seconds / 60:,.0f} minutes" * bool(seconds)
    tables = [table(study.plan, found)]
    if study.plan.cells:
        tables.append(cells_table(study.plan, trials))
    text = "\n\n".join([*tables, of]) + "\n"
    path = Path(output, study.name)
    about = json.dumps({"study": study.name, "question": study.plan.question})
    lines = ",\n".join(json.dumps(trial) for trial in trials)  # one of each training
    record = f'{about[:-1]}, "trials": [\n{lines}\n]}}\n'
    write_result(path.with_suffix(".json"), record.encode())
    write_result(path.with_suffix(".md"), text.encode())
    page = PAGES / f"{study.name}.md"
    if page.exists():
        before, _, rest = page.read_text().partition(START)
        after = rest.partition(END)[2]
        write_result(page, f"{before}{START}\n{text}{END}{after}".encode())
    panels: dict[str, dict[str, Sequence[float]]] = {}
    for row in found:
        title = ", ".join(filter(None, [row.condition, row.view]))
        panels.setdefault(title, {})[row.arm] = row.figures
    draw = partial(grid_picture, grid=study.plan.grid) if study.plan.grid else arms_picture
    draw(panels, path=path.with_suffix(".png"))
    return text
