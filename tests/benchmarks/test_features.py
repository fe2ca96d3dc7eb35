"""What the engine's features do to its speed is measured on the work that they are for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from isthmus.benchmarks import features
from isthmus.benchmarks.cases import CASES
from isthmus.benchmarks.features import RATIOS, FeaturesBench
from isthmus.benchmarks.models import write_model
from isthmus.errors import ConfigError
from tests.support import TINY


@pytest.mark.slow
def test_every_feature_is_measured_and_shown(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vocab_size=300, context_length=2048)
    write_model(tmp_path / "tiny", config)
    bench = FeaturesBench(
        model=tmp_path / "tiny", dtype="float32", streams=2, tokens=16, prompt=128, beside=2, repeats=1
    )
    bench.validate()
    record = features.run(bench, Console(quiet=True))
    assert [row["name"] for row in record.figures["ratios"]] == list(RATIOS)
    assert all(row["with"] > 0 and row["without"] > 0 and row["ratio"] > 0 for row in record.figures["ratios"])
    beside = record.figures["beside"]
    assert 0 < beside["gap_median"] <= beside["gap_p99"] and beside["first"] > 0 and beside["gap_alone"] > 0
    assert 0 < record.figures["masks"] < 1
    adapters = record.figures["adapters"]
    assert {(row["rows"], row["kind"]) for row in adapters["rows"]} == {
        *((rows, kind) for rows in (1, 8, 32) for kind in ("none", "one")),
        *((rows, "eight") for rows in (8, 32)),
    }
    assert all(row["rate"] > 0 and row["ratio"] > 0 for row in adapters["rows"])
    limits = {row["kind"]: row["limit"] for row in adapters["rows"]}
    assert limits["none"] == 1 > limits["one"] >= limits["eight"] > 0
    case = next(case for case in CASES if case.name == "features")
    shown = case.section(record, {})
    assert (
        all(name in shown for name in RATIOS)
        and "2 streams" in shown
        and "Masks" in shown
        and "eight different" in shown
    )


def test_a_model_without_text_is_refused() -> None:
    """Random weights would make guesses look better, or worse, than they are."""
    with pytest.raises(ConfigError, match="model"):
        FeaturesBench().validate()
