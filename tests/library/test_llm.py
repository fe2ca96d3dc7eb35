"""A model in this process says what a server says, from any thread, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from isthmus import (
    LLM,
    BatchError,
    Client,
    ConfigError,
    DeadlineExceeded,
    EngineConfig,
    InvalidRequest,
    Model,
    Overloaded,
    RequestFailed,
    SamplingParams,
    Unavailable,
)
from tests.library.conftest import OpenModel
from tests.serve.api.harness import ENGINE, LONG, NETWORK, PATIENCE, PROMPT, RunningServer, wait_for

DRAWN = SamplingParams(max_tokens=24, seed=5)
TALK = [{"role": "user", "content": "import ünïcode"}]


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def mixed_prompts(count: int) -> list[str]:
    """From one character to a dozen blocks."""
    return [f"# {index}\n" + "x = y\n" * (index * index % 60) for index in range(count)]


def test_a_hundred_prompts_give_the_servers_tokens(llm: LLM, client: Client) -> None:
    """Moving a script from a server into a process would change its results."""
    prompts = mixed_prompts(100)
    ours, theirs = llm.generate(prompts, DRAWN), client.generate(prompts, DRAWN)
    assert [(one.text, one.token_ids, one.finish_reason, one.seed) for one in ours] == [
        (one.text, one.token_ids, one.finish_reason, one.seed) for one in theirs
    ]
    assert [one.prompt_tokens for one in ours] == [len(llm.tokenize(prompt)) for prompt in prompts]
    assert len({one.text for one in ours}) > 90, "the model repeats itself, and an order would not show"


def test_a_stream_is_the_completion_in_pieces(llm: LLM, client: Client) -> None:
    """The text would depend on how it was asked for."""
    whole = llm.generate(PROMPT, DRAWN)
    for model in (llm, client):
        deltas = list(model.stream(PROMPT, DRAWN))
        assert "".join(delta.text for delta in deltas) == whole.text
        assert tuple(token for delta in deltas for token in delta.token_ids) == whole.token_ids
        assert [delta.completion is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
        last = deltas[-1].completion
        assert last is not None and (last.text, last.token_ids, last.seed) == (whole.text, whole.token_ids, whole.seed)


def test_a_stream_comes_while_the_model_writes(llm: LLM, client: Client) -> None:
    """A person would look at nothing until all of it is there."""
    for model in (llm, client):
        stream = model.stream(PROMPT, max_tokens=LONG, ignore_eos=True)
        first = next(stream)
        assert first.completion is None and first.token_ids
        stream.close()


def test_keywords_change_the_sampling_of_one_call(llm: LLM) -> None:
    """They would be taken silently and do nothing, as misspelt ones would."""
    assert llm.generate(PROMPT, DRAWN, max_tokens=3).token_ids == llm.generate(PROMPT, DRAWN).token_ids[:3]
    with pytest.raises(TypeError, match="max_token"):
        llm.generate(PROMPT, max_token=3)  # type: ignore[call-overload]


def test_a_full_model_refuses_who_cannot_wait_and_serves_who_is_urgent(llm: LLM, client: Client) -> None:
    """A caller that gives up after a second must hear so after a second, and an urgent one mustn't wait for others."""
    for model in (llm, client):
        running = [model.stream(PROMPT, max_tokens=LONG, ignore_eos=True) for _ in range(ENGINE.max_sequences)]
        for stream in running:
            next(stream)
        with pytest.raises(Overloaded, match="max_queue_time") as refused:
            model.generate(PROMPT, max_tokens=2, max_queue_time=0.05)
        assert refused.value.retry_after
        with pytest.raises(DeadlineExceeded):
            model.generate(PROMPT, max_tokens=2, timeout=0.05)
        assert len(model.generate(PROMPT, max_tokens=2, priority=1, ignore_eos=True).token_ids) == 2
        for stream in running:
            stream.close()


def test_the_cache_can_be_bypassed_and_parted(llm: LLM) -> None:
    """Whoever measures, or has a secret, needs a prompt that nobody else's has anything to do with."""
    prompt = "# bypassed\n" + "x = y\n" * 60

    def cached(**options: Any) -> int:
        return llm.generate(prompt, max_tokens=1, **options).cached_prompt_tokens

    assert [cached(cache="read"), cached(), cached(cache="write"), cached(cache="off")] == [0] * 4
    assert cached() > 0
    assert cached(cache_salt="s") == 0 and cached(cache_salt="s") > 0
    with pytest.raises(InvalidRequest, match="cache_salt"):
        cached(cache_salt="s" * 257)


