"""`isthmus bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from isthmus.benchmarks import quality, report, serve, step, train, versus, versus_serve, weights
from isthmus.benchmarks.child import BenchError
from isthmus.benchmarks.record import Record, results_folder
from isthmus.errors import ConfigError
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.weights.checkpoint import CheckpointError

HELP = """Measures a step, a server or training against the hardware's limits; makes tables and plots of the results.

examples:
  isthmus bench step                                     every program of a 125m server against its roofline
  isthmus bench step --preset 5m --vocab-size 4096       the same, in a minute
  isthmus bench serve --preset 125m                      a server under load: throughput and latency by arrival rate
  isthmus bench serve --model runs/mine --rates 1 2 4    a model folder, at rates of one's own (requests a second)
  isthmus bench serve --address 127.0.0.1:50051          a server that runs already
  isthmus bench train --peer                             a training step, beside nanoGPT in torch (make peers)
  isthmus bench weights                                  loading a model, beside reading its files
  isthmus bench peers --model models/125m                beside llama.cpp, vLLM and transformers (benchmarks/peers)
  isthmus bench peers --cells decode1 --merge            a part of that, added to the result
  isthmus bench peer-servers --model models/125m         their servers and ours, under the same requests
  isthmus bench quality --model models/mine              what integers cost it, beside llama.cpp's, in KL divergence
  isthmus bench report                                   README.md and plots from all results

Each run writes PLATFORM-KIND-SUBJECT.json. A figure is worth what the machine was: leave it alone while it runs."""

Measurement = (
    step.StepBench
    | serve.ServeBench
    | train.TrainBench
    | weights.WeightsBench
    | versus.PeersBench
    | versus_serve.PeerServersBench
    | quality.QualityBench
)
Command = (
    Annotated[step.StepBench, tyro.conf.subcommand("step")]
    | Annotated[serve.ServeBench, tyro.conf.subcommand("serve")]
    | Annotated[train.TrainBench, tyro.conf.subcommand("train")]
    | Annotated[weights.WeightsBench, tyro.conf.subcommand("weights")]
    | Annotated[versus.PeersBench, tyro.conf.subcommand("peers")]
    | Annotated[versus_serve.PeerServersBench, tyro.conf.subcommand("peer-servers")]
    | Annotated[quality.QualityBench, tyro.conf.subcommand("quality")]
    | Annotated[report.ReportConfig, tyro.conf.subcommand("report")]
)


def _measure(command: Measurement, console: Console) -> None:
    """Runs, prints and saves one benchmark."""
    record: Record
    match command:
        case step.StepBench():
            record = step.run(command, console)
            step.show(record, console)
        case serve.ServeBench():
            record = serve.run(command, console)
            serve.show(record, console)
        case train.TrainBench():
            record = train.run(command, console)
            train.show(record, console)
        case weights.WeightsBench():
            record = weights.run(command, console)
            weights.show(record, console)
        case versus.PeersBench():
            record = versus.run(command, console)
            versus.show(record, console)
        case versus_serve.PeerServersBench():
            record = versus_serve.run(command, console)
            versus_serve.show(record, console)
        case quality.QualityBench():
            record = quality.run(command, console)
            quality.show(record, console)
    console.print(f"saved {record.save(results_folder(command.out))}", highlight=False)


def main(argv: Sequence[str]) -> int:
    """Returns the process's exit status."""
    console = Console(soft_wrap=True)
    command = tyro.cli(Command, args=list(argv), description=HELP, prog="isthmus bench")  # type: ignore[arg-type]
    try:
        if isinstance(command, report.ReportConfig):
            for path in report.write_report(results_folder(command.out)):
                console.print(f"wrote {path}", highlight=False)
            return 0
        if warning := enable_compilation_cache():
            console.print(warning, style="yellow", markup=False)
        _measure(command, console)
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
