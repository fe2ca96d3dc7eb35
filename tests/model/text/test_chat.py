"""Messages become the text that a template says, and no template does anything else."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import ConfigError
from isthmus.model.text.chat import ChatError, ChatTemplate
from isthmus.model.text.tokenizer import END_OF_TEXT, Tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|end|>' }}
{%- endfor %}
{{- '<|head|>assistant<|/head|>\\n\\n' if add_generation_prompt else '' }}
"""
TURNS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set opening = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception("Roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<turn>' ~ role ~ '\\n' ~ (opening if loop.first else '') ~ message['content'] ~ '</turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}
"""
CLOSED = """\
{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor -%}
{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}
"""
"""Ends a text that asks for no answer with a token of its own."""
TOOLS = """\
{%- if tools is not none %}
    {%- for tool in tools %}[tool {{ tool | tojson(indent=2) }}]{% endfor %}
{%- endif %}
{%- set state = namespace(last=-1, calls=[]) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set state.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set state.calls = state.calls + [call.function.name] %}
            {{- '(' + call.function.name + ' ' + call.function.arguments | tojson + ')' }}
        {%- endfor %}
    {%- elif loop.index0 > state.last and message.thinking %}
        {{- '{' + message.reasoning_content.strip('\\n') + '}' + message.content.split('</think>')[-1].lstrip() }}
    {%- else %}
        {{- message.role[0] + ':' + message.content }}
    {%- endif %}
    {%- if not loop.last %}{{ '|' }}{% endif %}
{%- endfor %}
{{- state.calls | join(',') }}
"""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "S"}
TALK = [user(" a "), answer("b"), user("c")]


def render(source: str, messages: Any = TALK, **options: Any) -> str:
    return ChatTemplate(source, TOKENS).render(messages, **options)


# What is written


@pytest.mark.parametrize(
    "source, messages, prompted, text",
    [
        (CHATML, TALK[:1], True, "<|im_start|>user\n a <|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, TALK[:1], False, "<|im_start|>user\n a <|im_end|>\n"),
        (HEADERS, TALK[:2], False, "<s><|head|>user<|/head|>\n\na<|end|><|head|>assistant<|/head|>\n\nb<|end|>"),
        (TURNS, [SYSTEM, *TALK[:2]], True, "<s><turn>user\nS\n\n a </turn>\n<turn>model\nb</turn>\n<turn>model\n"),
        (CLOSED, TALK[:1], False, "<|user|> a <|end|></s>"),
    ],
)
def test_a_conversation_is_written_as_its_template_says(
    source: str, messages: list[dict[str, Any]], prompted: bool, text: str
) -> None:
    """A space too many, and the model is asked in a form that it never saw."""
    assert render(source, messages, add_generation_prompt=prompted) == text


def test_tools_and_thoughts_reach_the_template() -> None:
    """A model that calls tools couldn't be told of them, or would see its old thoughts where it should see none."""
    call = {"function": {"name": "rain", "arguments": {"city": "Zürich <b>"}}}
    messages = [
        user("a"),
        answer("", tool_calls=[call, call]),
        answer("x</think> b", reasoning="\nhm\n"),
        answer("c", tool_calls=None),
    ]
    text = render(TOOLS, messages, arguments={"tools": [{"name": "rain", "é": 1}]})
    tool = '[tool {\n  "name": "rain",\n  "é": 1\n}]'
    assert text == tool + 'u:a|(rain {"city": "Zürich <b>"})(rain {"city": "Zürich <b>"})|{hm}b|a:crain,rain'
    assert render(TOOLS, [user("a")]) == "u:a", "tools that aren't given are none, not undefined"


def test_arguments_are_variables_of_the_template() -> None:
    """enable_thinking=False would change nothing."""
    source = "{{ bos_token }}{{ date }}{% if thinking is defined and thinking is false %}!{% endif %}{{ n + 1 }}"
    assert render(source, arguments={"thinking": False, "date": None, "n": 2, "bos_token": "^"}) == "^None!3"
    for name in ("messages", "add_generation_prompt"):
        with pytest.raises(ChatError, match=name):
            render(source, arguments={name: []})


def test_what_templates_use_of_jinja_is_there() -> None:
    """A published template would fail on the first request."""
    today = datetime.date.today()
    year = render("{{ strftime_now('%Y') }}")
    assert year in (str(today.year), str(datetime.date.today().year))
    for source, text in {
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}": "023",
        "{% macro m(x, y='-') %}{{ x ~ y }}{% endmacro %}{{ m('a') }}{{ m('b', y='c') }}": "a-bc",
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | map('trim') | join('+') }}": (
            "a+c"
        ),
        "{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.role[0] }}{{ loop.length }}{{ loop.last }} {% endfor %}": (
            "0u3False 1a3False 2u3True "
        ),
        "{% for k, v in {'b': 1, 'a': [2]} | dictsort %}{{ k }}{{ v }}{% endfor %}{{ {'x': 1}.items() | list }}": (
            "a[2]b1[('x', 1)]"
        ),
        "{{ 'a-%s-%03d' % ('b', 7) }} {{ '{:>4}|{x}'.format('r', x=1) }} {{ '%s' | format('f') }}": "a-b-007    r|1 f",
        "{{ ['b', 'a'] | sort }}{{ [1, 2] | sum }}{{ 'ab' in 'cabs' }}{{ 2 in [1] }}{{ 'role' in messages[0] }}": (
            "['a', 'b']3TrueFalseTrue"
        ),
        "{{ '<' | escape }}{{ {'a': '<'} | tojson | safe }}{{ none }}{{ nothing }}{{ 7 // 2 }}{{ 2 ** 3 }}": (
            '&lt;{"a": "<"}None38'
        ),
        "{% set x %}in{% endset %}{% filter upper %}{{ x }}{% endfilter %}{% call dup() %}y{% endcall %}"
        "{% macro dup() %}{% endmacro %}": None,
        "{% macro twice() %}{{ caller() * 2 }}{% endmacro %}{% call twice() %}y{% endcall %}": "yy",
        "{{ {'a': 1} | tojson(indent=2, separators=(',', ':')) }}{{ ['é'] | tojson(ensure_ascii=true) }}": (
            '{\n  "a":1\n}["\\u00e9"]'
        ),
        "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else '(' ~ loop(x) ~ ')' }}{% endfor %}": (
            "(1(2))(3)"
        ),
    }.items():
        if text is None:
            with pytest.raises(ChatError, match="'dup' is undefined"):
                render(source)
        else:
            assert render(source) == text


