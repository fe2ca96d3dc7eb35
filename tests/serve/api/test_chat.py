"""Messages over the wire: a conversation becomes the prompt that the model's own template writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus import generate_request
from isthmus.model.text.chat import ChatTemplate
from isthmus.model.text.tokenizer import END_OF_TEXT, Tokenizer
from isthmus.model.weights.folder import GenerationDefaults
from isthmus.serve.api.mapping import MAX_ARGUMENTS, question_of
from isthmus.serve.prepare.request import Preparation
from isthmus.types import MAX_MESSAGES
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import (
    NETWORK,
    PATIENCE,
    ApiClient,
    RunningServer,
    blamed_fields,
    collect,
    raw_stub,
    save_model,
    varied_params,
)

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import ünïcode"}]
TEXT = f"{END_OF_TEXT}system: Be brief.\n{END_OF_TEXT}user: import ünïcode\n"
ASKED = f"{END_OF_TEXT}assistant:"


@pytest.fixture
def chat(chat_server: RunningServer) -> Iterator[ApiClient]:
    with chat_server.client() as client:
        yield client


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Of a text in which END_OF_TEXT is that token."""
    special = tokenizer.encode("")
    parts = [tokenizer.encode(part)[len(special) :] for part in text.split(END_OF_TEXT)]
    assert len(special) == 1
    return [token for index, part in enumerate(parts) for token in ([*special, *part] if index else part)]


def test_messages_are_the_prompt_that_the_template_writes(chat: ApiClient, tokenizer: Tokenizer) -> None:
    """The model would be asked in another form than it was trained on."""
    prompt = ids(tokenizer, TEXT + ASKED)
    want = chat.generate(prompt, max_tokens=8, temperature=0.0, timeout=PATIENCE)
    got = chat.generate(TALK, max_tokens=8, temperature=0.0, timeout=PATIENCE)
    assert got.prompt_tokens == len(prompt)
    assert (got.text, got.token_ids, got.finish_reason) == (want.text, want.token_ids, want.finish_reason)
    streamed = collect(chat.stream(TALK, max_tokens=8, temperature=0.0, timeout=PATIENCE))
    assert streamed.text == want.text


def test_template_arguments_reach_the_template(chat: ApiClient, tokenizer: Tokenizer) -> None:
    """enable_thinking and tools would change nothing, and 3 be written as 3.0."""
    for value, text in (
        (True, "True"),
        (3, "3"),
        (0.5, "0.5"),
        (3.0, "3.0"),
        (10**20, "1" + "0" * 20),
        (None, "None"),
        ([1, {"a": [2, "b"]}], "[1, {'a': [2, 'b']}]"),
    ):
        got = chat.generate(TALK, template_arguments={"style": value}, max_tokens=1, timeout=PATIENCE)
        assert got.prompt_tokens == len(ids(tokenizer, f"{TEXT}{text}\n{ASKED}")), value


def test_a_tool_is_written_in_the_order_that_its_keys_were_given_in(tokenizer: Tokenizer) -> None:
    """A model sees the schema as text: each process of a client sent another prompt, and none had it cached."""
    schema = {name: {"type": "string", "é": [1.0, {"z": None, "a": True}]} for name in "qwertyuiopasdf"}
    chat = ChatTemplate("{{ tools | tojson }}")
    question = question_of(generate_request(TALK, template_arguments={"tools": [schema]}))
    prompt = Preparation(tokenizer, chat, GenerationDefaults(), 4096).prompt_ids(question.prompt)
    assert prompt == tokenizer.encode_chat(json.dumps([schema], ensure_ascii=False))


def test_a_special_token_in_a_text_is_one_when_asked_for(client: ApiClient, tokenizer: Tokenizer) -> None:
    """A conversation written out by hand became 28 tokens instead of 10, and garbage followed; and by default nobody's
    input may end a text."""
    text = f"a{END_OF_TEXT}b"
    start = tokenizer.encode("")
    want = [*tokenizer.encode("a"), *start, *tokenizer.encode("b")[1:]]
    assert client.tokenize(text, parse_special=True) == want
    assert client.tokenize(text) == tokenizer.encode(text) != want
    for parsed, ids in ((True, want), (False, tokenizer.encode(text))):
        got = client.generate(text, parse_special=parsed, max_tokens=4, temperature=0.0, timeout=PATIENCE)
        assert got.prompt_tokens == len(ids)
        assert got.text == client.generate(ids, max_tokens=4, temperature=0.0, timeout=PATIENCE).text
    with pytest.raises(grpc.RpcError) as refused:
        client.generate(want, parse_special=True, timeout=PATIENCE)
    assert blamed_fields(refused.value) == ["prompt.parse_special"]


