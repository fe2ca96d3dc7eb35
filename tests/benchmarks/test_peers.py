"""The comparison with other engines: what is pure in it, and the report from a made-up record."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from isthmus.benchmarks import comparison, peer_engines, protocol
from isthmus.benchmarks.comparison import (
    Idle,
    Turns,
    compare,
    errors,
    label,
    merged,
    newest,
    rotated,
    spinning,
    with_comparison,
)
from isthmus.benchmarks.engine import Driver, SeenStep, times_of
from isthmus.benchmarks.machine import describe
from isthmus.benchmarks.peer_engines import Drawing, EngineSide, PeersBench, amount, cell_tokens, parse_cell, room
from isthmus.benchmarks.processes import BenchError
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.report import write_report
from isthmus.benchmarks.stacks import STACKS, Installed, Sizes, chosen
from isthmus.benchmarks.workload import PlannedRequest
from isthmus.commands import bench as command
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.serve.engine.engine import Sink, StepTimes
from isthmus.serve.engine.messages import End, Ending, Event, Request
from isthmus.serve.engine.sampling import Sampling

QUIET = Console(quiet=True)


def _piece(rates: dict[str, dict[str, list[float]]], **fields: Any) -> dict[str, Any]:
    names = {name for by_stack in rates.values() for name in by_stack}
    facts = {"version": "v1", "seconds": 1.0, "threads": 2, "weight_bytes": 10, "waiting_share": 0.0}
    return {
        "date": "today",
        "commit": "abc",
        "load": 0.0,
        "limits": [{"bandwidth": 1e10, "flops": 1e11}] * 2,
        "stacks": {name: facts for name in names},
        "errors": {},
        "rates": rates,
        "shares": {},
        **fields,
    }


def _record(pieces: list[dict[str, Any]], kind: str = "peers") -> Record:
    return Record(kind, "m", describe(), {}, with_comparison(pieces))


def test_everybody_takes_every_place_and_nobody_always_follows_the_same_other() -> None:
    names = ["a", "b", "c"]
    turns = [rotated(names, turn) for turn in range(6)]
    assert all(sorted(turn) == names for turn in turns)
    assert all({turn[place] for turn in turns} == set(names) for place in range(3))
    after_a = {turn[turn.index("a") + 1] for turn in turns if turn[-1] != "a"}
    assert after_a == {"b", "c"}
    assert rotated(["a"], 5) == ["a"]


def test_the_ratio_is_of_medians_to_the_fastest_of_the_same_class() -> None:
    rates = {
        "isthmus-bf16": [10.0, 30.0, 20.0],
        "llama-bf16": [10.0, 10.0, 10.0],
        "llama-f16": [9.0, 9.0, 9.0],
        "vllm-bf16": [5.0, 5.0, 5.0],
        "vllm-f32": [16.0, 15.0, 17.0],
        "llama-q8_0": [40.0, 40.0, 40.0],
    }
    (row,) = compare([_piece({"decode1": rates})])
    assert (row["class"], row["peer"], row["rate"], row["peer_rate"]) == ("16 bits", "vllm-f32", 20.0, 16.0)
    assert row["ratio"] == 1.25 and (row["low"], row["high"]) == (10 / 16, 2.0)
    assert {pair["peer"] for pair in row["pairs"]} == {"llama-bf16", "llama-f16", "vllm-bf16", "vllm-f32"}


def test_quantized_weights_meet_those_of_as_many_bits() -> None:
    rates = {"isthmus-int8": [2.0], "isthmus-int4": [3.0], "llama-q8_0": [1.0], "llama-q4_0": [6.0]}
    rows = compare([_piece({"decode1": rates})])
    assert [(row["ours"], row["peer"], row["ratio"]) for row in rows] == [
        ("isthmus-int8", "llama-q8_0", 2.0),
        ("isthmus-int4", "llama-q4_0", 0.5),
    ]


def test_no_ratio_crosses_two_runs_and_the_newest_that_has_both_counts() -> None:
    both = _piece({"decode1": {"isthmus-bf16": [10.0], "llama-bf16": [5.0]}})
    alone = _piece({"decode1": {"isthmus-bf16": [100.0]}, "decode8": {"isthmus-bf16": [1.0]}})
    other = _piece({"decode1": {"isthmus-bf16": [20.0], "vllm-bf16": [16.0]}})
    (row,) = compare([both, alone, other])
    assert (row["peer"], row["ratio"]) == ("vllm-bf16", 1.25)
    assert {pair["peer"]: pair["ratio"] for pair in row["pairs"]} == {"llama-bf16": 2.0, "vllm-bf16": 1.25}
    again = _piece({"decode1": {"isthmus-bf16": [30.0], "llama-bf16": [30.0]}})
    assert compare([both, alone, other, again])[0]["ratio"] == 1.0
    assert newest([both, alone])["decode1"] == {"isthmus-bf16": [100.0], "llama-bf16": [5.0]}


def test_merging_adds_a_piece_and_refuses_another_machine(tmp_path: Path) -> None:
    first = _record([_piece({"decode1": {"isthmus-bf16": [10.0], "llama-bf16": [5.0]}})])
    second = _record([_piece({"decode8": {"isthmus-bf16": [9.0], "llama-bf16": [3.0]}})])
    assert merged(first, tmp_path) == first, "nothing to merge with yet"
    first.save(tmp_path)
    figures = merged(second, tmp_path).figures
    assert len(figures["pieces"]) == 2
    assert [(row["cell"], row["ratio"]) for row in figures["compared"]] == [("decode1", 2.0), ("decode8", 3.0)]
    elsewhere = dataclasses.replace(second, machine=dataclasses.replace(second.machine, cores=999))
    with pytest.raises(ConfigError, match="another machine: cores"):
        merged(elsewhere, tmp_path)


def test_an_error_is_told_until_a_later_piece_does_without() -> None:
    failed = _piece({"decode1": {"isthmus-bf16": [1.0]}}, errors={"vllm-bf16": {"load": "no", "decode8": "out"}})
    assert errors([failed]) == [("vllm-bf16", "load", "no"), ("vllm-bf16", "decode8", "out")]
    assert errors([failed, _piece({"decode8": {"vllm-bf16": [1.0]}})]) == []
    assert errors([failed, _piece({"decode1": {"vllm-bf16": [1.0]}})]) == [("vllm-bf16", "decode8", "out")]


def test_prompts_are_the_same_for_everybody_and_fit_what_is_loaded() -> None:
    bench = PeersBench(cells=("prefill700", "decode40"))
    assert cell_tokens(bench, "decode40", 100) == cell_tokens(bench, "decode40", 100)
    assert cell_tokens(bench, "decode40", 100) != cell_tokens(dataclasses.replace(bench, seed=1), "decode40", 100)
    assert {len(prompt) for prompt in cell_tokens(bench, "decode40", 100)} == {32}
    assert all(10 <= token < 100 for prompt in cell_tokens(bench, "prefill700", 100) for token in prompt)
    assert room(bench).sequences == 40 and room(bench).context >= 701
    assert room(PeersBench(cells=("decode1",))) == room(PeersBench()), "a cell's speed depends on what else is asked"
    assert room(PeersBench(steps=3000)).context > 3032


def test_a_turn_takes_about_as_long_as_asked() -> None:
    bench = PeersBench(seconds=3.0)
    assert amount(bench, "decode8", [0.1, 0.05, 5.0]) == 30
    assert (amount(bench, "decode8", [9.0]), amount(bench, "decode1", [1e-4])) == (8, 128)
    assert (amount(bench, "prefill512", [1.0]), amount(bench, "prefill512", [60.0])) == (3, 1)
    assert amount(dataclasses.replace(bench, steps=5), "decode8", [0.1]) == 5


def test_only_our_side_is_told_to_quantize() -> None:
    fields = {name: PeersBench().start(stack, ModelConfig(), Sizes(2, 3)).load for name, stack in STACKS.items()}
    assert {name: asked.get("quantize") for name, asked in fields.items() if "quantize" in asked} == {
        "isthmus-bf16": "none",
        "isthmus-int8": "int8",
        "isthmus-int4": "int4",
    }
    assert fields["llama-q4_0"]["dtype"] == "q4_0" and fields["vllm-f32"]["dtype"] == "float32"


class _Asked:
    """A process that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def ask(self, do: str, **fields: Any) -> dict[str, float]:
        self.asked.append({"do": do, **fields})
        return {"seconds": 1.0}