def test_threads_share_a_template() -> None:
    """The server renders on several threads at once: one's spans and limits would be another's."""
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    template = ChatTemplate(source)
    chats = [[answer(str(n) * n)] * n for n in range(1, 9)] * 20
    with ThreadPoolExecutor(8) as pool:
        for chat, (text, spans) in zip(chats, pool.map(template.render_with_assistant_spans, chats), strict=True):
            assert [text[start:end] for start, end in spans] == [message["content"] for message in chat]


# What is refused


@pytest.mark.parametrize(
    "messages, said",
    [
        ([], "must not be empty"),
        (["hello"], r"messages\[0\] must be a mapping with a role"),
        ([user("a"), {"content": "b"}], r"messages\[1\] must be a mapping with a role"),
        ([{"role": 3}], r"messages\[0\] must be"),
        ([{"role": "user", "content": object()}], r"messages\[0\].content is a object"),
        ([{"role": "user", "content": [{"a": {1}}]}], r"messages\[0\].content\[0\].a is a set"),
        ([{"role": "user", 1: ""}], "a key that is no string"),
    ],
)
def test_messages_that_are_none_are_named(messages: Any, said: str) -> None:
    """Which of a hundred messages is wrong would have to be guessed."""
    with pytest.raises(ChatError, match=said):
        render(CHATML, messages)


def test_a_message_of_itself_is_refused() -> None:
    """It would be copied for ever."""
    message = user("a")
    message["self"] = [message]
    with pytest.raises(ChatError, match="nested more than 64 deep"):
        render(CHATML, [message])


def test_a_template_refuses_in_its_own_words() -> None:
    """raise_exception is how a template tells what it doesn't take."""
    with pytest.raises(ChatError) as refused:
        render(TURNS, [user("a"), user("b")])
    assert str(refused.value) == "Roles must alternate user/assistant/user/assistant/..."


def test_an_error_names_the_line_of_the_template() -> None:
    """A template is long, and the one who sees the error didn't write it."""
    with pytest.raises(ChatError, match="line 3 of the chat template: 'tool' is undefined"):
        render("a\n\n{{ tool.name }}")
    with pytest.raises(ChatError, match="line 2 of the chat template: TypeError: can only concatenate str"):
        render("a\n{{ 'a' + 1 }}")
    with pytest.raises(ChatError, match="surrogates not allowed"):
        render(r"{{ '\ud800' }}")


@pytest.mark.parametrize("source", [CHATML, HEADERS, TURNS, CLOSED, TOOLS])
def test_long_conversations_are_within_the_limits(source: str) -> None:
    """A limit against abuse would refuse an honest conversation that fills a model's context."""
    short = [user("u" * 1000), answer("a" * 1000)] * 500
    long = [user("u" * 1_700_000), answer("a" * 1_700_000)]
    for messages in (short, long):
        assert len(render(source, messages)) > sum(len(message["content"]) for message in messages)


