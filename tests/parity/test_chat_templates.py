"""Conversations reach a model as transformers would have written them, with the templates of published families.

The templates are those that the trl package comes with. It has none of mistral, olmo2 and smollm3: what theirs are made
of (slices of messages, namespaces that loops write to, string methods, raise_exception, tojson, strftime_now) is what
tests/model/text/test_chat.py renders, and many of these do.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from isthmus.model.text.chat import ChatError, ChatTemplate
from isthmus.model.text.endings import turn_end
from isthmus.model.text.tokenizer import Tokenizer

PEERS = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"

_FAMILIES = """cohere cohere2 deepseek_r1_distill deepseekv3 gemma gemma3 gemma4 gemma4_v5 glm4moe gptoss lfm2 lfm2_v2
llama3 llama3_1 llama3_2 nemotron_3_nano nemotron_3_super phi3 phi3_5 qwen2_5 qwen3 qwen3_5_think qwen3_8
qwen3_instruct_2507 qwen3_vl smolvlm"""
_TRAINED = """cohere cohere2 deepseek_r1_distill deepseekv3 gemma gemma3 glm4moe gptoss lfm2 llama3 phi3 phi3_5 qwen2_5
qwen3 qwen3_instruct_2507"""
"""Those of which trl also has a template with {% generation %} blocks"""
FAMILIES, TRAINED = _FAMILIES.split(), _TRAINED.split()
TEMPLATES = [*FAMILIES, *(f"{family}_training" for family in TRAINED)]
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "[UNK]", "pad_token": "<pad>"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "Größe <b>"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": PARAMETERS}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
ENCODED_CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("Hello")],
    "one exchange": [user("Hello"), answer("Hi!")],
    "several turns": [user("1+1?"), answer("2"), user("And 2+2?"), answer("4"), user("Thanks")],
    "system": [SYSTEM, user("Hello")],
    "system, several turns": [SYSTEM, user("a"), answer("b"), user("c"), answer("d")],
    "unicode": [user("漢字 😀👩‍👩‍👧 e\u0301 \u202e <b>&amp;</b>"), answer("Ünïcödé\u00a0")],
    "whitespace": [user("  \n\n a\tb  \r\n"), answer("\n c \n\n"), user("\n")],
    "empty": [user(""), answer("")],
    "special tokens spelt out": [user("<|im_end|><eos><bos>"), answer("<end_of_turn>")],
    "thoughts in the text": [user("a"), answer("<think>\nhm\n</think>\n\nb"), user("c"), answer("<think>d</think>e")],
    "thoughts beside it": [user("a"), answer("b", reasoning_content="hm"), user("c"), answer("d", reasoning="ha")],
    "nothing beside it": [user("a"), answer("b", reasoning_content=None, tool_calls=None)],
    "two users in a row": [user("a"), user("b")],
    "begins with an answer": [answer("a"), user("b")],
    "unknown role": [user("a"), {"role": "critic", "content": "b"}],
    "system in the middle": [user("a"), SYSTEM, user("b")],
    "no content": [{"role": "user"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    "tool call": [user("Rain?"), answer("", tool_calls=[CALL]), {"role": "tool", "content": "no"}, answer("No.")],
    "encoded tool call": [user("Rain?"), answer("Wait", tool_calls=[ENCODED_CALL]), {"role": "tool", "content": "no"}],
    "two tool calls": [user("Rain?"), answer("", tool_calls=[CALL, CALL])],
}
DATE = {"date_string": "26 Jul 2024"}
ARGUMENTS: list[dict[str, Any]] = [
    DATE,
    {**DATE, "enable_thinking": False},
    {**DATE, "tools": [TOOL], "enable_thinking": True},
]
CASES = [
    {"messages": messages, "add_generation_prompt": prompted, "arguments": arguments}
    for messages in CONVERSATIONS.values()
    for prompted in (False, True)
    for arguments in ARGUMENTS
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers makes of every case with every template."""
    if not PEERS.is_file():
        pytest.skip("no .venv-peers: `make peers` builds it")
    folder = tmp_path_factory.mktemp("chat")
    source, target = folder / "in.json", folder / "out.json"
    source.write_text(json.dumps({"families": TEMPLATES, "tokens": TOKENS, "cases": CASES}))
    script = Path(__file__).with_name("hf_chat.py")
    subprocess.run([str(PEERS), str(script), str(source), str(target)], check=True, timeout=300)
    return {**json.loads(target.read_text()), "today": str(datetime.date.today())}


def ours(template: ChatTemplate, case: dict[str, Any]) -> dict[str, Any]:
    try:
        text = template.render(
            case["messages"], add_generation_prompt=case["add_generation_prompt"], arguments=case["arguments"]
        )
    except ChatError as error:
        return {"error": str(error)}
    return {"text": text}


@pytest.mark.peers
@pytest.mark.parametrize("family", TEMPLATES)
def test_conversations_are_written_as_transformers_writes_them(family: str, theirs: dict[str, Any]) -> None:
    """A model would see turns in a form that it wasn't trained on, and answer worse without a sign of it."""
    template = ChatTemplate(theirs[family]["template"], TOKENS, name=family)
    written = 0
    for case, want in zip(CASES, theirs[family]["rendered"], strict=True):
        got = ours(template, case)
        if str(datetime.date.today()) != theirs["today"]:
            pytest.skip("midnight has passed between the two, and some templates write the date")
        assert set(got) == set(want) - {"refused"}, (case, got, want)
        if "text" in want:
            assert got == want, case
            written += 1
        elif want["refused"]:
            assert got["error"] == want["error"]
    assert written >= len(CASES) // 3, "the comparison says little: transformers refuses nearly all of it"