def test_sampled_cells_give_every_engine_the_same_options() -> None:
    """A peer that draws by its own defaults, or by none, would be compared with work that it doesn't do."""
    drawing = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1}
    side = EngineSide.__new__(EngineSide)
    side._child, side._sampling, side.idle = _Asked(), Drawing(**drawing), Idle(lambda: 0.0)  # type: ignore[assignment, arg-type]
    for cell in ("prefill8", "decode2", "sampled2"):
        side.run(cell, [[1], [2]], 1)
    assert [one.get("sampling") for one in side._child.asked] == [None, None, drawing]  # type: ignore[attr-defined]
    assert protocol.transformers_options(drawing) == {"do_sample": True, **drawing}
    assert protocol.vllm_options(drawing) == drawing
    assert (
        protocol.transformers_options(None) == {"do_sample": False} and protocol.vllm_options(None)["temperature"] == 0
    )
    asked = Sampling(**drawing)  # type: ignore[arg-type]
    assert {name: getattr(asked, name) for name in drawing} == drawing
    assert cell_tokens(PeersBench(), "sampled8", 99) == cell_tokens(PeersBench(), "decode8", 99)


def test_wrong_settings_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in (
        (["--stacks", "llama-q5"], "stacks"),
        (["--cells", "decode0"], "cells"),
        (["--repeats", "0"], "repeats"),
        (["--sampling.top-p", "0"], "top_p"),
        (["--model", "nowhere"], "model"),
    ):
        assert command.main(["peers", *words]) == 2
        assert named in capsys.readouterr().out
    assert parse_cell("prefill512") == ("prefill", 512) and parse_cell("sampled8") == ("sampled", 8)
    with pytest.raises(ConfigError, match="twice"):
        chosen(("llama-bf16", "llama-bf16"))