def test_a_conversation_goes_on_from_the_cache(chat: ApiClient) -> None:
    """Every turn would compute the whole conversation again."""
    talk = [*TALK, {"role": "assistant", "content": "a b c " * 40}]
    chat.generate(talk, max_tokens=1, timeout=PATIENCE)
    again = chat.generate([*talk, {"role": "user", "content": "x"}], max_tokens=1, timeout=PATIENCE)
    assert again.cached_prompt_tokens > 0


def turn(role: str, content: str = "a") -> dict[str, str]:
    return {"role": role, "content": content}


Change = Callable[[Any], Any]
TURNS = "prompt.messages.messages"
ARGUMENTS = "prompt.messages.template_arguments_json"


def argue(text: str) -> Change:
    return lambda message: setattr(message.prompt.messages, "template_arguments_json", text)


@pytest.mark.parametrize(
    "change, field, said",
    [
        (lambda m: m.prompt.messages.ClearField("messages"), TURNS, f"1 to {MAX_MESSAGES}"),
        (
            lambda m: m.prompt.messages.messages.extend([m.prompt.messages.messages[0]] * MAX_MESSAGES),
            TURNS,
            "1 to",
        ),
        (
            lambda m: m.prompt.messages.messages.add(content="a"),
            f"{TURNS}[2].role",
            "must not be empty",
        ),
        (lambda m: m.prompt.messages.messages.add(role="critic"), "prompt.messages", "there are no critics here"),
        (argue('{"messages": 1}'), "prompt.messages", "'messages'"),
        (argue('{"style": "endless"}'), "prompt.messages", "chat template may"),
        (argue('{"style": 1'), ARGUMENTS, "is not JSON: Expecting ',' delimiter"),
        (argue("[1]"), ARGUMENTS, "must be a JSON object"),
        (argue('{"style": {"a": 1, "a": 2}}'), ARGUMENTS, "a key twice"),
        (argue('{"style": NaN}'), ARGUMENTS, "NaN is not a number"),
        (argue('{"style": ' + "9" * 5000 + "}"), ARGUMENTS, "is not JSON: Exceeds the limit"),
        (argue('{"style": ' + "[" * 100_000), ARGUMENTS, "nested too deep"),
        (argue('{"style": ' + "[" * 100 + "]" * 100 + "}"), "prompt.messages", "nested more than 64 deep"),
        (argue('{"style": "' + "a" * MAX_ARGUMENTS + '"}'), ARGUMENTS, f"at most {MAX_ARGUMENTS}"),
        (lambda m: setattr(m.prompt, "parse_special", True), "prompt.parse_special", "is for text"),
        (
            lambda m: m.prompt.messages.messages.add(role="user", content="a\n" * NETWORK.context_length),
            TURNS,
            f"context of {NETWORK.context_length}",
        ),
    ],
)
def test_what_is_wrong_with_messages_is_named(change: Change, field: str, said: str, chat: ApiClient) -> None:
    """A program couldn't tell which of its messages to mend."""
    message = generate_request(TALK)
    change(message)
    with pytest.raises(grpc.RpcError) as refused:
        raw_stub(chat).Generate(message, timeout=PATIENCE)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert blamed_fields(refused.value) == [field]
    assert said in refused.value.details()


def test_a_model_without_a_template_says_so(client: ApiClient) -> None:
    """A base model would be asked in some form that nobody chose."""
    with pytest.raises(grpc.RpcError) as refused:
        client.generate(TALK, timeout=PATIENCE)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert blamed_fields(refused.value) == ["prompt.messages"] and "no chat template" in refused.value.details()


def test_a_slow_template_holds_nobody_up(chat: ApiClient) -> None:
    """Every stream of the server would stand still while one request's template runs."""
    message = generate_request(TALK, template_arguments={"style": "endless"})
    slow = [raw_stub(chat).Generate.future(message, timeout=PATIENCE) for _ in range(4)]
    chat.load(timeout=PATIENCE)
    assert not any(call.done() for call in slow)
    assert {call.code() for call in slow} == {grpc.StatusCode.INVALID_ARGUMENT}


def test_the_client_names_what_it_can_not_send() -> None:
    """A misspelt key would be left out silently."""
    with pytest.raises(ValueError, match="contents"):
        generate_request([{"role": "user", "contents": "a"}])
    with pytest.raises(ValueError, match="template_arguments"):
        generate_request("a", template_arguments={"a": 1})
    for value in (object(), float("nan")):
        with pytest.raises(ValueError, match=r"template_arguments|JSON"):
            generate_request(TALK, template_arguments={"a": value})


def test_a_malformed_template_is_named_at_start(
    start_server: StartServer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The server would start, and fail on every chat."""
    from isthmus.errors import ConfigError

    folder = save_model(tmp_path / "broken", tokenizer, varied_params())
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja, line 1"):
        start_server(model=folder, load=False)
