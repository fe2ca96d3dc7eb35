"""What integers cost a model: llama.cpp's file of predictions, our own beside them, and the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.benchmarks import quality
from isthmus.benchmarks.comparison import with_comparison
from isthmus.benchmarks.llama_perplexity import BaseLogits, divergence, parse
from isthmus.benchmarks.machine import describe
from isthmus.benchmarks.processes import BenchError
from isthmus.benchmarks.quality import Ours, QualityBench, known, measure, ours
from isthmus.benchmarks.record import Record, load_all
from isthmus.benchmarks.report import write_report
from isthmus.checks.crowd import Arrival, play
from isthmus.commands import bench as command
from isthmus.errors import ConfigError
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.weights.folder import open_folder
from isthmus.quality import corpus
from isthmus.quality.costs import KNOWN, Cost
from isthmus.quality.divergence import Divergence, Gathered, kl_divergence
from isthmus.serve.engine.build import build_executor, open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.sampling import Sampling
from tests.serve.api.harness import save_model, train_tokenizer, varied_params
from tests.support import forward


def write_base(path: Path, tokens: np.ndarray, logits: Callable[[int], np.ndarray]) -> Path:
    """As llama-perplexity's log_softmax writes it. logits(window): float32[n_ctx, vocab], of which the second half but
    the last goes in."""
    windows, n_ctx = tokens.shape
    parts = []
    for window in range(windows):
        for row in logits(window)[n_ctx // 2 : n_ctx - 1].astype(np.float32):
            most, least = row.max(), max(row.min(), row.max() - 16)
            log_sum = np.float32(np.log(np.exp(row - most, dtype=np.float64).sum()))
            scale = (most - least) / np.float32(65535)
            q = np.where(row > least, np.rint((row - least) / scale), 0).astype("<u2")
            head = np.array([scale, least - most - log_sum], "<f4")
            parts.append(head.tobytes() + q.tobytes() + bytes(2 * (row.size % 2)))
    header = b"_logits_" + np.array([n_ctx, row.size, windows], "<i4").tobytes()
    path.write_bytes(header + tokens.astype("<i4").tobytes() + b"".join(parts))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("quality") / "mine", train_tokenizer(), varied_params())


def random_tokens(windows: int, n_ctx: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, vocab, (windows, n_ctx), dtype=np.int32)


def base_of(folder: Path, path: Path, tokens: np.ndarray, seen: np.ndarray | None = None) -> Path:
    """What the folder's model predicts by the training side's forward pass, in float32, having `seen` other tokens."""
    opened = open_folder(folder)
    params = opened.load_params(build_mesh(MeshShape()))
    logits = forward(opened.config, params, tokens if seen is None else seen)
    return write_base(path, tokens, lambda window: logits[window])


@pytest.mark.parametrize("vocab", [7, 8])
def test_the_file_is_read_as_it_was_written(vocab: int, tmp_path: Path) -> None:
    """An odd vocabulary is padded; a row's own scale and least are what its integers mean; the last token of a window
    predicts nothing that is in it."""
    tokens = random_tokens(3, 10, vocab)
    logits = np.random.default_rng(1).normal(0, 3, (3, 10, vocab)).astype(np.float32)
    logits[1, 6, 0] = -60.0
    base = BaseLogits.open(write_base(tmp_path / "base", tokens, lambda window: logits[window]))
    assert (base.n_ctx, base.vocab, base.windows, base.predicted) == (10, vocab, 3, 4)
    assert np.array_equal(base.tokens, tokens)
    for window, got in enumerate(base):
        rows = logits[window, 5:9].astype(np.float64)
        want = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        near = want > want.max(axis=1, keepdims=True) - 16
        assert got.shape == (4, vocab) and np.abs(got - want)[near].max() < 3e-4
        assert np.all(got[~near] < got.max() - 15.9)
    assert window == 2


def test_what_is_no_whole_file_is_refused(tmp_path: Path) -> None:
    """A run of llama-perplexity that was stopped leaves a file that begins well."""
    tokens = random_tokens(2, 8, 5)
    whole = write_base(tmp_path / "base", tokens, lambda _: np.zeros((8, 5), np.float32) + np.arange(5)).read_bytes()
    other = "is not a file that llama-perplexity"
    for content, said in ((whole[:-2], "not written to its end"), (whole[:12], other), (b"GGUF" * 9, other)):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            BaseLogits.open(tmp_path / "other")
    with pytest.raises(ConfigError, match="can't be read"):
        BaseLogits.open(tmp_path / "none")


def test_divergence_is_what_the_definition_says() -> None:
    """By hand: half and half against a quarter and three; what the original gives less than e^-16 counts for nothing,
    however unlikely it is to the other."""
    want = np.log(np.array([[0.5, 0.5, 1e-8]], np.float32))
    got = np.log(np.array([[0.25, 0.75, 1e-30]], np.float32))
    by_hand = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(want, got) == pytest.approx([by_hand], rel=1e-5)
    assert kl_divergence(want, want) == pytest.approx([0])
    gathered = Gathered()
    gathered.add(want[:, :2], got[:, :2] + 9, np.array([1]))
    gathered.add(np.log(np.array([[0.5, 0.25]], np.float32)), np.log(np.array([[0.9, 0.1]], np.float32)), np.array([0]))
    found = gathered.quality()
    second = 0.5 * math.log(0.5 / 0.9) + 0.25 * math.log(0.25 / 0.1)
    assert found.kl == pytest.approx((by_hand + second) / 2, rel=1e-5)
    assert found.kl_error == pytest.approx(abs(by_hand - second) / 2, rel=1e-4), "of the mean of two"
    assert found.kl_window_error == pytest.approx(found.kl_error)
    assert (found.tokens, found.windows, found.top1) == (2, 2, 0.5)
    assert found.perplexity == pytest.approx((0.75 * 0.9) ** -0.5) and found.base_perplexity == pytest.approx(2)
    assert found.ratio == pytest.approx(found.perplexity / 2)
    grown = math.log(0.5 / 0.75), math.log(0.5 / 0.9)
    assert found.ratio_window_error == pytest.approx(abs(grown[0] - grown[1]) / 2, rel=1e-5)


def test_a_model_is_next_to_itself_and_integers_are_further(folder: Path, tmp_path: Path) -> None:
    """The served step against the training side's forward pass: blocks, pages and kernels change nothing, and what is
    left is the file's rounding. Fewer bits cost more, of weights or of keys and values."""
    tokens = random_tokens(2, 70, open_folder(folder).config.vocab_size)
    tokens[:, 0] = 9  # not what our tokenizer puts before a text
    base = base_of(folder, tmp_path / "base", tokens)
    ticks: list[int] = []
    exact = measure(folder, "none", "float32", "model", base, lambda: ticks.append(1))
    assert len(ticks) == 2 and exact.tokens == 2 * 34
    assert abs(exact.kl) < 1e-5 and exact.top1 == 1 and exact.ratio == pytest.approx(1, abs=1e-4)
    int8 = measure(folder, "int8", "float32", "model", base)
    int4 = measure(folder, ".*mlp.*=int4:32,.*=int8", "float32", "model", base)
    cached = measure(folder, "none", "float32", "int8", base)
    assert 1e-5 < int8.kl < int4.kl and 1e-5 < cached.kl < int4.kl
    assert int4.bytes < int8.bytes < exact.bytes / 3 and cached.bytes == exact.bytes


