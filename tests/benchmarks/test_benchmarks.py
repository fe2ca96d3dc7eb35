"""The counting and the drawing of the benchmarks, and that each of them runs; no test looks at a clock."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro
from jax.sharding import Mesh
from rich.console import Console

from isthmus.benchmarks import models, roofline, serve, step, train
from isthmus.benchmarks.cases import CASES
from isthmus.benchmarks.figures import summarize
from isthmus.benchmarks.load import load_figures
from isthmus.benchmarks.machine import describe, name_of
from isthmus.benchmarks.models import preset, write_model
from isthmus.benchmarks.processes import BenchError, Child, module
from isthmus.benchmarks.record import Record, finite, load_all, results_folder
from isthmus.benchmarks.report import write_report
from isthmus.benchmarks.servers import serve_flags
from isthmus.benchmarks.step_times import build_plan, with_room
from isthmus.benchmarks.workload import Lengths, all_at_once, open_loop, poisson_arrivals
from isthmus.commands import bench as command
from isthmus.errors import ConfigError
from isthmus.model.config import PRESETS, ModelConfig
from isthmus.model.device.hardware import Limits
from isthmus.model.transformer import Params
from isthmus.serve.api.config import ServeConfig
from isthmus.serve.engine.build import open_model
from isthmus.serve.engine.config import Bucket, EngineConfig
from isthmus.serve.engine.plan import split_plan
from isthmus.serve.engine.sampling import Sampling
from isthmus.train.data import TrainingData
from tests.support import as_kept

QUIET = Console(quiet=True)
SMALL = ModelConfig(
    vocab_size=10, dim=4, layers=2, heads=2, kv_heads=1, head_dim=2, mlp_dim=3, context_length=64, tie_embeddings=False
)
TINY = dataclasses.replace(
    PRESETS["nano"], vocab_size=300, dim=16, heads=2, kv_heads=2, head_dim=8, mlp_dim=24, layers=1
)
ENGINE = EngineConfig(max_sequences=2, prefill_tokens=32, block_size=16, page_size=8)


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset of that name, and limits that take no time to measure."""
    for benchmark in (step, train):
        monkeypatch.setattr(benchmark, "measure_limits", lambda *_: Limits(1e11, 1e10, "measured"))
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    return "tiny"


# what a step costs


def test_cost_of_decoding_equals_a_count_by_hand() -> None:
    work = roofline.workload(Bucket(3, 0, 4), depth=5)
    least = roofline.cost(SMALL, work, "float32")
    # A layer: q 4x4, k and v 4x2 each, out 4x4, gate, up and down 4x3 each, two norms of 4. Then the norm and the head.
    layer = 16 + 8 + 8 + 16 + 3 * 12
    norms = 2 * 2 * 4 + 4
    assert least.weight_bytes == 4 * (2 * layer + norms + 40 + 3 * 4), "three rows of the untied embedding"
    assert least.kv_written_bytes == 3 * (2 * 2 * 1 * 2 * 4)
    assert least.kv_read_bytes == 5 * least.kv_written_bytes
    assert least.flops == 3 * 2 * (2 * layer + 40) + 3 * 5 * 2 * (2 * 2 * 2 * 2)


def test_cost_of_prompts_counts_the_head_once_a_prompt_and_the_keys_once_a_sequence() -> None:
    work = roofline.workload(Bucket(4, 3, 4), depth=8)
    assert work.prompts == (8, 4), "two blocks make a prompt of the depth, and one is left"
    assert work.rows == 2, "each prompt has a slot"
    assert (work.tokens, work.drawn, work.read) == (14, 4, 2 * 8 + 8 + 4)
    assert work.attended == 2 * 8 + 36 + 10
    headless = dataclasses.replace(SMALL, vocab_size=0)
    least = roofline.cost(SMALL, work, "float32")
    assert least.flops == headless.forward_flops(14, work.attended) + 4 * 2 * 10 * 4


def test_a_tied_embedding_is_read_once_and_bfloat16_halves_matrices_only() -> None:
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    assert roofline.weight_bytes(tied, 3, "float32") == 4 * tied.parameters
    assert roofline.weight_bytes(tied, 3, "bfloat16") == 2 * tied.parameters + 2 * (4 * 5)


def test_the_counted_weights_are_those_that_serving_holds(tiny: ModelConfig, tiny_params: Params, mesh: Mesh) -> None:
    held = as_kept(tiny, mesh, tiny_params, "bfloat16")
    rows_not_read = (tiny.vocab_size - 3) * tiny.dim * 2
    assert (
        roofline.weight_bytes(tiny, 3, "bfloat16") == sum(leaf.nbytes for leaf in jax.tree.leaves(held)) - rows_not_read
    )