def test_token_ids_are_a_prompt_and_a_list_of_them_many(llm: LLM) -> None:
    ids = llm.tokenize(PROMPT)
    one = llm.generate(ids, DRAWN)
    assert one.token_ids == llm.generate(PROMPT, DRAWN).token_ids
    assert [each.token_ids for each in llm.generate([ids, ids], DRAWN)] == [one.token_ids] * 2
    assert llm.generate([]) == []


def test_a_long_prompt_may_be_cut_to_its_end(llm: LLM, client: Client) -> None:
    """A chat that has grown past the context would end in an error, or be cut at the wrong side by whoever asks."""
    long = "word " * llm.context_length
    ids = llm.tokenize(long)
    assert len(ids) > llm.context_length
    for model in (llm, client):
        answer = model.generate(long, DRAWN, truncate_prompt_tokens=50)
        assert (answer.prompt_tokens, answer.token_ids) == (50, llm.generate(ids[-50:], DRAWN).token_ids)


def test_an_item_that_fails_costs_no_other(llm: LLM, client: Client) -> None:
    """An hour's batch would be lost to one empty line."""
    prompts = ["a", "", "b", "word " * 200_000]
    for model in (llm, client):
        found = model.generate(prompts, DRAWN, return_errors=True)
        assert [isinstance(each, InvalidRequest) for each in found] == [False, True, False, True]
        with pytest.raises(
            BatchError, match="2 of 4 failed, the first at index 1: prompt: must not be empty"
        ) as failed:
            model.generate(prompts, DRAWN)
        assert set(failed.value.errors) == {1, 3}
        good = failed.value.results[0]
        assert not isinstance(good, Exception) and good.token_ids == model.generate("a", DRAWN).token_ids


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "prompt"),
    ([1, 2, 512], {}, "prompt[2]"),
    ([1, -2], {}, "prompt"),
    ("a", {"temperature": float("nan")}, "temperature"),
    ("a", {"top_p": 0.0}, "top_p"),
    ("a", {"top_k": -1}, "top_k"),
    ("a", {"seed": 1 << 64}, "seed"),
    ("a", {"max_tokens": 0}, "max_tokens"),
    ("a", {"max_tokens": 1 << 20}, "max_tokens"),
    ("a", {"stop_token_ids": [1, 512]}, "stop_token_ids[1]"),
    ([1], {"parse_special": True}, "parse_special"),
    ("word " * 200_000, {}, "prompt"),
    (None, {}, "prompt"),
    (5, {}, "prompt"),
    (b"12", {}, "prompt"),
    ("half \ud800", {}, "prompt"),
    ([1, 2.5], {}, "prompt"),
    ((1, "2"), {}, "prompt"),
    (((1, 2), (3, 4)), {}, "prompt"),
    ("a", {"temperature": "hot"}, "temperature"),
    ("a", {"temperature": [1]}, "temperature"),
    ("a", {"top_k": 1.5}, "top_k"),
    ("a", {"seed": 0.5}, "seed"),
    ("a", {"seed": 10**5000}, "seed"),
    ("a", {"max_tokens": float("nan")}, "max_tokens"),
    ("a", {"max_tokens": "5"}, "max_tokens"),
    ("a", {"max_tokens": True}, "max_tokens"),
    ("a", {"stop_token_ids": None}, "stop_token_ids"),
    ("a", {"stop_token_ids": [1.5]}, "stop_token_ids"),
    ("a", {"stop_token_ids": [[1]]}, "stop_token_ids"),
    ("a", {"stop": ["b", ""]}, "stop[1]"),
    ("a", {"stop": ["b", "\ud800"]}, "stop[1]"),
    ("a", {"stop": [1]}, "stop[0]"),
    ("a", {"stop": 5}, "stop"),
    ("a", {"include_stop": "no"}, "include_stop"),
    ("a", {"skip_special_tokens": "no"}, "skip_special_tokens"),
    ("a", {"skip_special_tokens": None}, "skip_special_tokens"),
    ("a", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("a", {"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
    ("a", {"truncate_prompt_tokens": 1 << 20}, "truncate_prompt_tokens"),
    ("a", {"truncate_prompt_tokens": 1.5}, "truncate_prompt_tokens"),
    ("a", {"ignore_eos": "no"}, "ignore_eos"),
    ("a", {"parse_special": "no"}, "parse_special"),
    ("a", {"timeout": "1"}, "timeout"),
    ("a", {"timeout": float("nan")}, "timeout"),
]


@pytest.mark.parametrize(
    "prompt, options, field", BAD, ids=[f"{field} {index}" for index, (*_, field) in enumerate(BAD)]
)
def test_what_can_not_work_is_the_same_error_everywhere(
    prompt: Any, options: dict[str, Any], field: str, llm: LLM, client: Client
) -> None:
    """Who handles errors would have to know where the model runs."""
    for model in (llm, client):
        for call in (model.generate, lambda p, model=model, **o: list(model.stream(p, **o))):
            with pytest.raises(InvalidRequest) as refused:
                call(prompt, **options)
            assert refused.value.field.split("[")[0] == field.split("[")[0]
            assert len(field.split("[")) == 1 or refused.value.field == field


WRONG_KINDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "temperature: must be a number, not 'hot'"),
    ({"top_p": [1]}, "top_p: must be a number, not list"),
    ({"top_k": True}, "top_k: must be a whole number, not True"),
    ({"max_tokens": 1.5}, "max_tokens: must be a whole number, not 1.5"),
    ({"logprobs": True}, "logprobs: must be a whole number, not True"),
    ({"n": "2"}, "n: must be a whole number, not '2'"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]: must be a whole number, not 'a'"),
    ({"allowed_token_ids": [2, 2.5]}, "allowed_token_ids[1]: must be a whole number, not 2.5"),
    ({"bad_token_ids": [True]}, "bad_token_ids[0]: must be a whole number, not True"),
    ({"logit_bias": {1.5: 1}}, "logit_bias: must map token ids to numbers, and 1.5 is no token id"),
    ({"logit_bias": {"1": 1}}, "logit_bias: must map token ids to numbers, and '1' is no token id"),
    ({"seed": -1}, "seed: must be 0 or more, not -1"),
    ({"logit_bias": {3: "a"}}, "logit_bias[3]: must be a number, not 'a'"),
    ({"logit_bias": {3: 200.0}}, "logit_bias[3]: must be a number in [-100, 100], not 200.0"),
    ({"logit_bias": {600: 1.0}}, "logit_bias[600]: 600 is not a token id; the vocabulary has 512"),
    ({"logit_bias": [3]}, "logit_bias: must map token ids to numbers, not be list"),
    ({"choices": ["a", 5]}, "choices[1]: must be a string, not int"),
    ({"choices": 5}, "choices: must be a list of texts, not int"),
    ({"schema": [1]}, "schema: must be a dict, JSON text or a class with model_json_schema, not list"),
    ({"resume_token_ids": [5]}, "seed: must be given with resume_token_ids, and be that of the answer they are of"),
    ({"include_stop": None}, "include_stop: must be True or False, not None"),
    ({"parse_special": 0.5}, "parse_special: must be True or False, not 0.5"),
    ({"priority": None}, "priority: must be a whole number, not None"),
    ({"priority": 1 << 40}, "priority: must be -100 to 100, not 1099511627776"),
    ({"max_queue_time": "1"}, "max_queue_time: must be a number, not '1'"),
    ({"max_queue_time": float("nan")}, "max_queue_time: must be a number in (0, 1e+08], not nan"),
]


