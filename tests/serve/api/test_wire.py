"""Over the wire: what a client of the API sees, on a real server and a real channel."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import grpc
import jax
import pytest
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from isthmus import InvalidRequest, RequestError, generate_request
from isthmus.model.text.tokenizer import END_OF_TEXT, Tokenizer
from isthmus.v1 import control_pb2
from isthmus.v1 import inference_pb2 as pb
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import (
    ENGINE,
    LONG,
    NETWORK,
    PROMPT,
    SERVING,
    ApiClient,
    RunningServer,
    begin,
    blamed_fields,
    byte_token,
    check_health,
    collect,
    cycle,
    details,
    idle,
    raw_stub,
    save_model,
    scripted_params,
    wait_for,
)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


# A model that writes what it is told to, for tests of where a generation ends and how its text is cut.

CHARACTERS = "😀é中"
"""Every byte of these is another, so each decides the next one."""


@pytest.fixture(scope="session")
def scripted(
    start_server: StartServer, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> RunningServer:
    """Greedily writes CHARACTERS for ever after one of their bytes; and "abc", end of text, "d", "a" after "a"."""
    written = [byte_token(tokenizer, byte) for byte in CHARACTERS.encode()]
    assert len(set(written)) == len(written)
    assert tokenizer.eos_id is not None
    a, b, c, d = (byte_token(tokenizer, ord(letter)) for letter in "abcd")
    script = {**cycle(written), **cycle([a, b, c, tokenizer.eos_id, d])}
    folder = save_model(tmp_path_factory.mktemp("models") / "scripted", tokenizer, scripted_params(script))
    return start_server(model=folder)


@pytest.fixture
def script_client(scripted: RunningServer) -> Iterator[ApiClient]:
    with scripted.client() as client:
        yield client


# Streaming


@pytest.mark.parametrize("seed", range(8))
def test_a_stream_says_what_the_unary_call_says(client: ApiClient, seed: int) -> None:
    """Else the text that a user sees depends on how they asked for it."""
    streamed = collect(client.stream(PROMPT, max_tokens=60, seed=seed, ignore_eos=True))
    whole = client.generate(PROMPT, max_tokens=60, seed=seed, ignore_eos=True)
    assert streamed.text == whole.text
    assert streamed.token_ids == whole.token_ids
    assert len(streamed.token_ids) == 60
    assert streamed.started.seed == whole.seed == seed
    assert streamed.started.prompt_tokens == streamed.finished.usage.prompt_tokens == whole.prompt_tokens


@pytest.mark.parametrize("seed", range(8))
def test_streamed_text_is_the_text_of_its_tokens(client: ApiClient, seed: int) -> None:
    """Else a character is lost, doubled or broken where two deltas meet."""
    streamed = collect(client.stream(PROMPT, max_tokens=200, seed=seed, ignore_eos=True))
    assert streamed.text == client.detokenize(streamed.token_ids)


def test_a_stream_comes_in_pieces(client: ApiClient) -> None:
    """Else streaming shows nothing until the end."""
    assert len(collect(client.stream(PROMPT, max_tokens=300, ignore_eos=True)).deltas) > 10


def test_token_ids_come_only_when_asked_for(client: ApiClient) -> None:
    silent = collect(client.stream(PROMPT, max_tokens=40, seed=1, ignore_eos=True, return_token_ids=False))
    assert silent.token_ids == () and silent.text
    whole = client.generate(PROMPT, max_tokens=40, seed=1, ignore_eos=True, return_token_ids=False)
    assert whole.token_ids == () and whole.text == silent.text


def test_text_can_be_turned_off(client: ApiClient) -> None:
    request = generate_request(PROMPT, max_tokens=40, seed=1, ignore_eos=True)
    request.output.text = False
    streamed = collect(raw_stub(client).GenerateStream(pb.GenerateStreamRequest(request=request)))
    whole = raw_stub(client).Generate(request)
    assert streamed.text == whole.choices[0].text == ""
    assert len(streamed.token_ids) == 40 and list(streamed.token_ids) == list(whole.choices[0].token_ids)


def test_a_stream_of_neither_text_nor_ids_still_says_how_it_ended(client: ApiClient) -> None:
    request = generate_request(PROMPT, max_tokens=40, ignore_eos=True, return_token_ids=False)
    request.output.text = False
    streamed = collect(raw_stub(client).GenerateStream(pb.GenerateStreamRequest(request=request)))
    assert streamed.deltas == () and streamed.finished.usage.completion_tokens == 40


def test_a_prompt_of_ids_is_the_prompt_of_its_text(client: ApiClient) -> None:
    options = {"max_tokens": 30, "seed": 7, "ignore_eos": True}
    assert client.generate(PROMPT, **options).text == client.generate(client.tokenize(PROMPT), **options).text


@pytest.mark.parametrize("max_tokens", range(1, 2 * len(CHARACTERS.encode()) + 1))
def test_every_delta_is_whole_characters(script_client: ApiClient, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Each token is one byte of a character of several. Else a client sees broken characters while it streams."""
    encoded = CHARACTERS.encode()
    prompt = [byte_token(tokenizer, encoded[-1])]
    streamed = collect(script_client.stream(prompt, max_tokens=max_tokens, temperature=0))
    written = (encoded * 2)[:max_tokens]
    whole = written.decode(errors="ignore")
    cut = whole.encode() != written
    *body, end = [delta.text for delta in streamed.deltas]
    assert all(REPLACEMENT not in text for text in body)
    assert streamed.text == whole + (REPLACEMENT if cut else "")
    assert end.endswith(REPLACEMENT) == cut
    assert script_client.generate(prompt, max_tokens=max_tokens, temperature=0).text == streamed.text


