"""`isthmus bench report`: results/README.md and its plots, from the JSON files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isthmus.benchmarks.case import Bench, Case
from isthmus.benchmarks.cases import CASES
from isthmus.benchmarks.quality import known
from isthmus.benchmarks.record import Record, load_all

INTRODUCTION = """Made by `isthmus bench report` from the JSON files in this folder, which hold more: every setting, and
the spread of every figure. `isthmus bench step`, `serve`, `features`, `quality`, `peers`, `peer-servers`, `train` and
`weights` write them."""


@dataclass(frozen=True)
class ReportConfig(Bench):
    """Writes README.md and plots into the folder of the results, from every JSON file there."""


def write_report(folder: Path) -> list[Path]:
    """Returns the files written. Raises ConfigError when there are no results or one can't be read."""
    records = load_all(folder)
    qualities = known(records)
    written = [folder / "README.md"]
    sections = ["# Results", INTRODUCTION]
    for case in CASES:
        chosen = [record for record in records if record.kind == case.name]
        sections += [f"## {case.title}"] if chosen else []
        for record in chosen:
            sections += [f"### {record.subject}, {record.machine.platform}", case.section(record, qualities)]
            if (plot := _save_plot(case, record, folder)) is not None:
                written.append(plot)
                sections.append(f"![{record.stem}]({plot.name})")
    written[0].write_text("\n\n".join(sections) + "\n")
    return written


def _save_plot(case: Case, record: Record, folder: Path) -> Path | None:
    from matplotlib import pyplot

    figure = None if case.plot is None else case.plot(record)
    if figure is None:
        return None
    path = folder / f"{record.stem}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
