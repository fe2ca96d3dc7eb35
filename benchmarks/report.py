"""`isthmus bench report`: results/README.md and its plots, from the JSON files alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.benchmarks import quality
from isthmus.benchmarks.pieces import errors, label, newest
from isthmus.benchmarks.plots import plot_peers, plot_quality, plot_rates, plot_steps
from isthmus.benchmarks.quality import Qualities
from isthmus.benchmarks.record import Record, load_all
from isthmus.benchmarks.stacks import STACKS
from isthmus.benchmarks.statistics import median, number, percentiles
from isthmus.benchmarks.versus_serve import LATENCY_HEAD, engine_lines, latency_rows, start_line


@dataclass(frozen=True)
class ReportConfig:
    """Writes README.md and plots beside the results, from every JSON file there."""

    out: Path | None = None
    """Folder of the results; default ./benchmarks/results where there is one, else ./bench-results"""


def write_report(folder: Path) -> list[Path]:
    """Returns the files written. Raises ConfigError when there are no results or one can't be read."""
    records = load_all(folder)
    written: list[Path] = []
    sections = ["# Results", INTRODUCTION]
    qualities = quality.known(records)
    for kind, title in (
        ("step", "Steps"),
        ("serve", "Serving"),
        ("quality", "Quality of integers"),
        ("peers", "Beside other engines"),
        ("peer-servers", "Beside other servers"),
        ("train", "Training"),
        ("weights", "Loading weights"),
    ):
        chosen = [record for record in records if record.kind == kind]
        if chosen:
            sections.append(f"## {title}")
        for record in chosen:
            plot = _plot(record, folder)
            written += [plot] if plot else []
            sections += [
                f"### {record.subject}, {record.machine.platform}",
                _section(record, qualities),
                _machine(record),
            ]
            sections += [f"![{record.stem}]({plot.name})"] if plot else []
    readme = folder / "README.md"
    readme.write_text("\n\n".join(sections) + "\n")
    return [readme, *written]


INTRODUCTION = """Made by `isthmus bench report` from the JSON files in this folder, which hold more: every setting, and
the spread of every figure. `isthmus bench step`, `serve`, `quality`, `peers`, `peer-servers`, `train` and `weights`
write them."""


def _section(record: Record, qualities: Qualities) -> str:
    compared = _COMPARED.get(record.kind)
    return _SECTIONS[record.kind](record) if compared is None else compared(record, qualities)


def _plot(record: Record, folder: Path) -> Path | None:
    path = folder / f"{record.stem}.png"
    if record.kind == "step":
        plot_steps(record, path)
    elif record.kind == "serve" and record.figures["rates"]:
        plot_rates(record, path)
    elif record.kind in ("peers", "peer-servers"):
        plot_peers(record, path)
    elif record.kind == "quality":
        plot_quality(record, path)
    else:
        return None
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but its first column flush right."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows))


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _machine(record: Record) -> str:
    machine = record.machine
    limits = record.figures.get("limits")
    measured = (
        f"{limits['bandwidth'] / 1e9:.1f} GB/s, {limits['flops'] / 1e9:,.0f} GFLOP/s ({limits['source']}); "
        if limits
        else ""
    )
    return (
        f"{machine.device}, {machine.cores} cores; {measured}jax {machine.jax}, Python "
        f"{machine.python}; {machine.date}, commit {machine.commit or 'unknown'}, load before the run {machine.load:g}."
    )


def _steps(record: Record) -> str:
    figures = record.figures
    rows = [
        [
            f"{row['rows']} + {row['blocks']}x{row['block_size']}" if row["blocks"] else str(row["rows"]),
            str(row["tokens"]),
            number(row["seconds"] * 1e3),
            number(row["limit_seconds"] * 1e3),
            percent(row["limit_share"]),
            row["bound"],
            number(row["tokens_per_second"]),
        ]
        for row in figures["buckets"]
    ]
    head = ["rows + prompt", "tokens", "ms", "limit, ms", "of the limit", "bound by", "tok/s"]
    text = (
        f"{figures['parameters'] / 1e6:.1f}M parameters, {record.config['model']['dtype']}; rows decode at "
        f"{figures['depth']} positions. Limit: weights read once, KV cache read and written, FLOPs, at the machine's "
        f"bandwidth and peak.\n\n{table(head, rows)}"
    )
    return text + ("\n\n" + _overhead(figures["overhead"]) if figures["overhead"] else "")