# Where a generation ends


def test_end_of_text_ends_it_and_is_not_part_of_it(script_client: ApiClient, tokenizer: Tokenizer) -> None:
    answer = collect(script_client.stream("a", max_tokens=50, temperature=0))
    assert answer.finished.finish_reason == pb.FINISH_REASON_EOS
    assert answer.finished.stop_token_id == tokenizer.eos_id
    assert answer.text == "bc" and len(answer.token_ids) == 2
    assert answer.finished.usage.completion_tokens == 3


def test_ignore_eos_goes_on_past_the_end_of_text(script_client: ApiClient) -> None:
    answer = script_client.generate("a", max_tokens=8, temperature=0, ignore_eos=True)
    assert answer.finish_reason == "LENGTH" and len(answer.token_ids) == 8
    assert answer.text == "bcdabc", "the end of text itself is never text"


def test_special_tokens_are_text_for_who_asks_for_them(script_client: ApiClient) -> None:
    """Tool calls and reasoning are marked by special tokens: a parser would find no mark."""
    options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "skip_special_tokens": False}
    spelt = f"bc{END_OF_TEXT}dabc{END_OF_TEXT}"
    assert script_client.generate("a", **options).text == spelt
    assert collect(script_client.stream("a", **options)).text == spelt
    stopped = script_client.generate("a", **options, stop=f"{END_OF_TEXT}d")
    assert (stopped.text, len(stopped.token_ids), stopped.stop_string) == ("bc", 4, f"{END_OF_TEXT}d")
    ended = script_client.generate("a", **{**options, "ignore_eos": False})
    assert (ended.text, ended.finish_reason) == ("bc", "EOS")


def test_a_stop_token_ends_it_and_is_not_part_of_it(script_client: ApiClient, tokenizer: Tokenizer) -> None:
    stops = [byte_token(tokenizer, ord(letter)) for letter in "xc"]
    answer = collect(script_client.stream("a", max_tokens=50, temperature=0, stop_token_ids=stops))
    assert answer.finished.finish_reason == pb.FINISH_REASON_STOP_TOKEN
    assert answer.finished.stop_token_id == stops[1]
    assert answer.text == "b" and len(answer.token_ids) == 1
    whole = script_client.generate("a", max_tokens=50, temperature=0, stop_token_ids=stops)
    assert (whole.text, whole.finish_reason) == ("b", "STOP_TOKEN")


def test_a_generation_may_stop_at_its_first_token(script_client: ApiClient, tokenizer: Tokenizer) -> None:
    answer = collect(script_client.stream("a", temperature=0, stop_token_ids=[byte_token(tokenizer, ord("b"))]))
    assert answer.finished.finish_reason == pb.FINISH_REASON_STOP_TOKEN
    assert answer.text == "" and answer.token_ids == ()


def test_no_stop_token_is_told_where_none_ended_it(script_client: ApiClient) -> None:
    answer = collect(script_client.stream("a", max_tokens=2, temperature=0))
    assert answer.finished.finish_reason == pb.FINISH_REASON_LENGTH
    assert not answer.finished.HasField("stop_token_id") and answer.text == "bc"


def test_a_full_context_is_told_from_max_tokens(client: ApiClient) -> None:
    prompt = [1 + i % 200 for i in range(NETWORK.context_length - 5)]
    assert client.generate(prompt, max_tokens=4, ignore_eos=True).finish_reason == "LENGTH"
    assert client.generate(prompt, max_tokens=5, ignore_eos=True).finish_reason == "CONTEXT_LENGTH"
    default = client.generate(prompt, ignore_eos=True)
    assert (default.finish_reason, len(default.token_ids)) == ("CONTEXT_LENGTH", 5)


