"""Conversations reach a model as transformers would have written them, with the templates of published families.

The templates are those that the trl package comes with. It has none of mistral, olmo2 and smollm3: what theirs are made
of (slices of messages, namespaces that loops write to, string methods, raise_exception, tojson, strftime_now) is what
tests/model/test_chat.py renders, and many of these do.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from model.chat import ChatError, ChatTemplate

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