def test_a_window_begins_as_llama_cpp_begins_it(folder: Path, tmp_path: Path) -> None:
    """llama.cpp puts what a text begins with in the place of each window's first token, and writes the text's own into
    the file: without that every window but the first would be predicted from another text."""
    opened = open_folder(folder)
    (begin,) = opened.tokenizer.encode("")
    tokens = random_tokens(3, 40, opened.config.vocab_size)
    tokens[0, 0] = begin
    seen = tokens.copy()
    seen[:, 0] = begin
    assert abs(measure(folder, "none", "float32", "model", base_of(folder, tmp_path / "a", tokens, seen)).kl) < 1e-5
    assert measure(folder, "none", "float32", "model", base_of(folder, tmp_path / "b", tokens)).kl > 1e-3


def test_what_is_measured_is_what_an_engine_says(folder: Path, tmp_path: Path) -> None:
    """Greedily, an engine with the same integers and cache says the likeliest token at each place that was measured."""
    quantize, dtype, cache_dtype = "int4", "bfloat16", "int8"
    config = EngineConfig(
        1, context_length=64, prefill_tokens=32, draft_rows=0, steps_per_launch=1, cache_dtype=cache_dtype
    )
    executor = build_executor(open_model(folder, dtype, quantize=quantize), config, MeshShape())
    arrival = Arrival(Request("one", [9, 8, 7], Sampling(temperature=0), 45))
    play(executor, [arrival])
    tokens = np.array([arrival.tokens], np.int32)
    assert tokens.size == 48
    certain = lambda _: np.where(np.eye(executor.model.vocab_size)[np.roll(tokens[0], -1)] > 0, 16.0, 0.0)  # noqa: E731
    found = measure(folder, quantize, dtype, cache_dtype, write_base(tmp_path / "base", tokens, certain))
    assert found.tokens == 23 and found.top1 == 1