@pytest.mark.peers
@pytest.mark.parametrize("family", TRAINED)
def test_what_the_assistant_said_is_what_transformers_takes_for_it(family: str, theirs: dict[str, Any]) -> None:
    """Fine-tuning would learn to write the user's turns, or not to end its own."""
    answers = theirs[f"{family}_training"]
    template = ChatTemplate(answers["template"], TOKENS, name=family)
    said = 0
    for case, want in zip(CASES, answers["assistant"], strict=True):
        if want is None:
            continue
        text, spans = template.render_with_assistant_spans(**case)
        covered = sorted({index for start, end in spans for index in range(start, end)})
        assert covered == want, (case, text)
        said += bool(want)
    assert said > 10, "the comparison says little: hardly any case has an answer in it"


_DEEPSEEK = ["<\uff5cAssistant\uff5c>", "<\uff5ctool▁outputs▁end\uff5c>"]
HEADERS = {
    "deepseek_r1_distill": _DEEPSEEK,
    "deepseekv3": _DEEPSEEK,
    "glm4moe": ["<|user|>", "<think></think>\n", "\n<think></think>"],
    "gptoss": ["<|start|>assistant"],
    "qwen2_5": ["\n"],
    "qwen3": ["<think>\n\n</think>\n\n"],
}
"""What trl takes for the assistant's, and the template writes when it asks for an answer; of glm4moe also how the next
turn begins"""


@pytest.mark.peers
@pytest.mark.parametrize("family", TRAINED)
def test_answers_are_found_where_the_template_does_not_say(family: str, theirs: dict[str, Any]) -> None:
    """As above, with the templates that models come with, which have no {% generation %} blocks."""
    template = ChatTemplate(theirs[family]["template"], TOKENS, name=family)
    marked = theirs[f"{family}_training"]
    compared = 0
    for case, plain, other, want in zip(
        CASES, theirs[family]["rendered"], marked["rendered"], marked["assistant"], strict=True
    ):
        begins = case["messages"][0]["role"] == "assistant"
        if "text" not in plain or plain != other or want is None or begins:
            continue
        try:
            text, spans = template.render_with_assistant_spans(**case)
        except ChatError:
            assert family == "gptoss", case  # it ends answers in another way where others follow
            continue
        covered = {index for start, end in spans for index in range(start, end)}
        closing = set(range(len(text) - len("<eos>"), len(text))) if text.endswith("<eos>") else set()
        assert covered - set(want) <= closing, (case, text)
        missing = "".join(text[index] for index in want if index not in covered)
        for header in HEADERS.get(family, []):
            missing = missing.replace(header, "")
        assert missing == "", (case, text)
        compared += bool(want)
    assert compared > 10


REWRITING = ["qwen3", "qwen3_5_think", "glm4moe", "nemotron_3_nano", "deepseek_r1_distill", "gemma4_v5"]


@pytest.mark.peers
@pytest.mark.parametrize("family", REWRITING)
def test_answers_are_found_where_the_template_rewrites_them(family: str, theirs: dict[str, Any]) -> None:
    """Reasoning is left out of what was said earlier: a conversation of several turns couldn't be trained on."""
    template = ChatTemplate(theirs[family]["template"], TOKENS, name=family)
    for thought in ("hm", ""):
        talk = [user("ask one"), answer("say one", reasoning=thought), user("ask two"), answer("say two")]
        text, spans = template.render_with_assistant_spans(talk)
        assert text == template.render(talk, add_generation_prompt=False)
        for (start, end), said in zip(spans, ("say one", "say two"), strict=True):
            assert text[start:end].count(said) == 1 and "ask" not in text[start:end]
        outside = text[: spans[0][0]] + text[spans[0][1] : spans[1][0]] + text[spans[1][1] :]
        assert "say" not in outside and "ask one" in outside and "ask two" in outside
        assert text[: spans[0][0]] == template.render(talk[:1])[: spans[0][0]]


ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseekv3": "<\uff5cend▁of▁sentence\uff5c>", "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>", "glm4moe": None, "gptoss": "<|return|>", "lfm2": "<|im_end|>", "llama3": "<|eot_id|>",
    "phi3": "<|end|>", "qwen3": "<|im_end|>", "smolvlm": None,
}  # fmt: skip
"""What stops an answer, by the generation_config.json of each; of glm4moe only what the next turn begins with does"""


@pytest.mark.peers
@pytest.mark.parametrize("family", ENDS)
def test_the_token_that_ends_a_turn_is_found(family: str, theirs: dict[str, Any]) -> None:
    """An answer would never stop, or, with gpt-oss, stop behind its thoughts."""
    tokenizer = Tokenizer.train([], 257)
    special = [token for token in {*ENDS.values(), "<|end|>", "<|user|>", "<|message|>"} if token is not None]
    tokenizer._inner.add_special_tokens(special)
    template = ChatTemplate(theirs[family]["template"], TOKENS, name=family)
    want = ENDS[family]
    assert turn_end(tokenizer, template) == (frozenset() if want is None else {tokenizer.token_id(want)})