@pytest.mark.parametrize("options, said", WRONG_KINDS, ids=[said for _, said in WRONG_KINDS])
def test_a_wrong_kind_of_value_is_said_in_the_same_words(
    options: dict[str, Any], said: str, llm: LLM, client: Client
) -> None:
    """protobuf's words are about a message that the caller never wrote."""
    for model in (llm, client):
        with pytest.raises(InvalidRequest) as refused:
            model.generate("a", **options)
        assert str(refused.value) == said


def test_an_item_of_a_wrong_type_costs_no_other(llm: LLM, client: Client) -> None:
    """A missing value in a table would lose the batch, or end another's request."""
    prompts: list[Any] = ["a", None, "\ud800", [1.5], 3.0, "b"]
    for model in (llm, client):
        found = model.generate(prompts, DRAWN, return_errors=True)
        assert [isinstance(each, InvalidRequest) for each in found] == [False, True, True, True, True, False]


def test_numbers_of_numpy_are_numbers(llm: LLM, client: Client) -> None:
    """Prompts and options often come out of arrays."""
    ids = np.array([5, 6, 7])
    options: dict[str, Any] = {"max_tokens": np.int64(3), "temperature": np.float32(0.5), "seed": np.uint64(1 << 63)}
    found = [model.generate(ids, **options) for model in (llm, client)]  # type: ignore[call-overload]
    plain = llm.generate([5, 6, 7], max_tokens=3, temperature=0.5, seed=1 << 63)
    assert [each.token_ids for each in found] == [plain.token_ids] * 2
    assert type(found[0].seed) is int


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 10**20])
def test_a_timeout_that_never_comes_is_none(timeout: float, llm: LLM, client: Client) -> None:
    """Clocks can't hold every number: some raise OverflowError, others are over at once."""
    for model in (llm, client):
        assert model.generate("a", DRAWN, timeout=timeout).token_ids == llm.generate("a", DRAWN).token_ids