def test_a_file_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "base", random_tokens(1, 8, 5), lambda _: np.arange(40.0).reshape(8, 5))
    with pytest.raises(ConfigError, match="a vocabulary of 5"):
        measure(folder, "none", "float32", "model", other)
    with pytest.raises(ConfigError, match="quantize"):
        measure(folder, "int7", "float32", "model", other)


OUTPUT = """\
====== Perplexity statistics ======
Mean PPL(Q)                   :  13.621713 ±   0.482922
Mean PPL(base)                :  13.544387 ±   0.479601
Mean PPL(Q)/PPL(base)         :   1.005709 ±   0.000860

====== KL divergence statistics ======
Mean    KLD:   0.004033 ±   0.000052
Maximum KLD:   0.140871

====== Token probability statistics ======
Same top p: 96.389 ± 0.239 %
"""


def test_llama_perplexitys_figures_are_read() -> None:
    found = parse(OUTPUT, 6120)
    assert found == Divergence(6120, 0.004033, 0.000052, pytest.approx(0.96389), 13.621713, 13.544387)
    assert found.ratio == pytest.approx(1.005709, rel=1e-5)
    with pytest.raises(BenchError, match="nothing of 'Mean    KLD'"):
        parse("failed reading log-probs for chunk 4", 6120)


def test_a_program_that_is_not_there_or_fails_is_named(tmp_path: Path) -> None:
    base = BaseLogits(tmp_path / "base", 8, 5, 1)
    with pytest.raises(BenchError, match="make peers-llama"):
        divergence(tmp_path, tmp_path / "m.gguf", base, 1)
    program = tmp_path / "bin" / "llama-perplexity"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'no such model' >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(BenchError, match="no such model"):
        divergence(tmp_path, tmp_path / "m.gguf", base, 1)


def test_figures_that_get_lost_at_its_end_are_asked_for_again(tmp_path: Path) -> None:
    """Now and then they do, on a busy machine: a run over many types would have been for nothing."""
    program, told = tmp_path / "bin" / "llama-perplexity", tmp_path / "told"
    program.parent.mkdir()
    (tmp_path / "whole").write_text(OUTPUT)
    program.write_text(f"#!/bin/sh\ncd {tmp_path}\n[ -e told ] && cat whole || echo ' 23  568.8605'\ntouch told\n")
    program.chmod(0o755)
    base = BaseLogits(tmp_path / "base", 8, 5, 1)
    assert divergence(tmp_path, tmp_path / "m.gguf", base, 1) == parse(OUTPUT, base.windows * base.predicted)
    assert told.exists()


def test_the_corpus_is_two_texts_that_share_no_paragraph() -> None:
    """Scales that were chosen on what is measured would look better than they are."""
    calibration, evaluation = corpus.text("calibration", 60_000), corpus.text("evaluation", 60_000)
    assert min(len(calibration), len(evaluation)) >= 60_000
    assert not set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))
    assert corpus.text("evaluation", 60_000) == evaluation
    assert evaluation.startswith(corpus.text("evaluation", 5_000).rstrip("\n")), "the same text, only longer"


def test_our_rows_have_the_names_of_the_stacks_that_are_timed() -> None:
    """The other tables look the figures up by these."""
    bench = QualityBench(kinds=("none", "int8"), folders=("int4 calibrated=some/folder",))
    assert [each.name for each in ours(bench)] == [
        "isthmus-bf16",
        "isthmus-f32",
        "isthmus-int8",
        "isthmus-int8-f32",
        "isthmus-int4 calibrated",
        "isthmus-int4 calibrated-f32",
    ]
    assert ours(bench)[4] == Ours("int4 calibrated", "bfloat16", Path("some/folder"), "none")


def test_wrong_settings_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(folder)]
    for words, named, status in (
        ([*model, "--windows", "0"], "windows", 2),
        ([*model, "--folders", "nameless"], "NAME=FOLDER", 2),
        (["--model", "nowhere"], "model", 2),
        ([*model, "--gguf", str(tmp_path)], "make_gguf.py", 1),
    ):
        assert command.main(["quality", *words]) == status
        assert named in capsys.readouterr().out.replace("\n", "")