def _overhead(over: dict[str, Any]) -> str:
    return (
        f"Engine with {over['sequences']} sequences decoding: {number(over['step_seconds'] * 1e3)} ms a step, "
        f"{number(over['bare_seconds'] * 1e3)} ms on the executor alone ({over['slowdown']:+.1%}). Host work is "
        f"{percent(over['host_share'])} of a step by the clock, {percent(over['cpu_share'])} by the engine thread's "
        f"processor time."
    )


def _serving(record: Record) -> str:
    figures = record.figures
    facts, lengths = figures["server"], record.config["lengths"]
    scale = lengths["scale"]
    prompt, output = lengths["prompt_mean"] * scale, lengths["output_mean"] * scale
    parts = [
        f"{facts['parameters'] / 1e6:.1f}M parameters, {facts['dtype']}, {facts['max_sequences']} sequences. Poisson "
        f"arrivals; prompts of {prompt:.0f} and completions of {output:.0f} tokens in the mean, lognormal, before the "
        f"context of {facts['context_length']} cuts them. p50 / p90 / p99."
    ]
    head = ["requests/s", "tok/s", "failed", "TTFT, ms", "ITL, ms", "TPOT, ms", "E2E, s"]
    rows = [
        [
            f"{row['rate']:g}",
            number(row["output_tokens_per_second"]),
            str(row["requests"] - row["completed"]),
            *(percentiles(row[name], 1e3) for name in ("ttft", "itl", "tpot")),
            percentiles(row["e2e"], 1),
        ]
        for row in figures["rates"]
    ]
    parts += [table(head, rows)] if rows else []
    if (compared := figures["compare"]) is not None:
        parts.append(
            f"{compared['requests']} requests at once: {number(compared['server_tokens_per_second'], 4)} tok/s through "
            f"the server, {number(compared['engine_tokens_per_second'], 4)} on the engine: gRPC and streaming "
            f"cost {percent(compared['overhead'])} (medians of {len(compared['server_rounds'])} turns each; the "
            f"client's {percent(compared['client_cpu_share'])} of a core included)."
        )
    return "\n\n".join(parts)


def _training(record: Record) -> str:
    figures = record.figures
    config, peer = record.config, figures["peer"]
    rows = [["Isthmus", figures["parameters"], figures["tokens_per_second"], figures["spread"]["ours"]]]
    if peer is not None:
        name = f"nanoGPT, torch {peer['torch']} eager"
        rows.append([name, peer["parameters"], peer["tokens_per_second"], figures["spread"]["peer"]])
    cells = [
        [name, f"{size / 1e6:.2f}M", number(rate), f"{number(spread['min'])} to {number(spread['max'])}"]
        for name, size, rate, spread in rows
    ]
    text = (
        f"{config['batch']} sequences of {config['model']['context_length']} tokens, {config['steps']} steps a turn, "
        f"{config['turns']} turns, {config['model']['dtype']}; MFU {percent(figures['mfu'])}.\n\n"
        f"{table(['', 'parameters', 'tok/s, median', 'spread'], cells)}"
    )
    return text + (f"\n\nRatio of medians: {peer['ratio']:.2f}." if peer is not None else "")


def _kept(record: Record) -> str:
    made = record.config.get("quantize", "none")
    return (
        record.figures["dtype"] if made == "none" else f"{record.figures['dtype']}, matrices in {made} made meanwhile"
    )


def _weights(record: Record) -> str:
    figures = record.figures
    rate = lambda key: number(figures["bytes"] / median(figures[key]) / 1e9)  # noqa: E731
    rows = [("reading the files", rate("read_seconds")), ("loading the model", rate("load_seconds"))]
    cache = "in" if figures["warm"] else "dropped from"
    return (
        f"{figures['bytes'] / 1e9:.2f} GB, {cache} the page cache, kept in {_kept(record)}; "
        f"host memory above the model's own: {figures['host_bytes_above_model'] / 1e9:.2f} GB (the largest file: "
        f"{figures['largest_file'] / 1e9:.2f} GB); {figures['share_of_reading']:.0%} of plain reading.\n\n"
        + table(("", "GB/s"), rows)
    )


