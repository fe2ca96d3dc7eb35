"""The gate of quantized models: what it measures, on which text, what it lets pass, and what it says instead."""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from isthmus.commands.check import Determinism
from isthmus.commands.main import main
from isthmus.errors import ConfigError
from isthmus.model.ops.cpu import library
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.quantization import SCHEMES, quantize_params
from isthmus.quality import compare as quality
from isthmus.quality import corpus, costs
from isthmus.quality.compare import KeptPredictions, described, original_kept, passes, undecided
from isthmus.quality.costs import MeasuredCost, measured
from isthmus.quality.divergence import Quality, kl_divergence, log_softmax
from isthmus.quality.suggest import candidates, coarsest, kinds, suggestion
from isthmus.quality.texts import TextConfig, _pieces, texts
from isthmus.serve.api.config import ServeConfig
from tests.model.weights.huggingface.folders import write_folder
from tests.serve.api.harness import save_model, train_tokenizer, varied_params
from tests.support import TINY, forward, largest_file

PROSE = " ".join(f"The {n}th sentence says that {n * n} is the square of {n}." for n in range(900))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gate") / "mine", train_tokenizer(), varied_params())


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.replace("\n", " ")


def test_it_measures_what_it_says(
    folder: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """KL, agreement, perplexity and their errors, against a plain numpy computation with both models' matrices. Without
    the kernels, which round activations as well."""
    monkeypatch.setattr(library, "why_not", lambda: "not wanted here")
    flags = ["--quantize", "int4", "--text", str(prose), "--windows", "3", "--force", "--serve-dtype", "float32"]
    assert main(["convert", str(folder), str(tmp_path / "small"), *flags, "--calibration", "0"]) == 0
    opened = open_folder(folder)
    windows = texts(TextConfig((str(prose),), 3), opened).comparison
    params = opened.load_params(build_mesh(MeshShape()))

    def log_probabilities() -> np.ndarray:
        logits = forward(opened.config, params, windows)[:, 256:511].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    want = log_probabilities()
    quantize_params(opened.config, params, SCHEMES["int4"])
    got = log_probabilities()
    kl = (np.exp(want) * (want - got)).sum(axis=-1)
    came = windows[:, 257:, None]
    nats, base = (-np.take_along_axis(each, came, axis=-1)[..., 0] for each in (got, want))
    found = measured(tmp_path / "small")
    assert found is not None and (found.tokens, found.windows, found.quantize) == (3 * 255, 3, "int4")
    assert (found.dtype, found.cache_dtype, found.source) == ("float32", "float32", str(prose))
    assert found.kl == pytest.approx(kl.mean(), rel=2e-3)
    assert found.kl_error == pytest.approx(kl.mean(axis=1).std(ddof=1) / math.sqrt(3), rel=2e-2)
    assert found.top1 == pytest.approx((want.argmax(axis=-1) == got.argmax(axis=-1)).mean(), abs=0.01)
    assert found.perplexity == pytest.approx(np.exp(nats.mean()), rel=1e-3)
    assert found.ratio == pytest.approx(np.exp((nats - base).mean()), rel=1e-3)
    assert found.ratio_error == pytest.approx((nats - base).mean(axis=1).std(ddof=1) / math.sqrt(3), rel=2e-2)
    assert f"KL {found.kl:.2g} ± {1.96 * (found.kl_error or 0):.1g} nats" in said(capsys)


def test_it_measures_the_cache_and_the_dtype_that_will_serve(
    folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An int8 cache costs something where the integers alone cost nothing: matrices are left as they are."""
    kls = {}
    for dtype, cache_dtype in (("float32", "model"), ("float32", "int8"), ("bfloat16", "model")):
        flags = ["--quantize", ".*=none", "--text", str(prose), "--windows", "2"]
        target = tmp_path / f"{dtype}-{cache_dtype}"
        flags += ["--serve-dtype", dtype, "--cache-dtype", cache_dtype, "--force"]
        assert main(["convert", str(folder), str(target), *flags]) == 0
        found = measured(target)
        assert found is not None
        kls[found.dtype, found.cache_dtype] = found.kl
    assert abs(kls["float32", "float32"]) < 1e-6
    assert kls["float32", "int8"] > 1e-5 and kls["bfloat16", "bfloat16"] > 1e-5


# What is kept of the original


def test_what_is_kept_is_what_counts(tmp_path: Path) -> None:
    """Of a vocabulary that fills no byte: every probability above e^-16, that of what came however small it is, and so
    the same divergence; as often as it is read; and not gigabytes of what is next to never said."""
    rng = np.random.default_rng(0)
    windows = [rng.normal(0, 9, (40, 1003)).astype(np.float32) for _ in range(2)]
    targets = [logits.argmin(axis=1) for logits in windows]
    with (tmp_path / "kept").open("w+b") as file:
        kept = KeptPredictions(file)
        for logits, came in zip(windows, targets, strict=True):
            kept.add(logits, came)
        assert file.tell() < 0.5 * sum(logits.nbytes for logits in windows)
        for _ in range(2):
            found = list(kept)
            assert len(found) == 2
            for logits, came, got in zip(windows, targets, found, strict=True):
                want, row = log_softmax(logits), np.arange(40)
                counted = want > -16
                np.testing.assert_array_equal(got[counted], want[counted])
                np.testing.assert_array_equal(got[row, came], want[row, came])
                assert got[~counted].max() <= -16
                other = log_softmax(rng.normal(0, 9, want.shape).astype(np.float32))
                np.testing.assert_array_equal(kl_divergence(got, other), kl_divergence(want, other))


def test_a_disk_without_room_is_said(folder: Path, tmp_path: Path) -> None:
    """Before anything is quantized."""
    original = open_folder(folder)
    windows = np.ones((2, 128), np.int32)
    with (
        largest_file(20_000),
        pytest.raises(ConfigError, match=r"windows: .* GB so far, don't fit"),
        original_kept(original, windows, tmp_path, lambda: None),
    ):
        raise AssertionError("they fitted")
    assert not list(tmp_path.iterdir())


# Bounds and intervals


def found(kl: float, ratio: float, kl_error: float = 0.0005, ratio_error: float = 0.001, windows: int = 64) -> Quality:
    return Quality(
        tokens=16320, kl=kl, kl_error=kl_error, top1=0.963, perplexity=10 * ratio, base_perplexity=10.0,
        windows=windows, kl_window_error=kl_error, ratio_window_error=ratio_error,
    )  # fmt: skip


@pytest.mark.parametrize(
    "bits, quality, passing, doubtful",
    [
        (8, found(0.004, 1.001), True, False),
        (8, found(0.0095, 1.001), True, True),  # 0.0095 + 2 * 0.0005 is beyond 0.01
        (8, found(0.0105, 1.001), False, True),
        (8, found(0.0120, 1.001), False, False),
        (8, found(0.004, 1.009), True, True),
        (8, found(0.004, 1.02), False, False),
        (8, found(0.0101, 1.05), False, False),  # KL alone could be otherwise, perplexity can't
        (6, found(0.012, 1.001), True, False),
        (5, found(0.04, 1.02), True, False),
        (4, found(0.1, 1.05), True, False),
        (4, found(0.5, 1.5), False, False),
        (4, found(float("nan"), 1.0), False, True),
        (8, found(0.001, 1.0, math.nan, math.nan, 1), True, True),  # a single window tells nothing of others
        (8, found(0.0, 1.0, 0.0, 0.0), True, False),
    ],
)
def test_means_decide_and_intervals_tell_how_surely(bits: int, quality: Quality, passing: bool, doubtful: bool) -> None:
    assert passes(quality, bits) == passing
    assert undecided(quality, bits) == doubtful


def test_figures_come_with_their_interval() -> None:
    text = described(found(0.00412, 1.0057, 0.00011, 0.0008))
    assert "KL 0.0041 ± 0.0002 nats per token" in text and "perplexity +0.57 ± 0.2%" in text
    assert "(10.06, before 10)" in text and "16,320 tokens in 64 windows" in text and "96.3%" in text
    assert "±" not in described(found(0.004, 1.0, math.nan, math.nan, 1)).split(";")[0], "nobody knows it of a window"


# Texts


def test_nothing_that_is_compared_was_calibrated_on(folder: Path, prose: Path, tmp_path: Path) -> None:
    """Of one's own text, also where it is there twice, and of the default."""
    opened = open_folder(folder)
    (begin,) = opened.tokenizer.encode("")
    (tmp_path / "copy.txt").write_text(PROSE)
    twice = (str(prose), str(tmp_path / "copy.txt"))
    once = len(texts(TextConfig(twice[:1], 1000), opened).comparison)
    for source, calibration in ((twice, 2 * once), ((), 4)):
        made = texts(TextConfig(source, 3), opened, calibration)
        assert made.comparison.shape == (3, 512)
        assert len(made.calibration) == (once - 3 if source else 4) and bool(made.warnings) == bool(source)
        assert np.all(made.comparison[:, 0] == begin) and np.all(made.calibration[:, 0] == begin)
        compared, calibrated = (
            {tuple(window[start : start + 80].tolist()) for window in windows for start in range(1, 433)}
            for windows in (made.comparison, made.calibration)
        )
        assert not compared & calibrated
    own = opened.tokenizer.decode(texts(TextConfig((str(prose),), 1), opened).comparison[0, 1:].tolist())
    assert PROSE.startswith(own[:400])
    default = opened.tokenizer.decode(made.comparison[0, 1:].tolist())
    assert default[:300] in corpus.text("evaluation")


def test_too_little_text_is_compared_first_and_said(folder: Path, tmp_path: Path) -> None:
    opened = open_folder(folder)
    path = tmp_path / "short.txt"
    path.write_text(PROSE[: len(PROSE) // 20])
    all_there = len(opened.tokenizer.encode(path.read_text())) // 512
    assert all_there > 1
    made = texts(TextConfig((str(path),), all_there + 1), opened, 2)
    assert made.comparison.shape == (all_there, 512) and made.calibration.shape == (0, 512)
    compared, calibrated = made.warnings
    assert f"{all_there} of the {all_there + 1} windows" in compared and "calibrate on" in calibrated
    made = texts(TextConfig((str(path),), 1), opened, all_there)
    assert made.comparison.shape == (1, 512) and made.calibration.shape == (all_there - 1, 512)
    path.write_text("too short")
    with pytest.raises(ConfigError, match="less than the 512 tokens"):
        texts(TextConfig((str(path),)), opened)


def test_a_long_text_is_encoded_in_whole_lines() -> None:
    """A text of a gigabyte isn't encoded for a few windows of it; a word that is cut would be two."""
    text = "".join(f"line {n}\n" for n in range(60_000))
    pieces = list(_pieces(text))
    assert len(pieces) == 3 and "".join(pieces) == text and all(piece.endswith("\n") for piece in pieces)
    assert "".join(_pieces("x" * 600_000)) == "x" * 600_000


# What would pass


def costing(kl: dict[str, float]) -> tuple[list[str], object]:
    """A measurement by the last rules' name in `kl`, the first that is a part of them; and what was asked."""
    asked: list[str] = []

    def measure(rules: Sequence[str], most: int | None) -> Quality:
        joined = ",".join(rules)
        asked.append(joined)
        return found(next(value for name, value in kl.items() if name in joined), 1.0)

    return asked, measure


@pytest.mark.parametrize(
    "refused, wanted",
    [
        (SCHEMES["int4"], ["int5", "int6", "int8"]),
        ((".*=int4:128",), ["int4", "int5", "int6", "int8"]),
        (SCHEMES["int6"], ["int8"]),
        (SCHEMES["int8"], []),
    ],
)
def test_finer_schemes_are_tried_first(refused: tuple[str, ...], wanted: list[str]) -> None:
    """In the order of their bits; then int8 with the worst kinds of matrix left out, most of the loss first."""
    _, measure = costing({"mlp/down": 0.5, "value": 0.4, "=": 0.1})
    names = list(candidates(TINY, refused, measure))  # type: ignore[arg-type]
    assert names[: len(wanted)] == wanted
    assert names[len(wanted)] == ".*/mlp/down/kernel=none,.*=int8"
    assert names[len(wanted) + 1].split("=")[0] == ".*/mlp/down/kernel|.*/attention/value/kernel"
    assert all(coarsest(TINY, name.split(",")) == 8 for name in names[len(wanted) :])


def test_the_first_that_passes_is_told() -> None:
    asked, measure = costing({"int5": 0.06, "int6": 0.015})
    told: list[str] = []
    result = suggestion(TINY, SCHEMES["int4"], measure, lambda name, _: told.append(name))  # type: ignore[arg-type]
    assert result is not None and result[0] == "int6" and result[1].kl == 0.015
    assert told == ["int5", "int6"] and len(asked) == 2
    asked, measure = costing({"=": 9.0})
    assert suggestion(TINY, SCHEMES["int4"], measure, lambda name, _: None) is None  # type: ignore[arg-type]


def test_what_is_suggested_can_be_served_without_converting() -> None:
    """The schemes that serve --quantize takes are those that there are."""
    for config in (ServeConfig, Determinism):
        assert set(typing.get_args(typing.get_type_hints(config)["quantize"])) == set(SCHEMES)


def test_kinds_are_the_places_in_a_layer() -> None:
    assert set(kinds(TINY)) == {
        "embedding", "head", ".*/mlp/gate/kernel", ".*/mlp/up/kernel", ".*/mlp/down/kernel",
        *(f".*/attention/{name}/kernel" for name in ("query", "key", "value", "out")),
    }  # fmt: skip


@pytest.mark.slow
def test_a_refusal_says_what_would_pass(
    folder: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And that passes, when it is asked for; nothing is left of what was refused. A silent conversion to nonsense would
    be found by its users; --force is for those who know."""
    strict = {8: (10.0, 10.0), 6: (0.0, 10.0), 5: (0.0, 10.0), 4: (0.0, 10.0)}
    monkeypatch.setattr(quality, "BOUNDS", strict)
    flags = ["convert", str(folder), str(tmp_path / "small"), "--text", str(prose), "--windows", "2"]
    assert main([*flags, "--quantize", "int6"]) == 2
    text = said(capsys)
    assert "int6 moves this model too far: KL 0.0" in text and "; the bounds are KL 0.0" in text and "--force" in text
    suggested = re.search(r"--quantize '([^']+)' would pass", text)
    assert suggested is not None and suggested[1] == "int8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prose.txt"]
    assert main([*flags, "--quantize", "int6", "--no-suggest"]) == 2
    assert "would pass" not in said(capsys)
    assert main([*flags, "--quantize", suggested[1]]) == 0
    assert measured(tmp_path / "small") is not None


def test_a_published_folder_becomes_one_that_knows_its_cost(
    tmp_path: Path, prose: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "source", "llama3", shards=2)
    flags = ["--quantize", "int8", "--text", str(prose), "--windows", "2", "--force"]
    assert main(["convert", str(source), str(tmp_path / "small"), *flags]) == 0
    kept = json.loads((tmp_path / "small" / "quality.json").read_text())
    assert MeasuredCost(**kept) == measured(tmp_path / "small")
    assert "KL" in said(capsys)


@pytest.mark.parametrize("content", ["{}", "not json", '{"kl": "much"}', "[]"])
def test_a_cost_that_can_not_be_read_is_none(content: str, tmp_path: Path) -> None:
    """It is only told: a server starts without it."""
    assert measured(tmp_path) is None
    (tmp_path / costs.FILE).write_text(content)
    assert measured(tmp_path) is None


def test_integers_are_fitted_to_other_text_than_is_compared(folder: Path, prose: Path, tmp_path: Path) -> None:
    """What rounding loses, the model's own activations say how to make up for: with them, less than half is lost."""
    found = {}
    for windows in ("0", "8"):
        flags = ["--quantize", "int4", "--windows", "3", "--calibration", windows, "--force", "--text", str(prose)]
        assert main(["convert", str(folder), str(tmp_path / windows), *flags]) == 0
        found[windows] = measured(tmp_path / windows)
    assert found["0"] is not None and found["8"] is not None
    assert 0 < found["8"].kl < 0.6 * found["0"].kl