def test_the_slower_limit_binds() -> None:
    least = roofline.Cost(weight_bytes=60, kv_read_bytes=30, kv_written_bytes=10, flops=1000)
    assert roofline.limit_seconds(least, Limits(flops=1000, bandwidth=50, source="measured")) == (2.0, "memory")
    assert roofline.limit_seconds(least, Limits(flops=100, bandwidth=50, source="measured")) == (10.0, "compute")


@pytest.mark.parametrize("bucket", [Bucket(2, 0, 16), Bucket(2, 1, 16), Bucket(2, 2, 16)])
def test_a_plan_does_its_workload_on_pages_of_its_own(bucket: Bucket) -> None:
    engine = with_room(ENGINE.resolve(TINY), depth=20)
    work = roofline.workload(bucket, 20)
    plan = build_plan(engine, bucket, work, Sampling(0.5))
    arrays = split_plan(plan.packed, bucket)
    assert (arrays.positions >= 0).sum() == work.tokens
    assert (arrays.positions[: work.rows] == 19).all()
    starts = arrays.positions[2:] == 0
    assert starts.sum() == len(work.prompts)
    busy = {int(slot) for slot in arrays.slots} - {engine.nobody}
    assert busy == {slot for slot, _ in plan.tables} == set(range(work.rows + len(work.prompts)))
    used = [set(table) - {0} for _, table in plan.tables]
    assert sum(map(len, used)) == len(set().union(*used)), "two sequences share a page"
    assert max(max(pages) for pages in used) < engine.pages
    assert (plan.draws["temperature"] == 0.5).all()


# what a server is asked


def test_arrivals_are_a_poisson_process_of_the_rate_and_the_same_from_a_seed() -> None:
    times = poisson_arrivals(np.random.default_rng(0), rate=5.0, seconds=1000.0)
    gaps = np.diff(times)
    assert abs(len(times) - 5000) < 4 * math.sqrt(5000)
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05, "exponential gaps deviate by as much as their mean"
    assert times == sorted(times) and times[-1] < 1000
    assert times == poisson_arrivals(np.random.default_rng(0), rate=5.0, seconds=1000.0)


def test_lengths_have_the_mean_asked_for_and_fit_the_context() -> None:
    lengths = Lengths(prompt_mean=160, output_mean=340, spread=0.7, scale=0.5)
    pairs = lengths.draw(np.random.default_rng(0), 20000, context=1 << 20)
    prompts, outputs = np.asarray(pairs).T
    assert abs(prompts.mean() / 80 - 1) < 0.03 and abs(outputs.mean() / 170 - 1) < 0.03
    short = Lengths(spread=2.0).draw(np.random.default_rng(1), 5000, context=64)
    assert all(1 <= p <= 32 and o >= 1 and p + o <= 64 for p, o in short)
    assert any(p + o == 64 for p, o in short), "nothing was cut"
    assert short == Lengths(spread=2.0).draw(np.random.default_rng(1), 5000, context=64)


def test_requests_repeat_from_a_seed_and_differ_between_rounds() -> None:
    sizes = (Lengths(scale=0.1), 100, 256)
    assert open_loop(3, 2.0, 30.0, *sizes) == open_loop(3, 2.0, 30.0, *sizes)
    assert open_loop(3, 2.0, 30.0, *sizes) != open_loop(4, 2.0, 30.0, *sizes)
    first, second = (all_at_once(3, round_, 8, *sizes) for round_ in (0, 1))
    assert len(first) == 8 and {r.at for r in first} == {0.0}
    assert not {tuple(r.prompt) for r in first} & {tuple(r.prompt) for r in second if len(r.prompt) > 4}
    assert all(0 <= token < 100 for request in first for token in request.prompt)


def test_percentiles_interpolate() -> None:
    summary = summarize([1.0, 2.0, 3.0, 4.0, 5.0])
    assert [summary[name] for name in ("p50", "p90", "p99")] == pytest.approx([3.0, 4.6, 4.96])
    assert [summary[name] for name in ("count", "min", "max", "mean")] == [5, 1.0, 5.0, 3.0]
    assert math.isnan(summarize([])["p50"]) and summarize([])["count"] == 0


def test_load_figures_count_failures_apart() -> None:
    good = {
        "due": 0.0,
        "lag": 0.0,
        "first": 0.5,
        "end": 2.0,
        "tokens": 4,
        "messages": 3,
        "gaps": [0.5, 1.0],
        "error": None,
    }
    bad = {**good, "tokens": 1, "gaps": [], "error": "RESOURCE_EXHAUSTED"}
    figures = load_figures({"outcomes": [good, bad, bad], "seconds": 2.0, "cpu_seconds": 0.5})
    assert figures["failures"] == {"RESOURCE_EXHAUSTED": 2} and figures["completed"] == 1
    assert (figures["output_tokens_per_second"], figures["requests_per_second"]) == (2.0, 0.5)
    assert figures["itl"]["p50"] == 0.75 and figures["tpot"]["p50"] == 0.5 and figures["ttft"]["count"] == 1