# Folders


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        path = folder / (name + (".jinja" if name == "chat_template" else ".json"))
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def load(folder: Path) -> ChatTemplate:
    template = ChatTemplate.load(folder)
    assert template is not None
    return template


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    """A base model must still load."""
    assert ChatTemplate.load(tmp_path) is None
    assert ChatTemplate.load(write(tmp_path, tokenizer_config={"bos_token": "<s>", "chat_template": None})) is None


def test_the_template_is_found_where_transformers_puts_it(tmp_path: Path) -> None:
    """A downloaded folder would not chat, or with another of its templates."""
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ bos_token }}"}]
    write(tmp_path, tokenizer_config={"chat_template": named, "bos_token": "<s>"})
    assert load(tmp_path).render(TALK) == "D<s>"
    token = {"__type": "AddedToken", "content": "<b>", "lstrip": False}
    write(tmp_path, tokenizer_config={"chat_template": "S{{ bos_token }}", "bos_token": token})
    assert load(tmp_path).render(TALK) == "S<b>"
    write(tmp_path, chat_template="Fé{{ bos_token }}")
    assert load(tmp_path).render(TALK) == "Fé<b>"


def test_special_tokens_come_from_both_files(tmp_path: Path) -> None:
    """An older folder names them only in special_tokens_map.json; a newer one's copy of it may be out of date."""
    source = "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}"
    write(tmp_path, chat_template=source, special_tokens_map={"eos_token": {"content": "</m>"}, "pad_token": None})
    assert load(tmp_path).render(TALK) == "</m>False"
    write(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    assert load(tmp_path).render(TALK) == "<s></m>False"
    write(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": {}})
    assert load(tmp_path).render(TALK) == "<s></s>False"


@pytest.mark.parametrize(
    "files, said",
    [
        ({"chat_template": "a\n{% for %}"}, r"chat_template.jinja, line 2: "),
        ({"chat_template": "a\n{% if x %}"}, r"chat_template.jinja, line 2: "),
        ({"chat_template": "a\n{{ y | pprint }}"}, r"chat_template.jinja, line 2: No filter named 'pprint'"),
        ({"chat_template": "{{" + "(" * 5000}, r"chat_template.jinja is no chat template"),
        ({"chat_template": "a" * 300_000}, r"chat_template.jinja has 300000 characters"),
        ({"tokenizer_config": {"chat_template": "{{"}}, r"tokenizer_config.json: chat_template, line 1"),
        ({"tokenizer_config": {"chat_template": {"a": 1}}}, r"tokenizer_config.json: chat_template must be"),
        ({"tokenizer_config": {"chat_template": [{"name": "x"}]}}, r"tokenizer_config.json: .*default"),
        ({"tokenizer_config": "{,}"}, r"tokenizer_config.json can't be read as JSON: .*line 1"),
        ({"tokenizer_config": "[]"}, r"tokenizer_config.json is not a JSON object"),
        ({"chat_template": "", "tokenizer_config": {"bos_token": 3}}, r"tokenizer_config.json: bos_token must be"),
        ({"chat_template": "", "special_tokens_map": {"eos_token": {}}}, r"special_tokens_map.json: eos_token"),
    ],
)
def test_a_malformed_file_is_named(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    """The server must say at start which file it can't use, not at the first request."""
    with pytest.raises(ConfigError, match=said):
        ChatTemplate.load(write(tmp_path, **files))


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    """As above."""
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template.jinja can't be read"):
        ChatTemplate.load(tmp_path)


def test_chat_needs_no_jax() -> None:
    """Data is prepared with it, in processes that must not take the accelerator."""
    code = "import sys; import isthmus.model.text.chat; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["False"], done.stderr


# Tokens


def test_special_tokens_of_a_template_are_special_and_those_of_a_prompt_are_text() -> None:
    """The model would see `<|endoftext|>` letter by letter, or a plain prompt could smuggle it in."""
    tokenizer = Tokenizer.train(["a b c"] * 9, 300)
    special = tokenizer._inner.token_to_id(END_OF_TEXT)
    ids = tokenizer.encode_chat(f"a{END_OF_TEXT}b")
    assert ids.count(special) == 1 and ids[0] != special, "nothing is put before what the template wrote"
    assert tokenizer.encode(f"a{END_OF_TEXT}b").count(special) == 1, "the one that leads every prompt"
    assert tokenizer.encode(f"a{END_OF_TEXT}b")[0] == special