def test_a_stack_that_is_not_installed_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    bench = PeersBench(installed=Installed(tmp_path / "none", tmp_path / "none", tmp_path))
    start = bench.start(STACKS["vllm-bf16"], ModelConfig(vocab_size=100), room(bench))
    turns = Turns(bench.cells, QUIET, lambda: None)
    with ExitStack() as children:
        turns.start(start.stack, lambda: EngineSide(start, children, tmp_path / "log", Drawing()))
    assert "make peers-vllm" in turns.errors["vllm-bf16"]["load"]
    turns.repeat(1, lambda *_: 1.0)
    with pytest.raises(BenchError, match="every stack failed"):
        turns.figures(describe(), [])


class _Side:
    """One that is ready, and fails in the cells that it is told."""

    facts: ClassVar[dict[str, Any]] = {"version": "v", "seconds": 1.0}
    idle = Idle(lambda: 0.0)

    def __init__(self, *failing: str) -> None:
        self.failing = failing


def test_a_stack_that_fails_in_a_cell_is_left_out_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others measured isn't lost, nor what it measured elsewhere; it isn't asked again what it failed at."""
    monkeypatch.setattr(comparison, "PAUSE_SECONDS", 0.0)
    turns, asked = Turns(("decode1", "decode8"), QUIET, lambda: None), []
    turns.start(STACKS["llama-bf16"], lambda: _Side("decode8"))
    turns.start(STACKS["isthmus-bf16"], _Side)

    def measure(cell: str, turn: int, name: str, side: _Side) -> float:
        asked.append((cell, turn, name))
        if cell in side.failing:
            raise BenchError("out of memory")
        return 10.0 + turn

    turns.repeat(2, measure)
    run = turns.figures(describe(), [])
    assert run["errors"] == {"llama-bf16": {"decode8": "out of memory"}}
    both = {"isthmus-bf16": [10.0, 11.0], "llama-bf16": [10.0, 11.0]}
    assert run["rates"] == {"decode1": both, "decode8": {"isthmus-bf16": [10.0, 11.0]}}
    assert asked.count(("decode8", 1, "llama-bf16")) == 0 and len(asked) == 7


class _Engine:
    """Gives the outputs that it is told, a list a step, to the sink, on a thread as the real one does."""

    alive, in_flight, error = True, 0, None

    def __init__(self, sink: Sink) -> None:
        self._sink, self.times, self.submitted = sink, StepTimes(), []
        self.steps: list[list[tuple[int, Ending | None]]] = []

    def submit(self, request: Request) -> None:
        self.submitted.append(request)

    def start(self) -> None:
        self._sink([Event(Request("of the question before", [1], Sampling(), 9), end=End(Ending.CANCELLED))])
        for step in self.steps:
            self._sink(
                [
                    Event(self.submitted[at], () if end else (5,), end=None if end is None else End(end))
                    for at, end in step
                ]
            )

    def cancel(self, request: Request) -> None:
        pass


def _driver(steps: list[list[tuple[int, Ending | None]]]) -> Driver:
    driver = Driver(_Engine)  # type: ignore[arg-type]
    driver.engine.steps = steps  # type: ignore[attr-defined]
    return driver


def test_decoding_is_timed_from_everybodys_first_token() -> None:
    """A question hears how the requests of the one before ended, which must not fail it."""
    a, b = (0, None), (1, None)
    assert len(_driver([[a], [a, b], [a, b], [a, b], [a, b]]).steps([[1], [1]], 2, 9)) == 3
    assert len(_driver([[a], [a, b]]).steps([[1], [1]], 0, 1)) == 1
    with pytest.raises(RuntimeError, match="less than a token of each of 2"):
        _driver([[a, b], [a]]).steps([[1], [1]], 5, 9)
    with pytest.raises(RuntimeError, match="a request failed"):
        _driver([[a, (1, Ending.ERROR)]]).steps([[1], [1]], 5, 9)


def test_steps_of_one_launch_are_at_equal_distances() -> None:
    """Tokens that come together took as long as if they had come one by one."""
    seen = [
        SeenStep(at, 0.0, StepTimes(), drawn, begun, 0)
        for at, drawn, begun in ((0.5, 1, 1), (1.0, 2, 2), (4.0, 6, 2), (6.0, 4, 2), (7.0, 1, 2), (9.0, 2, 2))
    ]
    assert times_of(seen, 2) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_a_closed_loop_of_the_engine_submits_the_next_when_one_ends() -> None:
    done = Ending.LENGTH
    driver = _driver([[(0, None)], [(0, done), (1, None)], [(1, done)], [(2, None)], [(2, done)]])
    planned = [PlannedRequest(0.0, [1], 2, 0)] * 3
    assert driver.closed_loop(planned, 2, 0.0)["tokens"] == 3
    assert len(driver.engine.submitted) == 3  # type: ignore[attr-defined]


def test_shares_are_of_what_the_machine_gave_at_the_time() -> None:
    """A host that gives half its speed for a while must not make a stack look twice or half as good."""
    rates = {"decode1": {"isthmus-bf16": [80.0, 40.0, 90.0], "llama-bf16": [50.0]}, "decode8": {"llama-bf16": [1.0]}}
    limits = [{"bandwidth": 10.0 * x, "flops": 1.0} for x in (100, 50, 50, 100)]
    found = peer_engines.shares(_piece(rates, limits=limits), ModelConfig())
    assert found == {"decode1": {"isthmus-bf16": pytest.approx(0.8), "llama-bf16": pytest.approx(0.5)}}


def test_the_report_shows_ratios_rates_and_failures(tmp_path: Path) -> None:
    rates = {"isthmus-bf16": [20.0, 22.0], "llama-bf16": [10.0, 11.0], "vllm-f32": [6.0, 6.0]}
    shares = {"decode1": {"isthmus-bf16": 0.81, "llama-bf16": 0.5}}
    piece = _piece({"decode1": rates}, errors={"vllm-bf16": {"load": "no compiler\nsecond line"}}, shares=shares)
    record = _record([piece])
    record.save(tmp_path)
    assert "10.0 GB/s" in peer_engines.notes(record)
    assert {path.name for path in write_report(tmp_path)} == {"README.md", "cpu-peers-m.png"}
    text = (tmp_path / "README.md").read_text()
    assert "| decode, 1 sequence | 16 bits | 21 | llama-bf16 | 10.5 | 2.00 | 2.00 to 2.00 of 2 |" in text
    assert "vllm-bf16, load: `no compiler`" in text and "81.0%" in text and "nan" not in text
    assert label("prefill512") == "prompt of 512 tokens" and label("closed32") == "32 streams"


def test_a_stack_that_spins_while_it_waits_is_named() -> None:
    """It takes a core from the others, whose figures then mean less."""
    piece = _piece({"decode1": {"vllm-bf16": [1.0], "llama-bf16": [1.0]}})
    piece["stacks"]["vllm-bf16"] = {**piece["stacks"]["vllm-bf16"], "waiting_share": 0.9}
    assert spinning(_record([piece])) == "- vllm-bf16 took 90% of a core while it waited: it disturbed the others"