WRONG_TALKS: list[tuple[Any, str]] = [
    ([{"role": "user", "content": "a"}, "b"], "messages[1]"),
    ([{"role": "user", "content": "a"}, None], "messages[1]"),
    ([{1: 2, "a": 3}], "messages[0]"),
    ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
]


def test_a_wrong_message_is_named(chat_server: RunningServer, open_model: OpenModel) -> None:
    """An AttributeError of ours would be taken for a fault of ours."""
    arguments: Any = 5
    with Client(chat_server.address) as client, open_model(chat_server.config.model) as llm:
        for model in (llm, client):
            for talk, field in WRONG_TALKS:
                with pytest.raises(InvalidRequest) as refused:
                    model.chat(talk)
                assert refused.value.field == field
            with pytest.raises(InvalidRequest) as unmapped:
                model.chat(TALK, template_arguments=arguments)
            assert unmapped.value.field == "template_arguments"


def test_texts_and_ids_of_wrong_types_are_named(llm: LLM, client: Client) -> None:
    """tokenizers' and numpy's own errors say nothing of the argument."""
    texts: list[Any] = [5, b"a", "\ud800"]
    ids: list[Any] = [5, "12", b"12", [1.5], [[1]]]
    for model in (llm, client):
        for text in texts:
            with pytest.raises(InvalidRequest) as refused:
                model.tokenize(text)
            assert refused.value.field == "text"
        for given in ids:
            with pytest.raises(InvalidRequest) as unread:
                model.detokenize(given)
            assert unread.value.field.split("[")[0] == "token_ids"