def test_the_server_is_started_with_every_setting_of_the_engine() -> None:
    engine = EngineConfig(max_sequences=3, prefix_cache=False, pages=77)
    config = tyro.cli(ServeConfig, args=serve_flags(Path("m"), "bfloat16", 2, "auto", engine))
    assert config.engine == engine and config.dtype == "bfloat16" and config.mesh_shape.tp == 2


# whole benchmarks, of a tiny model


def _shown(record: Record) -> str:
    """What the terminal shows after a run."""
    case = next(case for case in CASES if case.name == record.kind)
    return case.section(record, {}) + case.notes(record)


def _step_record(tiny_preset: str) -> Record:
    engine = dataclasses.replace(ENGINE, prefill_tokens=16, draft_rows=0, steps_per_launch=1)
    bench = step.StepBench(preset=tiny_preset, repeats=3, warmup=1, overhead_tokens=12, engine=engine)
    return step.run(bench, QUIET)


def _serve_record(record: Record) -> Record:
    summary = summarize([0.1, 0.2])
    rate = {
        "requests": 3,
        "completed": 2,
        "output_tokens_per_second": 10.0,
        "requests_per_second": 1.0,
        **dict.fromkeys(("ttft", "itl", "e2e"), summary),
        "tpot": summarize([]),
    }
    facts = {"name": "m", "parameters": 1e6, "dtype": "float32", "max_sequences": 2, "context_length": 64}
    figures = {
        "limits": None,
        "server": facts,
        "compare": None,
        "rates": [{"rate": 2.0, **rate}, {"rate": 1.0, **rate}],
    }
    return Record("serve", "m", record.machine, dataclasses.asdict(serve.ServeBench()), figures)


def test_step_measures_every_bucket_and_the_report_shows_it(tiny_preset: str, tmp_path: Path) -> None:
    record = _step_record(tiny_preset)
    buckets = record.figures["buckets"]
    assert [(b["rows"], b["blocks"]) for b in buckets] == [(1, 0), (2, 0), (2, 1)]
    assert all(b["seconds"] > 0 and b["limit_seconds"] > 0 and b["bound"] in ("memory", "compute") for b in buckets)
    assert all(b["limit_share"] == pytest.approx(b["limit_seconds"] / b["seconds"]) for b in buckets)
    drawn = {row["name"]: row for row in record.figures["samplings"]}
    assert len(drawn) > 4 and drawn["greedy"]["greedy_ratio"] == 1
    assert all(row["seconds"] > 0 and row["greedy_ratio"] > 0 for row in drawn.values())
    over = record.figures["overhead"]
    assert over["sequences"] == 2 and over["steps"] > 4
    assert record.figures["recompilations"] == 0
    path = record.save(tmp_path)
    assert path.name == "cpu-step-tiny.json" and json.loads(path.read_text())["config"]["preset"] == "tiny"
    _serve_record(record).save(tmp_path)
    assert all(_shown(saved) for saved in load_all(tmp_path))
    names = {written.name for written in write_report(tmp_path)}
    assert names == {"README.md", "cpu-step-tiny.png", "cpu-serve-m.png"}
    text = (tmp_path / "README.md").read_text()
    assert (
        "| 2 + 1x16 | 17 |" in text
        and "(1.00x), temperature 1 " in text
        and "cpu-serve-m.png" in text
        and "nan" not in text
    )