def test_the_longest_prompt_draws_one_token(client: ApiClient) -> None:
    prompt = [1 + i % 200 for i in range(NETWORK.context_length - 1)]
    assert len(client.generate(prompt, ignore_eos=True).token_ids) == 1


def test_without_max_tokens_it_is_256(client: ApiClient) -> None:
    assert len(client.generate(PROMPT, ignore_eos=True).token_ids) == 256


# Seeds


def test_a_seed_the_server_picked_draws_the_same_again(client: ApiClient) -> None:
    """Else a result can't be reproduced unless one thought of it before."""
    first = client.generate(PROMPT, max_tokens=50, ignore_eos=True)
    other = client.generate(PROMPT, max_tokens=50, ignore_eos=True)
    assert other.seed != first.seed and other.token_ids != first.token_ids
    assert client.generate(PROMPT, max_tokens=50, ignore_eos=True, seed=first.seed).token_ids == first.token_ids


def test_all_64_bits_of_a_seed_count(client: ApiClient) -> None:
    seeds = [0, 1, 1 << 32, 1 << 63, (1 << 64) - 1]
    drawn = [client.generate(PROMPT, max_tokens=30, ignore_eos=True, seed=seed) for seed in seeds]
    assert [completion.seed for completion in drawn] == seeds
    assert len({completion.token_ids for completion in drawn}) == len(seeds)


# What the server says of itself


def test_reflection_lists_both_services(client: ApiClient) -> None:
    services = set(ProtoReflectionDescriptorDatabase(client.channel).get_services())
    assert {"isthmus.v1.InferenceService", "isthmus.v1.ControlService", "grpc.health.v1.Health"} <= services


def test_health_says_serving(client: ApiClient) -> None:
    for service in ("", "isthmus.v1.InferenceService", "isthmus.v1.ControlService"):
        assert check_health(client.channel, service) == SERVING


def test_while_the_model_loads_it_says_so(start_server: StartServer) -> None:
    """Generation is refused for now, not for good, and health keeps load balancers away."""
    server = start_server(load=False)
    with server.client() as client:
        assert check_health(client.channel) != SERVING
        for call in (
            lambda: client.generate("a"),
            lambda: list(client.stream("a")),
            client.load,
            client.server_info,
        ):
            with pytest.raises(grpc.RpcError) as failure:
                call()
            assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
            assert details(failure.value, error_details_pb2.RetryInfo)
        assert client.tokenize("a"), "the tokenizer needs no parameters"


@pytest.mark.parametrize("text", ["a", PROMPT, "naïve 😀 中文\n\t\x00", "<|endoftext|> spelled out"])
def test_tokenize_and_detokenize_give_the_text_back(client: ApiClient, text: str) -> None:
    ids = client.tokenize(text)
    assert client.detokenize(ids) == text
    (end,) = client.model_info().eos_token_ids
    assert ids.count(end) == 1, "spelling out a special token must not make one"


def test_model_info_is_true(client: ApiClient, model_folder: Path, tokenizer: Tokenizer) -> None:
    info = client.model_info()
    assert info.name == model_folder.name
    assert info.vocab_size == tokenizer.vocab_size and list(info.eos_token_ids) == [tokenizer.eos_id]
    assert info.parameters == NETWORK.parameters
    for field in ("context_length", "layers", "heads", "kv_heads", "head_dim"):
        assert getattr(info, field) == getattr(NETWORK, field)
    assert info.dtype == info.cache_dtype == control_pb2.DTYPE_FLOAT32


def test_server_info_is_true(client: ApiClient) -> None:
    info = client.server_info()
    assert info.version == version("isthmus") and info.jax_version == jax.__version__
    assert info.platform == control_pb2.PLATFORM_CPU and list(info.devices) == ["cpu"]
    assert list(info.buckets) == [1, 2, 4, 8, 8 + 32, 8 + 64]
    assert (info.page_size, info.max_sequences) == (ENGINE.page_size, ENGINE.max_sequences)
    assert info.pages_total == ENGINE.max_sequences * NETWORK.context_length // ENGINE.page_size // 2
    assert info.compile_seconds > 0 and info.warmup_seconds > 0


