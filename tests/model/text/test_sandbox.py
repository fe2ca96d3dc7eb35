"""Whatever a downloaded template tries, rendering it ends soon, takes little, and reaches nothing."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.model.text.chat import ChatError, ChatTemplate
from isthmus.model.text.sandbox.meter import RenderLimits

TALK: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

DOUBLED = "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(64) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"  # noqa: E501
"""Two short lists of 2^64 numbers"""
PAIRED = "{% set n = namespace(a=(1,)) %}{% for i in range(64) %}{% set n.a = (n.a, n.a) %}{% endfor %}"
LONG = "('a' * 4000000)"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(99) %}{% for k in 'abcdefghij' %}{% endfor %}{% endfor %}{% endfor %}",  # noqa: E501
        "{% for i in range(100000) %}{% for j in range(100) %}abcdefghijklmnopq{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% for x in [1] recursive %}{{ loop(range(100000)) if loop.depth < 9 }}{% endfor %}",
        "{{ range(10 ** 9) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'a' }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 2 ** 1000000000 }}",
        "{{ ('f' * 4000000) | int(base=16) % 3 }}",
        "{% set n = namespace(a=3) %}{% for i in range(64) %}{% set n.a = n.a * n.a %}{% endfor %}",
        "{% set n = namespace(a='x') %}{% for i in range(64) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "{% set n = namespace(a='x') %}{% for i in range(64) %}{% set n.a = n.a + n.a %}{% endfor %}",
        "{% set n = namespace(a='x') %}{% for i in range(64) %}{% set n.a = '%s%s' % (n.a, n.a) %}{% endfor %}",
        "{% set n = namespace(a='x') %}{% for i in range(64) %}{% set n.a = [n.a, n.a] | join %}{% endfor %}",
        "{% set n = namespace(a='x') %}{% for i in range(64) %}{% set t %}{{ n.a }}{{ n.a }}{% endset %}{% set n.a = t %}{% endfor %}",  # noqa: E501
        "{% set n = namespace(a=[0]) %}{% for i in range(64) %}{% set n.a = n.a + n.a %}{% endfor %}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%.999999999f' % 1.5 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%(a)999999999d' % {'a': 1} }}",
        "{{ '%(a(b))999999999d' % {'a(b)': 1} }}",
        "{{ '%(' * 1000000 % {} }}",
        "{{ '%999999999s' | format('a') }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=999999999) }}",
        "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
        "{{ ('{:>999999999}' | escape).format(1) }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ 'a'.zfill(10 ** 9) }}",
        "{{ 'a\t'.expandtabs(10 ** 9) }}",
        "{{ 'a\nb' | indent(10 ** 9) }}",
        "{{ [[1]] | tojson(indent=10 ** 9) }}",
        "{{ [1] | batch(10 ** 9, 0) | list }}",
        "{{ [1] | slice(10 ** 9) | list }}",
        "{{ 5 | round(10 ** 9) }}",
        f"{{{{ {LONG} | replace('a', {LONG}) }}}}",
        f"{{{{ {LONG}.replace('a', {LONG}) }}}}",
        f"{{{{ range(100000) | join({LONG}) }}}}",
        f"{{{{ {LONG}.join(range(100000) | map('string')) }}}}",
        f"{{{{ {LONG}.rfind('b' + 'a' * 2000000) }}}}",
        f"{{{{ ({LONG} + 'b').join(['', '']).rsplit('b' + 'a' * 2000000) }}}}",
        f"{{{{ ({LONG} ~ 'b') }}}}{{{{ {LONG} }}}}",
        f"{{% for i in range(100000) %}}{{% if 'b' in {LONG} %}}{{% endif %}}{{% endfor %}}",
        "{{ range(100000) | map('center', 4000000) | list | length }}",
        "{% set x = range(100000) | list %}{% set n = namespace(a=[]) %}{% for i in x %}{% set n.a = [n.a, x[:]] %}{% endfor %}",  # noqa: E501
        "{{ [range(100000) | list] * 100000 | sum(start=[]) }}",
        DOUBLED + "{{ n.a }}",
        DOUBLED + "{{ n.a ~ '' }}",
        DOUBLED + "{{ n.a | tojson }}",
        DOUBLED + "{{ n.a | string | length }}",
        DOUBLED + "{{ '%s' % n.a }}",
        DOUBLED + "{{ '{}'.format(n.a) }}",
        DOUBLED + "{{ n.a == n.b }}",
        DOUBLED + "{{ n.a is eq(n.b) }}",
        DOUBLED + "{{ n.a in [n.b] }}",
        DOUBLED + "{{ [n.b].count(n.a) }}",
        DOUBLED + "{{ [n.a, n.b] | map('list') | sort }}",
        DOUBLED + "{{ [n.a, n.b] | select('eq', n.b) | list }}",
        PAIRED + "{{ {}[n.a] }}",
        PAIRED + "{{ {n.a: 1} }}",
        PAIRED + "{{ dict([(n.a, 1)]) }}",
        PAIRED + "{{ n.a in {} }}",
        PAIRED + "{{ [n.a, 1] | unique | list }}",
        "{% set n = namespace() %}{% set n.a = n %}{{ n }}",
    ],
)
def test_no_template_takes_the_machine(source: str) -> None:
    """A downloaded template would stop the server: all its memory, or a thread that holds every other one up."""
    template = ChatTemplate(source, limits=RenderLimits(seconds=0.25))
    with pytest.raises(ChatError):
        template.render(TALK)


def test_limits_are_said() -> None:
    """Whoever meets one must learn that it is the template's, and how large it is."""
    loop = "{% for i in range(100) %}{{ 'abcdefgh' }}{% endfor %}"
    for limits, said in (
        (RenderLimits(output=799), "it makes a text of more than 799 characters"),
        (RenderLimits(work=99), "it takes more work than the 99 units"),
        (RenderLimits(seconds=0), "it takes longer than the 0 s"),
    ):
        with pytest.raises(ChatError, match=said):
            ChatTemplate(loop, limits=limits).render(TALK)
    assert len(ChatTemplate(loop, limits=RenderLimits(output=800)).render(TALK)) == 800


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
        "{{ ('{0.__class__.__mro__}'|escape).format('') }}",
        "{{ (''|attr('format_map'))({'a': 1}).__class__.x }}",
        "{{ ['{0.__class__.__mro__}'] | map('format', '') | first }}{{ ''.format.__self__.x }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ joiner.__init__.__globals__.os }}",
        "{{ namespace.__init__.__globals__.os }}",
        "{{ dict.__init__.__globals__.os }}",
        "{{ range.__globals__.os }}",
        "{{ self.__init__.__globals__.os }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ loop.__init__.x }}",
        "{% for i in [1] %}{{ loop._recurse.x }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
        "{% macro m() %}{{ caller._environment.x }}{% endmacro %}{% call m() %}{% endcall %}",
        "{{ ([1] | map('string')).gi_frame.f_back }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n.__html__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[0].pop('role') }}",
        "{{ messages | attr('clear') }}{{ messages.clear() }}",
        "{{ (1).to_bytes(10 ** 9, 'big') }}",
        "{{ 'a'.encode('idna') }}",
        "{{ 'a'.translate({}) }}",
        "{{ {}.fromkeys([1]) }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{% include 'x' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends 'x' %}",
    ],
)
def test_no_template_reaches_python(source: str) -> None:
    """A downloaded template would run code of its author's choice."""
    messages = [dict(message) for message in TALK]
    with pytest.raises(ChatError):
        ChatTemplate(source).render(messages)
    assert messages == TALK


def test_values_have_no_methods_of_their_own() -> None:
    """A caller may hand over an object whose methods do something: a template must not get at it."""

    class Loud(str):
        def shout(self) -> str:
            raise AssertionError("called")

    messages = [{"role": "user", "content": Loud("a")}]
    assert ChatTemplate("{{ messages[0].content.shout }}").render(messages) == ""
