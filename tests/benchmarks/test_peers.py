"""The comparison with other engines: what is pure in it, and the report from a made-up record."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isthmus.benchmarks import versus
from isthmus.benchmarks.engine_child import _Steps
from isthmus.benchmarks.machine import describe
from isthmus.benchmarks.pieces import compare, errors, label, merged, newest, rotated, with_comparison
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.report import write_report
from isthmus.benchmarks.stacks import STACKS, Installed, chosen, load_question
from isthmus.benchmarks.versus import PeersBench, amount, cell_tokens, parse_cell, room
from isthmus.commands import bench as command
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.serve.engine.request import FinishReason, Output, Request, Sampling

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
    sequences, context = room(bench)
    assert sequences == 40 and context >= 701
    assert room(PeersBench(cells=("decode1",))) == room(PeersBench()), "a cell's speed depends on what else is asked"
    assert room(PeersBench(steps=3000))[1] > 3032


def test_a_turn_takes_about_as_long_as_asked() -> None:
    bench = PeersBench(seconds=3.0)
    assert amount(bench, "decode8", [0.1, 0.05, 5.0]) == 30
    assert (amount(bench, "decode8", [9.0]), amount(bench, "decode1", [1e-4])) == (8, 128)
    assert (amount(bench, "prefill512", [1.0]), amount(bench, "prefill512", [60.0])) == (3, 1)
    assert amount(dataclasses.replace(bench, steps=5), "decode8", [0.1]) == 5


def test_only_our_side_is_told_to_quantize() -> None:
    fields = {name: load_question(stack, Path("m"), 2, 3) for name, stack in STACKS.items()}
    assert {name: asked.get("quantize") for name, asked in fields.items() if "quantize" in asked} == {
        "isthmus-bf16": "none",
        "isthmus-int8": "int8",
        "isthmus-int4": "int4",
    }
    assert fields["llama-q4_0"]["dtype"] == "q4_0" and fields["vllm-f32"]["dtype"] == "float32"


def test_wrong_settings_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in (
        (["--stacks", "llama-q5"], "stacks"),
        (["--cells", "decode0"], "cells"),
        (["--repeats", "0"], "repeats"),
        (["--model", "nowhere"], "model"),
    ):
        assert command.main(["peers", *words]) == 2
        assert named in capsys.readouterr().out
    assert parse_cell("prefill512") == ("prefill", 512)
    with pytest.raises(ConfigError, match="twice"):
        chosen(("llama-bf16", "llama-bf16"))


def test_a_stack_that_is_not_installed_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    installed = Installed(tmp_path / "none", tmp_path / "none", tmp_path)
    run = versus._Run(PeersBench(installed=installed), versus.ModelConfig(vocab_size=100), QUIET, lambda: None)
    with versus.ExitStack() as children:
        run.load(STACKS["vllm-bf16"], children, tmp_path / "log")
    assert "make peers-vllm" in run.errors["vllm-bf16"]["load"]
    run.warm_up()
    run.repeat(0)
    assert not any(run.rates.values())


def test_decoding_is_timed_from_everybodys_first_token() -> None:
    requests = [Request(name, [1], Sampling(), 9) for name in "ab"]
    a, b = (Output(request, 5, None) for request in requests)
    steps = _Steps(requests, 2)
    for outputs in ([a], [a, b], [a, b]):
        steps.take(outputs)
        assert not steps.done.is_set()
    steps.take([a, b])
    steps.take([a, b])
    assert steps.done.is_set() and len(steps.times) == 3 and steps.error is None
    short = _Steps(requests, 5)
    for outputs in ([a, b], [a]):
        short.take(outputs)
    assert short.error is not None and short.done.is_set()
    failed = _Steps(requests, 5)
    failed.take([Output(Request("of the question before", [1], Sampling(), 9), None, FinishReason.CANCELLED)])
    assert failed.error is None
    failed.take([Output(requests[0], None, FinishReason.ERROR)])
    assert failed.error == "a request failed"


def test_shares_are_of_what_the_machine_gave_at_the_time() -> None:
    """A host that gives half its speed for a while must not make a stack look twice or half as good."""
    rates = {"decode1": {"isthmus-bf16": [80.0, 40.0, 90.0], "llama-bf16": [50.0]}, "decode8": {"llama-bf16": [1.0]}}
    limits = [{"bandwidth": 10.0 * x, "flops": 1.0} for x in (100, 50, 50, 100)]
    found = versus.shares(_piece(rates, limits=limits), ModelConfig())
    assert found == {"decode1": {"isthmus-bf16": pytest.approx(0.8), "llama-bf16": pytest.approx(0.5)}}


def test_the_report_shows_ratios_rates_and_failures(tmp_path: Path) -> None:
    rates = {"isthmus-bf16": [20.0, 22.0], "llama-bf16": [10.0, 11.0], "vllm-f32": [6.0, 6.0]}
    shares = {"decode1": {"isthmus-bf16": 0.81, "llama-bf16": 0.5}}
    piece = _piece({"decode1": rates}, errors={"vllm-bf16": {"load": "no compiler\nsecond line"}}, shares=shares)
    record = _record([piece])
    record.save(tmp_path)
    versus.show(record, QUIET)
    assert {path.name for path in write_report(tmp_path)} == {"README.md", "cpu-peers-m.png"}
    text = (tmp_path / "README.md").read_text()
    assert "| decode, 1 sequence | 16 bits | 21 | llama-bf16 | 10.5 | 2.00 | 2.00 to 2.00 of 2 |" in text
    assert "vllm-bf16, load: `no compiler`" in text and "81.0%" in text and "nan" not in text
    assert label("prefill512") == "prompt of 512 tokens" and label("closed32") == "32 streams"