def _quality(record: Record) -> str:
    figures = record.figures
    count = figures["windows"] * (figures["n_ctx"] - 1 - figures["n_ctx"] // 2)
    rows = figures["rows"]
    parts = [
        f"KL divergence from llama.cpp's float32 predictions, nats a token, over {count:,} tokens: the second halves "
        f"of {figures['windows']} windows of {figures['n_ctx']}; its standard error; the share of tokens with the same "
        "likeliest next one; perplexity beside float32's. Ours as served, activations in bfloat16, or in float32 "
        "(-f32). Bytes of weights as they are kept, nothing else of a file.",
        table(quality.HEAD, quality.cells(rows)),
    ]
    tensors = [f"- {row['name']}: {_counts(row['tensors'])}" for row in rows if row.get("tensors")]
    if tensors:
        parts += ["What llama.cpp's names mean for this model's sizes, tensors by type:", "\n".join(tensors)]
    return "\n\n".join(parts)


def _counts(tensors: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in tensors.items())


def _ratios(record: Record, qualities: Qualities) -> str:
    def lost(found: dict[str, float], row: dict[str, Any]) -> str:
        return " / ".join(number(found.get(row[side]), 2) for side in ("ours", "peer"))

    rows = [
        [
            label(row["cell"]),
            row["class"],
            number(row["rate"], 4),
            row["peer"],
            number(row["peer_rate"], 4),
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f} of {row['repeats']}",
            *(lost(found, row) for found in qualities.values()),
        ]
        for row in record.figures["compared"]
    ]
    head = ["tok/s", "weights", "Isthmus", "fastest peer", "its tok/s", "ratio", "repetitions'"]
    return table([*head, *(f"KL, {model}: ours / its" for model in qualities)], rows)


def _rates(pieces: Sequence[dict[str, Any]], qualities: Qualities) -> str:
    found = newest(pieces)
    names = [name for name in STACKS if any(name in rates for rates in found.values())]
    rows = [
        [
            name,
            *(number(median(rates[name]), 4) if name in rates else "" for rates in found.values()),
            *(number(lost.get(name), 2) for lost in qualities.values()),
        ]
        for name in names
    ]
    return table(["", *map(label, found), *(f"KL, {model}" for model in qualities)], rows)


def _run_facts(pieces: Sequence[dict[str, Any]]) -> str:
    """What ran, under which conditions, and what did not."""
    versions = {re.sub(r", [^ ]*\.gguf", "", facts["version"]) for p in pieces for facts in p["stacks"].values()}
    limits = [side for piece in pieces for side in piece["limits"]]
    bandwidth, flops = (
        " to ".join(f"{bound(side[key] for side in limits) / 1e9:,.0f}" for bound in (min, max))
        for key in ("bandwidth", "flops")
    )
    text = (
        f"Measured in runs with both sides in each ({len(pieces)}), while the machine gave {bandwidth} GB/s, and "
        f"{flops} GFLOP/s of a matrix product. {'; '.join(sorted(versions))}."
    )
    failed = [f"- {name}, {where}: `{message.splitlines()[0][:200]}`" for name, where, message in errors(pieces)]
    return text + ("\n\nDid not run:\n\n" + "\n".join(failed) if failed else "")


def _measured(qualities: Qualities) -> str:
    return " KL: what the same weights cost real models, above." if qualities else ""


def _peers(record: Record, qualities: Qualities) -> str:
    pieces = record.figures["pieces"]
    parts = [
        "Engine against engine: the same model and prompts, greedy, in turns. Medians; the ratio is to the fastest "
        "that stores weights in as many bits; float32 of vLLM and transformers counts with the 16 bits."
        + _measured(qualities),
        _ratios(record, qualities),
        _rates(pieces, qualities),
    ]
    shares = {cell: found for cell, found in newest(pieces, "shares").items() if found}
    if shares:
        rows = [[name, *(percent(found.get(name)) for found in shares.values())] for name in STACKS]
        rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
        parts += [
            "One sequence decoding: weights read, of the bandwidth. A prompt: FLOPs, of a matrix product's peak.",
            table(["", *map(label, shares)], rows),
        ]
    return "\n\n".join([*parts, _run_facts(pieces)])


def _peer_servers(record: Record, qualities: Qualities) -> str:
    pieces = record.figures["pieces"]
    parts = [
        "Server against server: the same requests of 16 to 256 tokens and completions of 16 to 96, streamed, greedy, "
        "without prefix caches; Poisson arrivals, or so many streams always in flight. Completed tokens a second."
        + _measured(qualities),
        _ratios(record, qualities),
        table(LATENCY_HEAD, latency_rows(pieces)),
        "\n".join(f"- {line}" for piece in pieces for line in (*engine_lines(piece), start_line(piece))),
        _run_facts(pieces),
    ]
    return "\n\n".join(part for part in parts if part)


_COMPARED = {"peers": _peers, "peer-servers": _peer_servers}
"""With what the compared stacks' integers cost"""

_SECTIONS: dict[str, Callable[[Record], str]] = {
    "step": _steps,
    "serve": _serving,
    "quality": _quality,
    "train": _training,
    "weights": _weights,
}