@pytest.mark.filterwarnings("ignore")  # of JAX and Python: forking a process with threads is risky
def test_a_fork_is_told_to_open_its_own(llm: LLM) -> None:
    """The engine's thread isn't there: the fork would wait for ever."""
    child = os.fork()
    if not child:
        signal.alarm(int(PATIENCE))
        try:
            llm.generate("a")
        except Unavailable as error:
            os._exit(0 if "another process" in error.message else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert llm.generate("a", DRAWN)


def test_a_bar_that_nobody_reads_ends_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """rich would end the process and send standard output nowhere."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    before = sys.stdout
    monkeypatch.setattr("sys.stderr", Gone())
    found = llm.generate(["a", "b"], DRAWN, progress=True)
    assert sys.stdout is before
    assert len(found) == 2


def test_a_conversation_is_answered_alike(chat_server: RunningServer, open_model: OpenModel) -> None:
    with Client(chat_server.address) as client, open_model(chat_server.config.model) as llm:
        models: list[Model] = [llm, client]
        answers = [model.chat(TALK, DRAWN, template_arguments={"style": "brief"}) for model in models]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].prompt_tokens == answers[1].prompt_tokens > llm.chat(TALK, DRAWN).prompt_tokens
        for model in models:
            assert [each.token_ids for each in model.chat([TALK, TALK], DRAWN)] == [
                model.chat(TALK, DRAWN).token_ids
            ] * 2
            *_, last = model.stream(TALK, DRAWN)
            assert last.completion is not None and last.completion.token_ids == model.chat(TALK, DRAWN).token_ids
            with pytest.raises(InvalidRequest) as refused:
                model.chat([{"role": "critic", "content": "a"}])
            assert refused.value.field == "chat_template" and "no critics here" in refused.value.message
            with pytest.raises(InvalidRequest) as unknown:
                model.chat([{"role": "user", "contents": "a"}])
            assert unknown.value.field == "messages[0]"
            with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content: must be given"):
                model.chat([{"role": "user"}])
            for wrong in ("hello", {"role": "user", "content": "a"}, 5):
                with pytest.raises(InvalidRequest, match="messages: must be a list of messages with role and content"):
                    model.chat(wrong)  # type: ignore[call-overload]


def test_a_conversation_that_is_none_costs_no_other(chat_server: RunningServer, open_model: OpenModel) -> None:
    """An hour's batch would be lost to one empty conversation."""
    talks: list[Any] = [TALK, [], "hello", None, [{"role": "user"}], ["a"], TALK]
    with Client(chat_server.address) as client, open_model(chat_server.config.model) as llm:
        for model in (llm, client):
            found = model.chat(talks, DRAWN, return_errors=True)
            assert [getattr(each, "field", None) for each in found] == [
                *(None, "messages", "messages", "messages", "messages[0].content", "messages[0]", None),
            ]
            assert found[0].token_ids == found[-1].token_ids  # type: ignore[union-attr]


def test_a_conversation_is_no_prompt_and_a_prompt_no_conversation(llm: LLM) -> None:
    """Without its template a model would be asked in a form that it doesn't know."""
    wrong: list[Any] = [TALK[0], ["a", "b"], None]
    found = llm.generate([*wrong, "a"], DRAWN, return_errors=True)
    assert [str(each) for each in found[:-1]] == [
        "prompt: is a message: give chat a list of messages",
        "prompt: is several texts, where one text or its token ids are to be given",
        "prompt: must be a text or a sequence of token ids, not NoneType",
    ]
    assert not isinstance(found[-1], Exception)
    with pytest.raises(InvalidRequest, match="prompt: is several texts"):
        next(llm.stream(["a", "b"]))  # type: ignore[arg-type]


def test_it_works_under_a_running_loop(llm: LLM) -> None:
    """As in a notebook, whose cells run on one."""

    async def cell() -> tuple[int, ...]:
        assert llm.generate(["a", "b"], DRAWN)
        return tuple(token for delta in llm.stream(PROMPT, DRAWN) for token in delta.token_ids)

    assert asyncio.run(cell()) == llm.generate(PROMPT, DRAWN).token_ids


def test_a_model_without_a_template_says_so(llm: LLM, client: Client) -> None:
    for model in (llm, client):
        with pytest.raises(InvalidRequest, match="no chat template"):
            model.chat(TALK)


@pytest.mark.parametrize("text", ["a", "naïve 😀 中文\n\t", "<|endoftext|> spelt out"])
def test_tokens_are_those_of_the_server(text: str, llm: LLM, client: Client) -> None:
    for parsed in (False, True):
        ids = llm.tokenize(text, parse_special=parsed)
        assert ids == client.tokenize(text, parse_special=parsed)
        assert llm.detokenize(ids) == client.detokenize(ids)
    for model in (llm, client):
        with pytest.raises(InvalidRequest, match="text: must not be empty"):
            model.tokenize("")
        with pytest.raises(InvalidRequest, match="token_ids"):
            model.detokenize([-1])


def test_leaving_a_stream_ends_its_request(llm: LLM) -> None:
    """It would be computed to its end for nobody."""
    for delta in llm.stream(PROMPT, max_tokens=LONG, ignore_eos=True):
        assert delta.completion is None
        break
    wait_for(lambda: llm._engine.in_flight == 0, "the end of the request")


def test_a_timeout_ends_the_request(llm: LLM, client: Client) -> None:
    for model in (llm, client):
        with pytest.raises(DeadlineExceeded, match=r"within its timeout of 0\.05 s"):
            model.generate(PROMPT, max_tokens=LONG, ignore_eos=True, timeout=0.05)
        with pytest.raises(DeadlineExceeded, match=r"within its timeout of 0\.05 s"):
            list(model.stream(PROMPT, max_tokens=LONG, ignore_eos=True, timeout=0.05))
        failed = model.generate([PROMPT] * 2, max_tokens=LONG, ignore_eos=True, timeout=0.05, return_errors=True)
        assert [type(each) for each in failed] == [DeadlineExceeded] * 2
    wait_for(lambda: llm._engine.in_flight == 0, "the end of the requests")


def test_several_threads_call_at_once(llm: LLM) -> None:
    """A web server has many threads, and they would wait for each other or get each other's answers."""
    prompts = mixed_prompts(24)
    alone = [llm.generate(prompt, DRAWN).token_ids for prompt in prompts]

    def work(index: int) -> tuple[int, ...]:
        if index % 3 == 0:
            return llm.generate([prompts[index]], DRAWN)[0].token_ids
        if index % 3 == 1:
            return tuple(token for delta in llm.stream(prompts[index], DRAWN) for token in delta.token_ids)
        return llm.generate(prompts[index], DRAWN).token_ids

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(len(prompts)))) == alone