def row(name: str, kl: float, size: int, **more: Any) -> dict[str, Any]:
    found = Divergence(100, kl, kl / 10, 0.9, 11.0, 10.0)
    return {**found.__dict__, "ratio": found.ratio, "name": name, "bytes": size, **more}


def record(rows: list[dict[str, Any]], sha256: str = "s") -> Record:
    figures = {"python": "3", "windows": 2, "n_ctx": 8, "text": "corpus", "sha256": sha256, "rows": rows}
    return Record("quality", "real", describe(), {}, figures)


def test_the_report_shows_what_integers_cost_and_so_do_the_timings(tmp_path: Path) -> None:
    rows = [row("llama-q8_0", 0.004, 143_000_000, tensors={"Q8_0": 211}), row("isthmus-int8", 0.0421, 140_500_000)]
    record(rows).save(tmp_path)
    rates = {"decode1": {"isthmus-int8": [20.0], "llama-q8_0": [10.0], "vllm-bf16": [5.0]}}
    facts = {"version": "v1", "seconds": 1.0, "threads": 2, "weight_bytes": 10, "waiting_share": 0.0}
    piece = {
        "date": "today", "commit": "abc", "load": 0.0, "limits": [{"bandwidth": 1e10, "flops": 1e11}] * 2,
        "stacks": {name: facts for name in rates["decode1"]}, "errors": {}, "rates": rates, "shares": {},
    }  # fmt: skip
    timed = Record("peers", "m", describe(), {}, with_comparison([piece]))
    timed.save(tmp_path)
    assert {path.name for path in write_report(tmp_path)} == {"README.md", "cpu-peers-m.png", "cpu-quality-real.png"}
    text = (tmp_path / "README.md").read_text()
    assert "| isthmus-int8 | 140.5 | 0.0421 | 0.0042 | 90.0% | +10.00% |" in text
    assert "- llama-q8_0: 211 Q8_0" in text
    assert "| 2.00 | 2.00 to 2.00 of 1 | 0.042 / 0.004 |" in text
    assert "| isthmus-int8 | 20 | 0.042 |" in text and "| vllm-bf16 | 5 | - |" in text


def test_a_piece_more_replaces_its_own_rows_and_refuses_another_text(tmp_path: Path) -> None:
    record([row("llama-q8_0", 0.004, 3), row("isthmus-int8", 0.05, 2)]).save(tmp_path)
    again = quality._merged(record([row("isthmus-int8", 0.005, 2), row("isthmus-int4", 0.5, 1)]), tmp_path)
    assert known([again]) == {"real": {"llama-q8_0": 0.004, "isthmus-int8": 0.005, "isthmus-int4": 0.5}}
    with pytest.raises(ConfigError, match="another text"):
        quality._merged(record([], "t"), tmp_path)


def test_what_serving_tells_is_what_was_measured() -> None:
    """Ours alone, by dtype, with the cache that is served by default."""
    facts = {"dtype": "float32", "cache_dtype": "model", "kl_window_error": 0.001, "ratio_window_error": 0.002}
    rows = [
        row("llama-q8_0", 0.004, 3, tensors={}),
        row("isthmus-int8-f32", 0.005, 2, **facts),
        row("isthmus-int4", 0.5, 1, **{**facts, "dtype": "bfloat16"}),
        row("isthmus-int8", 0.7, 2, **{**facts, "dtype": "bfloat16", "cache_dtype": "int8"}),
        row("isthmus-bf16", 0.0001, 9, **{**facts, "dtype": "bfloat16"}),
        row("isthmus-int4 calibrated", 0.3, 1, **facts),
    ]
    table = quality.costs([record(rows)])
    assert set(table) == {"int8", "int4"} and set(table["int8"]) == {"float32"} and set(table["int4"]) == {"bfloat16"}
    assert Cost(**table["int8"]["float32"]["real"]) == Cost(0.005, 0.001, 1.1, 0.002, 0.9, 100, "float32", "float32")


def test_what_serving_tells_is_up_to_date() -> None:
    """scripts/write_costs.py was run after the newest result."""
    results = Path(quality.__file__).parent / "results"
    assert quality.costs(load_all(results)) == (json.loads(KNOWN.read_text()) if KNOWN.is_file() else {})