def test_load_is_told_again_and_again_until_the_server_ends(start_server: StartServer) -> None:
    """A router that polls has old news, or none; and one that watches must not keep a server from ending."""
    server = start_server()
    with server.client() as client:
        watch = client.watch_load(0.1)
        assert next(watch).completion_tokens == 0
        client.generate("a", max_tokens=3, ignore_eos=True)
        wait_for(lambda: next(watch).completion_tokens == 3, "the news")
        server.stop()
        assert len(list(watch)) < 10


@pytest.mark.parametrize("seconds", [0, 0.01, 3601, -1])
def test_an_interval_that_cannot_be_is_named(client: ApiClient, seconds: float) -> None:
    with pytest.raises(RequestError) as refused:
        next(client.watch_load(seconds))
    assert isinstance(refused.value, InvalidRequest) and refused.value.field == "interval"


def test_several_inputs_are_embedded_in_order_and_the_one_at_fault_is_named(client: ApiClient) -> None:
    request = pb.EmbedRequest(inputs=[pb.Prompt(text="a"), pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2, 3]))])
    answer = raw_stub(client).Embed(request)
    assert [each.usage.prompt_tokens for each in answer.embeddings] == [len(client.tokenize("a")), 3]
    for index in range(2):
        alone = raw_stub(client).Embed(pb.EmbedRequest(inputs=[request.inputs[index]]))
        assert alone.embeddings[0].values == answer.embeddings[index].values
    request.inputs.add(token_ids=pb.TokenIds(ids=[512]))
    for wrong, field in ((request, "inputs[2].token_ids.ids[0]"), (pb.EmbedRequest(), "inputs")):
        with pytest.raises(grpc.RpcError) as refused:
            raw_stub(client).Embed(wrong)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT and blamed_fields(refused.value) == [field]


def test_a_pooling_that_the_server_does_not_know_is_refused(client: ApiClient) -> None:
    """A client of a later version would get vectors of another kind, and never know."""
    with pytest.raises(grpc.RpcError) as refused:
        raw_stub(client).Embed(pb.EmbedRequest(inputs=[pb.Prompt(text="a")], pooling=99))  # type: ignore[arg-type]
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT and blamed_fields(refused.value) == ["pooling"]


def test_a_cancel_ends_all_choices(client: ApiClient) -> None:
    """Those that nobody reads would go on to the end."""
    events = begin(client, request_id="many", n=4)
    assert client.cancel(["many"]) == ["many"]
    with pytest.raises(grpc.RpcError) as ended:
        list(events)
    assert ended.value.code() == grpc.StatusCode.CANCELLED
    wait_for(lambda: idle(client), "all choices to end")


def test_load_counts_what_happened(client: ApiClient) -> None:
    before = client.load()
    prompt = client.tokenize(PROMPT * 4)
    answers = [client.generate(prompt, max_tokens=20, ignore_eos=True, seed=s) for s in range(2)]
    after = client.load()
    assert after.prompt_tokens - before.prompt_tokens == 2 * len(prompt)
    assert after.completion_tokens - before.completion_tokens == 40
    cached = [answer.cached_prompt_tokens for answer in answers]
    assert after.cached_prompt_tokens - before.cached_prompt_tokens == sum(cached)
    assert 0 < cached[1] < len(prompt), "the second prompt was computed again"
    assert after.steps > before.steps
    assert after.pages_total == client.server_info().pages_total
    assert 0 < after.pages_cached <= after.pages_total
    assert after.running == after.waiting == after.pages_in_use == 0
    assert after.recompilations == before.recompilations, "a step was compiled while serving"
    assert not after.draining


def test_load_counts_what_runs_and_waits(client: ApiClient) -> None:
    streams = [begin(client) for _ in range(ENGINE.max_sequences)]
    waiting = [client.stream(PROMPT, max_tokens=LONG, ignore_eos=True) for _ in range(2)]
    for events in waiting:
        next(events)
    load = client.load()
    assert (load.running, load.waiting) == (ENGINE.max_sequences, 2)
    assert load.pages_in_use >= ENGINE.max_sequences
    for events in (*streams, *waiting):
        events.close()


def test_usage_and_timings_add_up(client: ApiClient) -> None:
    finished = collect(client.stream(PROMPT, max_tokens=30, ignore_eos=True)).finished
    times = finished.timings
    queue, first, total = (d.ToNanoseconds() for d in (times.queue, times.time_to_first_token, times.total))
    assert 0 <= queue <= first <= total and first > 0
    assert (finished.usage.completion_tokens, finished.usage.recomputed_tokens) == (30, 0)
    assert finished.usage.cached_prompt_tokens <= finished.usage.prompt_tokens
    assert times.preemptions == 0