def test_it_opens_off_the_main_thread_and_leaves_signals_alone(open_model: OpenModel) -> None:
    """In a web server or a notebook the signals are somebody else's, and Ctrl-C must go on to raise."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    texts: list[str] = []

    def work() -> None:
        with open_model() as llm:
            texts.append(llm.generate(PROMPT, DRAWN).text)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(3 * PATIENCE)
    assert texts and texts[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.slow
def test_two_models_in_turn_share_the_memory(open_model: OpenModel) -> None:
    """Evaluating a dozen checkpoints in one process would fill the device with the first."""

    def held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    gc.collect()  # what tests before this one left
    before, taken = held(), []
    engine = EngineConfig(max_sequences=1, prefill_tokens=32, draft_rows=0, steps_per_launch=1)
    for kernels in ("auto", "reference"):
        with open_model(engine=engine, kernels=kernels) as llm:
            assert llm.generate(PROMPT, DRAWN).text
            taken.append(held() - before)
        assert held() == before
    assert min(taken) > 1e6, "the model was not even there"


def test_a_model_that_was_closed_says_so(open_model: OpenModel) -> None:
    """The engine is gone: a call would hang, or end on an error of the device."""
    llm = open_model()
    stream = llm.stream(PROMPT, max_tokens=LONG, ignore_eos=True)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(llm.generate, [PROMPT] * 3, max_tokens=LONG, ignore_eos=True, return_errors=True)
        wait_for(lambda: llm._engine.in_flight == 4, "the requests")
        llm.close()
        assert [type(each) for each in waiting.result(PATIENCE)] == [Unavailable] * 3
    with pytest.raises(Unavailable, match="shut down before"):
        list(stream)
    llm.close()
    for call in (llm.generate, llm.tokenize, lambda text: next(llm.stream(text))):
        with pytest.raises(Unavailable, match="closed"):
            call("a")


def test_an_engine_that_dies_tells_why(open_model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the device fails, nobody may wait for ever, and the reason must be found."""
    llm = open_model()

    def fail(plan: object) -> None:
        raise jax.errors.JaxRuntimeError("the device is gone")

    monkeypatch.setattr(llm._engine.executor, "launch", fail)
    for _ in range(2):  # while it dies, and afterwards
        with pytest.raises(RequestFailed) as failed:
            llm.generate(PROMPT)
        assert failed.value.reason == "ENGINE_DEAD" and "the device is gone" in str(failed.value.__cause__)
    llm.close()


def test_progress_is_for_a_terminal(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """A log full of bars, or an hour without a sign."""
    llm.generate(["a"] * 3, DRAWN)
    assert capsys.readouterr().err == ""
    llm.generate(["a"] * 3, DRAWN, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_what_serve_takes_it_takes(open_model: OpenModel, tmp_path: Path) -> None:
    plain = open_model()
    engine = EngineConfig(max_sequences=2, context_length=64, prefill_tokens=32, draft_rows=0, steps_per_launch=1)
    with plain, open_model(quantize="int8", engine=engine) as small:
        assert (plain.context_length, small.context_length) == (NETWORK.context_length, 64)
        assert small._model.quantize and not plain._model.quantize
        assert len(small.generate("a", ignore_eos=True).token_ids) < 64
    for options in ({"dtype": "float16"}, {"quantize": "int3"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            open_model(**options)
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    "argument, value, wanted",
    [
        ("path", 5, "str or PathLike"),
        ("engine", {"max_sequences": 8}, "EngineConfig or None, not dict"),
        ("mesh", "tp=2", "MeshShape or None, not str"),
        ("kernels", None, "str, not NoneType"),
        ("ignore_field", "rope", "list or tuple, not str"),
        ("download", "yes", "bool"),
        ("base", 5, "str or PathLike or None"),
        ("adapters", ["runs/mine"], "Mapping or None, not list"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(argument: str, value: Any, wanted: str, tmp_path: Path) -> None:
    """An AttributeError in the middle of loading says nothing of the argument."""
    arguments: dict[str, Any] = {"path": tmp_path, argument: value}
    with pytest.raises(ConfigError, match=f"^{argument} must be {wanted}"):
        LLM(**arguments)


@pytest.mark.parametrize("adapters, named", [({"a": 5}, "the folder of 'a'"), ({1: "runs/a"}, "the name int")])
def test_an_adapter_of_a_wrong_type_is_named(adapters: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^adapters: {named} must be str"):
        LLM(tmp_path, adapters=adapters)
