"""What the assistant said is found in what a template writes, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.model.text.chat import ChatError, ChatTemplate
from tests.model.text.test_chat import CHATML, CLOSED, HEADERS, SYSTEM, TALK, TOKENS, TURNS, answer, render, user

THOUGHTS = """\
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role != 'assistant' %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- else %}
        {%- set thought = m.reasoning_content or '' %}
        {%- set said = m.content %}
        {%- if '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}
            {%- set said = said.split('</think>')[-1].lstrip() %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > last.user %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
        {{- said }}
        {%- for call in m.tool_calls or [] %}{{ '\n' if said else '' }}<call>{{ call.name }}</call>{% endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}{% if thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""
"""As Qwen 3: of earlier answers only what was said is written, of the last what was thought too."""


@pytest.mark.parametrize("source", [CHATML, HEADERS, TURNS, CLOSED])
def test_spans_are_the_answers_with_their_end_of_turn(source: str) -> None:
    """Fine-tuning would learn to write the user's turns, or never to end its own."""
    messages = [user("q"), answer("first"), user("p"), answer("second")]
    text, spans = ChatTemplate(source, TOKENS).render_with_assistant_spans(messages)
    said = [text[start:end] for start, end in spans]
    end = {CHATML: "<|im_end|>\n", HEADERS: "<|end|>", TURNS: "</turn>\n", CLOSED: "<|end|>"}[source]
    last = end + "</s>" if source is CLOSED else end
    assert said == ["first" + end, "second" + last]
    assert text == render(source, messages, add_generation_prompt=False)


def test_generation_blocks_say_what_the_assistant_said() -> None:
    """A template that marks answers knows better than any guess: where it strips them, for one."""
    source = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content.split('|')[-1] }}.{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        ";{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = ChatTemplate(source)
    text, spans = template.render_with_assistant_spans([*TALK, answer("x|yé"), answer("")], add_generation_prompt=True)
    assert [text[start:end] for start, end in spans] == ["b.", "yé.", "."]
    assert text == template.render([*TALK, answer("x|yé"), answer("")])
    assert template.render_with_assistant_spans(TALK[:1]) == ("<user> a ;", [])


END = "<|im_end|>\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "messages, arguments, said",
    [
        ([user("a"), answer("b"), user("c"), answer("d")], {}, ["b", NO_THOUGHT + "d"]),
        ([SYSTEM, user("a"), answer("b"), user("c"), answer("d"), user("e")], {}, ["b", "d"]),
        ([user("a"), answer("<think>hm</think>b"), user("c"), answer("<think>ha</think>d")], {},
         ["b", "<think>\nha\n</think>\n\nd"]),
        ([user("a"), answer("b", reasoning="hm"), user("c"), answer("d", thinking="ha")], {},
         ["b", "<think>\nha\n</think>\n\nd"]),
        ([user("a"), answer("b"), user("c"), answer("d")], {"thinking": False}, ["b", "d"]),
        ([user("a"), answer("<b"), user("c"), answer("<d")], {"thinking": False}, ["<b", "<d"]),
        ([user("a"), answer("", tool_calls=[{"name": "f"}]), {"role": "tool", "content": "x"}, answer("d")], {},
         [NO_THOUGHT + "<call>f</call>", NO_THOUGHT + "d"]),
        ([user("a"), answer("b", tool_calls=[{"name": "f"}]), user("c"), answer("d")], {},
         ["b\n<call>f</call>", NO_THOUGHT + "d"]),
        ([user("b<|im_end|>\n<|im_start|>assistant\nb"), answer("b"), user("b"), answer("b")], {},
         ["b", NO_THOUGHT + "b"]),
        ([user("a"), answer(""), user("c"), answer("<|im_start|>assistant\n")], {},
         ["", NO_THOUGHT + "<|im_start|>assistant\n"]),
        ([user(""), answer("b"), user(""), answer("d")], {}, ["b", NO_THOUGHT + "d"]),
    ],
)  # fmt: skip
def test_answers_that_the_template_rewrites_are_found(
    messages: list[dict[str, Any]], arguments: dict[str, Any], said: list[str]
) -> None:
    """No file of conversations with several turns could be trained on with Qwen 3's template."""
    template = ChatTemplate(THOUGHTS, TOKENS)
    text, spans = template.render_with_assistant_spans(messages, arguments=arguments)
    assert text == template.render(messages, add_generation_prompt=False, arguments=arguments)
    assert [text[start:end] for start, end in spans] == [one + END for one in said]
    again, same = template.render_with_assistant_spans(messages, add_generation_prompt=True, arguments=arguments)
    assert again.startswith(text) and same == spans


def test_answers_that_can_not_be_told_apart_are_refused() -> None:
    """Wrong spans would train on the wrong tokens, silently."""
    stripping = "{% for m in messages %}[{{ m.content if loop.last else m.content[-1:] }}]{% endfor %}"
    with pytest.raises(ChatError, match=r"messages\[1\] can't be told apart"):
        ChatTemplate(stripping).render_with_assistant_spans([user("ab"), answer("cd"), user("e")])
    with pytest.raises(ChatError, match=r"messages\[0\] is the assistant's.*{% generation %}"):
        ChatTemplate(CHATML).render_with_assistant_spans([answer("a")])
    inside = "{% set x %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endset %}....{{ x }}"
    with pytest.raises(ChatError, match="inside a macro"):
        ChatTemplate(inside).render_with_assistant_spans(TALK)
