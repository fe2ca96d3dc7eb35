"""`isthmus bench`: a subcommand for each case in benchmarks/cases.py, and one for the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tyro
from rich.console import Console
from rich.markdown import Markdown

from isthmus.benchmarks.case import Bench, Case
from isthmus.benchmarks.cases import CASES
from isthmus.benchmarks.processes import BenchError
from isthmus.benchmarks.record import results_folder
from isthmus.benchmarks.report import ReportConfig, write_report
from isthmus.errors import ConfigError
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.weights.checkpoint import CheckpointError

HELP = """Measures a step, a server or training against the hardware's limits; makes tables and plots of the results.

examples:
  isthmus bench step                                     every program of a 125m server against its roofline
  isthmus bench step --preset 5m --vocab-size 4096       the same, in a minute
  isthmus bench serve --preset 125m                      a server under load: throughput and latency by arrival rate
  isthmus bench serve --model runs/mine --rates 1 2 4    a model folder, at the rates named (requests per second)
  isthmus bench serve --address 127.0.0.1:50051          a server that is already running
  isthmus bench features --model models/smollm2          what guesses, the prefix cache, options and forms cost or save
  isthmus bench train --peer                             a training step, beside nanoGPT in torch (make peers)
  isthmus bench weights                                  loading a model, beside just reading its files
  isthmus bench peers --model models/125m                beside llama.cpp, vLLM and transformers (benchmarks/peers)
  isthmus bench peers --cells decode1 --merge            some of those cells, added to the saved result
  isthmus bench peer-servers --model models/125m         those peers' servers and ours, under the same requests
  isthmus bench quality --model models/mine              what quantizing it costs, beside llama.cpp's, in KL divergence
  isthmus bench report                                   README.md and plots from all results

Each run writes PLATFORM-KIND-SUBJECT.json. Leave the machine alone while a benchmark runs."""

NAMED: dict[str, Callable[..., Bench]] = {**{case.name: case.bench for case in CASES}, "report": ReportConfig}


def _measure(case: Case, bench: Bench, console: Console) -> None:
    """Checks, runs, prints and saves one benchmark. Raises ConfigError and BenchError."""
    bench.validate()
    if warning := enable_compilation_cache():
        console.print(warning, style="yellow", markup=False)
    record = case.run(bench, console)
    for text in (case.section(record, {}), case.notes(record)):
        console.print(Markdown(text), soft_wrap=False)
    console.print(f"saved {record.save(results_folder(bench.out))}", highlight=False)


def main(argv: Sequence[str]) -> int:
    """Returns the process's exit status."""
    console = Console(soft_wrap=True)
    bench = tyro.extras.subcommand_cli_from_dict(NAMED, prog="isthmus bench", description=HELP, args=argv)
    try:
        if isinstance(bench, ReportConfig):
            for path in write_report(results_folder(bench.out)):
                console.print(f"wrote {path}", highlight=False)
            return 0
        _measure(next(case for case in CASES if isinstance(bench, case.bench)), bench, console)
    except (ConfigError, CheckpointError) as error:
        console.print(f"isthmus bench: {error}", style="red", markup=False)
        return 2
    except (BenchError, OSError) as error:
        console.print(f"isthmus bench: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    return 0
