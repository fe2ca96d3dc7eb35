"""Adapters that come and go while the engine serves: nobody's answer changes, and a place is never somebody else's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from queue import Queue
from typing import Any

import numpy as np
import pytest

from isthmus.errors import ConfigError, FailedPrecondition, ModelNotFound, RequestFailed, Unavailable
from isthmus.model.config import LoraConfig
from isthmus.model.sharding import MeshShape
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.huggingface.adapters import load_adapter
from isthmus.model.weights.lora import Adapter
from isthmus.serve.engine.build import build_executor, open_model
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import End, Ending, Event, Request
from isthmus.serve.engine.sampling import Sampling
from tests.serve.engine.test_adapters import ENGINE, Made, make
from tests.support import narrowest_dtype

PLACES = dataclasses.replace(
    ENGINE, max_sequences=2, prefill_tokens=16, draft_rows=2, max_adapters=2, adapter_rank=8, max_waiting=30, pages=40
)
"""Few programs, which are compiled for each kind of base model"""
PROMPT = list(range(3, 40))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("loading"))


@pytest.fixture(scope="module")
def adapters(made: Made) -> dict[str, Adapter]:
    """Those of the folders, and one more."""
    base = open_folder(made.base)
    read = {name: load_adapter(folder, base) for name, folder in made.folders.items()}
    wide = read["wide"]
    return {**read, "third": Adapter(wide.lora, {path: factor[::-1].copy() for path, factor in wide.factors.items()})}


@pytest.fixture(scope="module")
def empty(made: Made) -> Executor:
    """With places, and no adapter in them."""
    return build_executor(open_model(made.base, "float32"), PLACES, MeshShape())


class Running:
    """An engine that answers one caller."""

    def __init__(self, executor: Executor) -> None:
        self.events: Queue[Event] = Queue()
        self.engine = Engine(executor, lambda events: [self.events.put(event) for event in events])  # type: ignore[func-returns-value]
        self._asked = 0

    def ask(self, name: str, tokens: int = 6, prompt: list[int] = PROMPT, **options: Any) -> Request:
        adapter = self.engine.adapters[name] if name else None
        self._asked += 1
        sampling = Sampling(temperature=0, logprobs=2)
        request = Request(f"{self._asked}", prompt, sampling, tokens, adapter=adapter, **options)
        self.engine.submit(request)
        return request

    def end(self, request: Request) -> End:
        while True:
            event = self.events.get(timeout=60)
            if event.request is request and event.end is not None:
                return event.end


@pytest.fixture
def running(empty: Executor) -> Iterator[Running]:
    """Not started: what is asked before waits, so that the order of things is certain."""
    one = Running(empty)
    yield one
    one.engine.close()
    for name in list(empty.adapters):
        one.engine.unload_adapter(name)


def told(end: End) -> tuple[Any, Any]:
    return end.tokens, end.logprobs


def answers(executor: Executor, *names: str) -> list[tuple[Any, Any]]:
    """What each says, alone and from a cold cache."""
    found = []
    for name in names:
        one = Running(executor)
        one.engine.start()
        found.append(told(one.end(one.ask(name))))
        one.engine.close()
    return found


def given_and_loaded(made: Made, adapters: dict[str, Adapter], *order: str, **options: Any) -> None:
    """Compares the bits of adapters that were given at the start and that are loaded in some order."""
    build = {"mesh": options.pop("mesh", MeshShape()), "kernels": options.pop("kernels", "auto")}
    dtype, sizes = options.pop("dtype", "float32"), options.pop("sizes", PLACES)
    given = build_executor(open_model(made.base, dtype, adapters=made.folders, **options), sizes, **build)
    want = answers(given, "", "wide", "narrow")
    given.free()
    executor = build_executor(open_model(made.base, dtype, **options), sizes, **build)
    one = Running(executor)
    for name in order:
        one.engine.load_adapter(name, adapters[name])
    one.engine.start()
    ends = [one.end(one.ask(name)) for name in ("", "wide", "narrow")]
    assert [told(end) for end in ends] == want and len({end.tokens for end in ends}) == 3
    one.engine.close()
    assert answers(executor, "", "wide", "narrow") == want
    assert executor.recompilations == 0
    executor.free()


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_loaded_is_what_given_at_the_start_is(quantize: str, made: Made, adapters: dict[str, Adapter]) -> None:
    """Whoever restarts a server with the adapters that it has would get other texts. In another place, too."""
    given_and_loaded(made, adapters, "narrow", "wide", quantize=quantize)


def test_loaded_numbers_are_rounded_as_given_ones_are(made: Made, adapters: dict[str, Adapter]) -> None:
    given_and_loaded(made, adapters, "narrow", "wide", dtype=narrowest_dtype())


@pytest.mark.slow
def test_the_base_may_be_split_over_devices(made: Made, adapters: dict[str, Adapter]) -> None:
    """A factor that came whole to each device, or to the wrong one, would be another adapter."""
    given_and_loaded(
        made,
        adapters,
        "wide",
        "narrow",
        mesh=MeshShape(tp=2),
        sizes=dataclasses.replace(PLACES, max_sequences=1, draft_rows=1),
    )


def test_requests_in_flight_notice_nothing(empty: Executor, running: Running, adapters: dict[str, Adapter]) -> None:
    """Loading writes into what the steps in flight read. Again and again, while others are answered."""
    engine = running.engine
    engine.load_adapter("wide", adapters["wide"])
    engine.start()
    alone = told(running.end(running.ask("wide", 20)))
    asked = []
    for round in range(12):
        name = ("narrow", "third")[round % 2]
        engine.load_adapter(name, adapters[name])
        asked += [running.ask("wide", 20, cache_read=False)]
        engine.unload_adapter(name)
    for request in asked:
        assert told(running.end(request)) == alone
    assert empty.recompilations == 0


def test_an_unloaded_adapter_finishes_what_it_has_begun(
    empty: Executor, running: Running, adapters: dict[str, Adapter]
) -> None:
    """Unloading refuses new requests alone; a place is nobody else's until the last one that has it has ended, also
    one that still waits."""
    engine = running.engine
    for name in ("wide", "narrow"):
        engine.load_adapter(name, adapters[name])
    first, resident = running.ask("wide"), engine.adapters["wide"]
    standing = engine.unload_adapter("wide")
    assert (standing.requests, standing.loaded) == (1, False)
    assert [(each.resident.name, each.requests, each.loaded) for each in engine.standings()] == [
        ("wide", 1, False),
        ("narrow", 0, True),
    ]
    with pytest.raises(ModelNotFound, match="'wide' is not here"):
        engine.submit(dataclasses.replace(first, id="late"))
    with pytest.raises(FailedPrecondition, match=r"all 2 places .* 1 of them by requests .* engine\.max_adapters"):
        engine.load_adapter("third", adapters["third"])
    assert engine.load_adapter("wide", adapters["wide"]) == resident, "it is still there"
    engine.unload_adapter("wide")
    engine.start()
    begun = told(running.end(first))
    third = engine.load_adapter("third", adapters["third"])
    assert third.place == resident.place
    other = told(running.end(running.ask("third")))
    engine.close()
    assert answers(empty, "third") == [other] != [begun]
    one = Running(empty)
    one.engine.unload_adapter("third")
    one.engine.load_adapter("wide", adapters["wide"])
    assert answers(empty, "wide") == [begun]


def test_a_cancelled_request_holds_its_place_until_it_has_ended(running: Running, adapters: dict[str, Adapter]) -> None:
    """Its id is free at once, and it may still be in a step."""
    engine = running.engine
    for name in ("wide", "narrow"):
        engine.load_adapter(name, adapters[name])
    request = running.ask("wide")
    engine.cancel(request)
    engine.unload_adapter("wide")
    with pytest.raises(FailedPrecondition):
        engine.load_adapter("third", adapters["third"])
    engine.start()
    assert running.end(request).reason is Ending.CANCELLED
    engine.load_adapter("third", adapters["third"])


def test_other_weights_under_a_name_never_read_its_pages(
    empty: Executor, running: Running, adapters: dict[str, Adapter]
) -> None:
    """The next version of an adapter would answer from keys and values of the last one."""
    engine = running.engine
    engine.start()
    found = []
    for name in ("wide", "third", "wide"):
        engine.load_adapter("same", adapters[name])
        found.append(running.end(running.ask("same")))
        engine.unload_adapter("same")
    assert [end.progress.cached_tokens for end in found] == [0, 0, 32]
    assert told(found[0]) == told(found[2]) != told(found[1])


def test_loading_again_is_no_error(running: Running, adapters: dict[str, Adapter]) -> None:
    """Whoever lost the answer asks again. Other weights under the name are an error, and change nothing."""
    engine = running.engine
    first = engine.load_adapter("wide", adapters["wide"])
    assert engine.load_adapter("wide", adapters["wide"]) == first
    with pytest.raises(FailedPrecondition, match="'wide' of other weights is loaded: unload it first"):
        engine.load_adapter("wide", adapters["narrow"])
    assert dict(engine.adapters) == {"wide": first}
    engine.unload_adapter("wide")
    with pytest.raises(ModelNotFound, match="no adapter 'wide' is loaded"):
        engine.unload_adapter("wide")


def test_what_does_not_fit_is_refused(made: Made, running: Running, adapters: dict[str, Adapter]) -> None:
    wide, narrow = adapters["wide"], adapters["narrow"]
    big = Adapter(
        LoraConfig(9, 9.0), {path: np.zeros((*factor.shape[:-1], 9)) for path, factor in wide.factors.items()}
    )
    with pytest.raises(ConfigError, match=r"has rank 9; the most is 8, which engine\.adapter_rank says"):
        running.engine.load_adapter("big", big)
    assert not running.engine.adapters and not running.engine.standings()
    exact = build_executor(
        open_model(made.base, "float32", adapters={"narrow": made.folders["narrow"]}), ENGINE, MeshShape()
    )
    engine = Engine(exact, lambda events: None)
    small = Adapter(dataclasses.replace(wide.lora, rank=2), wide.factors)
    with pytest.raises(ConfigError, match=r"adapts blocks/0/attention/key, which .* engine\.max_adapters makes places"):
        engine.load_adapter("wide", small)
    engine.unload_adapter("narrow")
    assert engine.load_adapter("again", narrow).place == 1, "what is unloaded leaves a place for what fits"
    plain = Engine(build_executor(open_model(made.base, "float32"), ENGINE, MeshShape()), lambda events: None)
    with pytest.raises(FailedPrecondition, match=r"without places for adapters: engine\.max_adapters"):
        plain.load_adapter("wide", wide)


def test_an_engine_that_ends_takes_none(empty: Executor, adapters: dict[str, Adapter]) -> None:
    draining, dead = (Engine(empty, lambda events: None) for _ in range(2))
    draining.drain()
    with pytest.raises(Unavailable):
        draining.load_adapter("wide", adapters["wide"])
    dead.error = RuntimeError("the device is gone")
    with pytest.raises(RequestFailed):
        dead.load_adapter("wide", adapters["wide"])
    assert not empty.adapters
