"""A Jinja environment for templates that came with somebody's model: they can't get out of it, and they always end.

Jinja's own sandbox keeps a template away from Python's internals. This one also meters it: every iteration, call,
operator and filter is paid for. If the result can be much larger than the inputs, it is paid for before it runs. A
template may call only what is on a list, so that it can't reach anything that isn't paid for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Cycler, Joiner
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from isthmus.model.text.sandbox.meter import ITEM, STEP, current
from isthmus.model.text.sandbox.operations import (
    FUNCTIONS,
    PAID_FILTERS,
    PAID_TESTS,
    DictFunction,
    check_integers,
    method_cost,
    percent,
)

_METHOD = (MethodType, BuiltinMethodType)
_PASS_THROUGH = (Macro, LoopContext, BlockReference)
"""Callables that don't look at their arguments"""

# These functions are inserted into the template's code at places where Jinja doesn't ask the environment. A template
# can't spell their names, except through map(), where they do no harm.


def _each(items: Iterable[Any]) -> Iterator[Any]:
    return current().each(items)


def _concat(values: list[Any]) -> str:
    """The operator ~."""
    meter = current()
    meter.make(sum(meter.walk(value) for value in values))
    return "".join(map(str, values))


def _compared(value: Any) -> Any:
    meter = current()
    if isinstance(value, str):
        meter.spend(len(value) >> 4)
        return value
    value = meter.settled(value)
    meter.walk(value)
    return value


def _searched(value: Any) -> Any:
    """The right operand of `in`. Looking a key up in a mapping compares none of the mapping's values."""
    return value if isinstance(value, dict) else _compared(value)


def _sized(value: Any) -> Any:
    return current().made(value)


_INSERTED: dict[str, Callable[[Any], Any]] = {
    f" {function.__name__}": function for function in (_each, _concat, _compared, _searched, _sized)
}


def _through(function: Callable[[Any], Any], node: nodes.Expr) -> nodes.Expr:
    """The expression function(node)."""
    return nodes.Filter(node, f" {function.__name__}", [], [], None, None, lineno=node.lineno)


class _Insert(NodeTransformer):
    """Inserts the functions above into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through(_each, node.iter)  # type: ignore[arg-type,assignment]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(_concat, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._operand(_compared, node.expr)
        for operand in node.ops:
            operand.expr = self._operand(_searched if operand.op in ("in", "notin") else _compared, operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = self._operand(_compared, node.key)
        return node

    def _operand(self, function: Callable[[Any], Any], node: nodes.Expr) -> nodes.Expr:
        return node if isinstance(node, nodes.Const) else _through(function, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through(_sized, node) if isinstance(node.arg, nodes.Slice) else node

    def _literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        target = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if target or len(node.items) <= STEP // ITEM else _through(_sized, node)

    visit_List = visit_Tuple = visit_Dict = _literal


class Generation(Extension):
    """{% generation %} … {% endgeneration %}: marks what the assistant says. The meter keeps its place and text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    def _generated(self, caller: Macro) -> str:
        text = caller()
        meter = current()
        meter.generated.append((meter.written, text))
        return text


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        meter = current()
        meter.make(meter.walk(value) + sum(map(int, re.findall(r"\d+", format_spec))))
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        current().walk(value)
        return super().convert_field(value, conversion)


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """The formatter for a Markup string."""


class _Format:
    """The method format or format_map of one string, metered."""

    def __init__(self, environment: Sandbox, method: Any) -> None:
        self._environment, self._text, self._of_map = environment, method.__self__, method.__name__ == "format_map"

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._of_map:
            if kwargs or len(args) != 1:
                raise TypeError("format_map() takes exactly one argument")
            return self._format((), args[0])
        return self._format(args, kwargs)

    def _format(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        text = self._text
        if isinstance(text, Markup):
            return type(text)(_EscapeFormatter(self._environment, escape=text.escape).vformat(text, args, kwargs))
        return _Formatter(self._environment).vformat(text, args, kwargs)


_CALLABLE = (Macro, LoopContext, BlockReference, Joiner, Undefined, DictFunction, _Format)
_OWNERS = (LoopContext, Cycler, DictFunction, Generation)
"""Classes whose methods may all be called"""


@pass_context
def _printed(context: Context, value: Any) -> Any:
    """Pays for the text of {{ value }}."""
    meter = current()
    meter.make(len(value) if isinstance(value, str) else meter.walk(value))
    return value


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates, which must run inside `metered`. They may raise any Exception."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # the optimizer would evaluate constants with no meter running
            finalize=_printed,
            extensions=[Generation, loopcontrols],
        )
        self.globals = dict(FUNCTIONS)
        self.filters = {**PAID_FILTERS, **_INSERTED}
        self.tests = dict(PAID_TESTS)

    def prepare(self, source: str) -> nodes.Template:
        """The parsed template, to pass to from_string. Raises jinja2.TemplateSyntaxError."""
        return _Insert().visit(self.parse(source)).set_environment(self)

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """Joins what a macro or a block has written."""
        parts = list(parts)
        current().make(sum(map(len, parts)))
        return "".join(parts)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            current().walk(argument)  # it will be hashed
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if isinstance(value, _METHOD) and value.__name__ in ("format", "format_map"):
            return _Format(self, value) if isinstance(value.__self__, str) else None
        return None

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, _METHOD):
            return isinstance(obj.__self__, _OWNERS) or method_cost(obj) is not None
        return isinstance(obj, _CALLABLE) or not callable(obj) or any(obj is known for known in FUNCTIONS.values())

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = current()
        meter.spend(STEP + len(args) + len(kwargs))
        if not self.is_safe_callable(obj):
            raise SecurityError(f"a chat template may not call {getattr(obj, '__qualname__', type(obj).__name__)}")
        if isinstance(obj, LoopContext):
            args = tuple(map(_each, args))
        elif not isinstance(obj, _PASS_THROUGH):
            args = tuple(map(meter.settled, args))
            meter.walk((args, kwargs))
        if isinstance(obj, _METHOD) and (cost := method_cost(obj)) is not None:
            owner: Any = obj.__self__
            meter.spend(len(owner) >> 4)
            meter.spend(cost(owner, *args, **kwargs))
        return meter.made(context.call(obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = current()
        meter.spend(ITEM)
        if operator == "%" and isinstance(left, str):
            return percent(meter, left, right)
        if isinstance(left, int) and isinstance(right, int):
            check_integers(operator, left, right)
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    meter.spend(len(many) * times * (1 if isinstance(many, str) else ITEM))
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            meter.make(len(left) + len(right))
        return meter.made(super().call_binop(context, operator, left, right))
