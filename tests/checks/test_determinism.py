"""A check that proves a promise must see it broken, and say where."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from isthmus.checks.determinism import check, compared, crowd_config, random_arrivals
from isthmus.checks.networks import NETWORKS, Numbers, small_executor
from isthmus.commands import check as check_command
from isthmus.commands import main as command
from isthmus.model.ops.cpu import library
from isthmus.serve.engine.executor import Executor, Launched
from isthmus.serve.engine.messages import End, Ending, Logprobs, Request
from isthmus.serve.engine.plan import StepPlan
from isthmus.serve.engine.sampling import Sampling
from tests.support import narrowest_dtype

REQUEST = Request("r", [1, 2], Sampling(logprobs=1), 8)
TOLD = (Logprobs(-0.5, (7,), (-0.25,)), Logprobs(-1.5, (9,), (-0.125,)))
END = End(Ending.LENGTH, (7, 8), TOLD)


@pytest.mark.parametrize(
    ("other", "at"),
    [
        (END, None),
        (replace(END, tokens=(7, 9)), 1),
        (replace(END, tokens=(7,), logprobs=TOLD[:1]), 1),
        (replace(END, reason=Ending.EOS), 2),
        (replace(END, logprobs=(TOLD[0], Logprobs(float(np.nextafter(-1.5, 0)), (9,), (-0.125,)))), 1),
        (replace(END, logprobs=(Logprobs(-0.5, (6,), (-0.25,)), TOLD[1])), 0),
        (replace(END, prompt_logprobs=TOLD), -2),
        (replace(END, embedding=np.ones(2, np.float32)), 0),
    ],
    ids=[
        "nothing",
        "a token",
        "a token less",
        "the reason",
        "the last bit of a logarithm",
        "another token's",
        "the prompt's",
        "an embedding",
    ],
)
def test_a_difference_is_seen_where_it_is(other: End, at: int | None) -> None:
    found = list(compared(REQUEST, END, other))
    assert [difference.at for difference in found[:1]] == ([] if at is None else [at])


def test_what_is_told_of_a_prompt_is_compared_token_by_token() -> None:
    scored = replace(END, prompt_logprobs=TOLD)
    assert not list(compared(REQUEST, scored, scored))
    other = replace(END, prompt_logprobs=(TOLD[0], Logprobs(-1.0, (9,), (-0.125,))))
    assert [difference.at for difference in compared(REQUEST, other, scored)] == [-1]
    assert not list(compared(REQUEST, End(Ending.CANCELLED, prompt_logprobs=TOLD[:1]), scored))


def test_a_cancelled_request_has_a_beginning_of_its_text() -> None:
    cancelled = End(Ending.CANCELLED, (7,), TOLD[:1])
    assert not list(compared(REQUEST, cancelled, END))
    assert list(compared(REQUEST, replace(cancelled, tokens=(8,)), END))


class Slipping(Executor):
    """Draws one token more for a step that holds others: what a sum in another order does, only larger."""

    def sample(self, launched: Launched, mask: np.ndarray | None = None) -> None:
        if len(launched.plan.samples) > 1:
            launched.plan.draws["seed_low"] += 1
        super().sample(launched, mask)


class Noting(Executor):
    """Notes how many steps each launch has."""

    launches: ClassVar[Counter[int]] = Counter()

    def launch(self, plan: StepPlan) -> Launched:
        self.launches[plan.steps] += 1
        return super().launch(plan)


@pytest.fixture(scope="module")
def dense() -> Executor:
    return small_executor(NETWORKS["dense"], Numbers(), crowd_config(192))


def test_training_that_computes_something_else_is_found_out(dense: Executor) -> None:
    """A check that compares nothing would hold for any trainer."""
    arrivals = random_arrivals(199, 192, 4)
    verdict = check(dense, arrivals, learned=lambda text: np.full(len(text) - 1, -1.0, np.float32))
    assert verdict.trained == len(verdict.differences) > 0
    assert all("in training" in str(difference) for difference in verdict.differences)


def test_a_batch_that_decides_is_found_out(dense: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "__class__", Slipping)
    arrivals = random_arrivals(199, 192, 6)
    verdict = check(dense, arrivals)
    assert not verdict.holds and "in the crowd" in str(verdict.differences[0])


def test_steps_are_compared_that_were_launched_together(dense: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check whose requests were all computed step by step would say nothing of the others."""
    launches: ClassVar[Counter[int]] = Counter()
    monkeypatch.setattr(Noting, "launches", launches)
    monkeypatch.setattr(dense, "__class__", Noting)
    assert check(dense, random_arrivals(199, 192, 20)).holds
    steps = sum(steps * number for steps, number in launches.items())
    assert steps - launches[1] > steps / 5


def test_the_command_says_what_it_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With pages that run short, cancels and a warm cache, on two of the networks; a slow test has all of them."""
    two = {name: NETWORKS[name] for name in ("experts", "adapters")}
    monkeypatch.setattr(check_command, "NETWORKS", two)
    assert command.main(["check", "determinism", "--requests", "16"]) == 0
    said = capsys.readouterr().out
    assert said.count("16 of 16 requests with the same bits") == len(two)
    assert said.count("none trained: XLA's sums") == (len(two) if library.why_not() else 0)
    assert command.main(["check", "determinism", "--requests", "0"]) == 2
    assert command.main(["check", "nonsense"]) == 2


@pytest.mark.parametrize(
    "options, said",
    [
        (["--all", "--model", "."], "all: --all is of the small networks"),
        (["--context-length", "64"], "context_length: --context-length needs --model"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["check", "determinism", *options]) == 2
    assert said in capsys.readouterr().err


def test_the_command_says_what_runs_by_xla(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else bits that differ look as if a promise was broken that nobody gave."""
    monkeypatch.setattr(check_command, "NETWORKS", {"dense": NETWORKS["dense"]})
    command.main(["check", "determinism", "--requests", "2", "--kernels", "auto,norm=reference"])
    assert "norm reference" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["--requests", "50"], pytest.param(["--requests", "9", "--all"], marks=pytest.mark.long)],
    ids=["kinds", "numbers"],
)
def test_hundreds_of_requests_get_the_same_bits(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Two hundred over the kinds of networks, and some for each kind of number with each of them."""
    if reason := library.why_not():
        pytest.skip(reason)
    if "--all" in options and narrowest_dtype() != "bfloat16":
        pytest.skip("this jax has no bfloat16 on a CPU")
    assert command.main(["check", "determinism", *options]) == 0, capsys.readouterr().out