def test_train_runs_the_trainer_on_symbols(tiny_preset: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = train.write_symbols(tmp_path / "symbols", 9, limit=20000)
    assert set(np.unique(text.tokens)) == set(range(9)) and text.ends[-1] == len(text.tokens)
    batch = TrainingData(text, text, 8, 0).batch(0, 2, 1)
    assert batch.tokens.shape == (1, 2, 8)
    monkeypatch.setattr(train, "TEXT_BYTES", 20000)
    record = train.run(train.TrainBench(preset=tiny_preset, steps=2, turns=3, warmup=1, batch=2), QUIET)
    assert len(record.figures["turns"]["ours"]) == 3 and record.figures["peer"] is None
    assert "Loss" in _shown(record)
    record.save(tmp_path / "results")
    assert "| Isthmus |" in write_report(tmp_path / "results")[0].read_text()


@pytest.mark.slow
def test_serve_compares_and_sweeps(tmp_path: Path) -> None:
    write_model(tmp_path / "m", dataclasses.replace(TINY, vocab_size=400))
    lengths = Lengths(scale=0.05)
    bench = serve.ServeBench(
        model=tmp_path / "m", seconds=2.0, compare_rounds=1, compare_requests=6, lengths=lengths, engine=ENGINE
    )
    figures = serve.run(bench, QUIET).figures
    assert figures["compare"]["server_tokens_per_second"] > 0 and len(figures["rates"]) == len(serve.DEFAULT_LOADS)
    assert all(row["completed"] == row["requests"] and not row["failures"] for row in figures["rates"])
    assert all(row["server"]["completion_tokens"] == row["output_tokens"] for row in figures["rates"])
    assert all(row["server"]["recompilations"] == 0 for row in figures["rates"])


@pytest.mark.peers
def test_train_takes_turns_with_torch(tiny_preset: str) -> None:
    bench = train.TrainBench(preset=tiny_preset, steps=2, turns=3, warmup=1, batch=2, peer=True)
    peer = train.run(bench, QUIET).figures["peer"]
    assert peer["ratio"] > 0 and peer["torch"].startswith("2.13")


def test_a_written_model_opens_with_its_whole_vocabulary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "SAMPLE_BYTES", 200_000)
    write_model(tmp_path, dataclasses.replace(TINY, vocab_size=400))
    model = open_model(tmp_path)
    assert model.tokenizer.vocab_size == model.config.vocab_size == 400
    assert model.tokenizer.decode(model.tokenizer.encode("def f():")) == "def f():"


def test_a_failing_child_says_why(tmp_path: Path) -> None:
    with Child(module("isthmus.benchmarks.load"), tmp_path / "log") as child:
        with pytest.raises(BenchError, match="AttributeError"):
            child.ask("nothing")
        with pytest.raises(BenchError, match="TypeError"):
            child.ask("load")


def test_a_server_that_does_not_answer_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["serve", "--address", "127.0.0.1:1", "--out", str(tmp_path)]) == 1
    assert "127.0.0.1:1: UNAVAILABLE" in capsys.readouterr().out


# the command line and the files


def test_wrong_settings_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, field in (
        (["step", "--preset", "7m"], "preset"),
        (["step", "--repeats", "1"], "repeats"),
        (["step", "--vocab-size", "-1"], "vocab_size"),
        (["features"], "model: name a folder"),
        (["weights", "--repeats", "0"], "repeats"),
        (["quality", "--model", str(tmp_path)], "model:"),
        (["serve", "--address", "localhost"], "must be HOST:PORT"),
        (["serve", "--seconds", "0"], "seconds"),
        (["serve", "--lengths.scale", "0"], "lengths.scale"),
        (["serve", "--compare-requests", "1000"], "compare_requests"),
        (["train", "--peer", "--peer-python", str(tmp_path / "none")], "peer_python"),
        (["report", "--out", str(tmp_path)], "holds no results"),
    ):
        assert command.main(words) == 2
        assert field in capsys.readouterr().out


def test_presets_settle_their_vocabulary() -> None:
    assert preset("5m", 0).vocab_size == 32000 and preset("5m", 512).vocab_size == 512
    with pytest.raises(ConfigError, match="125m"):
        preset("none", 0)


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": 99}')
    with pytest.raises(ConfigError, match="another format"):
        load_all(tmp_path)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a benchmark's result"):
        load_all(tmp_path)
    assert finite({"a": [math.nan, 1.0], "b": (math.inf,)}) == {"a": [None, 1.0], "b": [None]}


def test_a_renamed_result_is_refused(tmp_path: Path) -> None:
    """The report names plots by the record: two files with one record's name would show the plot of one of them."""
    path = Record("train", "m", describe(), {}, {}).save(tmp_path)
    path.rename(tmp_path / "cpu-train-m-again.json")
    with pytest.raises(ConfigError, match=r"cpu-train-m-again\.json holds cpu-train-m: rename"):
        load_all(tmp_path)


def test_results_go_where_the_house_keeps_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert results_folder(None) == Path("bench-results")
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    assert results_folder(None) == Path("benchmarks/results")
    assert results_folder(tmp_path) == tmp_path
    assert describe().cores > 0


def test_machines_of_one_name_are_told_apart() -> None:
    """A cloud calls several processors alike: figures of one with AVX-512 must not be merged with another's."""
    lines = ["processor\t: 0\n", "model name\t: AMD EPYC\n", "flags\t\t: fpu avx avx2 avx512f\n"]
    assert name_of(lines) == "AMD EPYC (AVX-512)"
    assert name_of([*lines[:2], "flags\t\t: fpu avx avx2\n"]) == "AMD EPYC (AVX2)"
    assert "NEON" in name_of(["Features\t: fp asimd\n"])
    assert name_of(lines[:2]) == "AMD EPYC"
