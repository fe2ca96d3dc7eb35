"""What a template may call: methods of its values, functions, filters and tests, and what each costs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError, pass_context, pass_eval_context
from jinja2.filters import FILTERS, do_join, make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import safe_range
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace

from isthmus.model.text.sandbox.meter import ITEM, MAX_INT_BITS, STEP, Meter, OverLimit, current

MAX_STRFTIME = 256
"""Most characters of a date format"""
MAX_PRECISION = 300
"""Most digits that the filter round may keep"""

Cost = Callable[..., int]
"""Units of work for a call with these arguments, in addition to those for its inputs and its result"""


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


# Methods


def _backwards(text: str, part: Any = None, *args: Any) -> int:
    """The cost of a search backwards, for which Python takes time in proportion to len(text) * len(part)."""
    return len(text) * len(part) >> 4 if isinstance(part, str) else 0


def _replaced(text: str, old: str, new: str, *args: Any, **kwargs: Any) -> int:
    return len(text) + text.count(old) * len(new)


def _padded(text: str, width: int, *args: Any) -> int:
    return width


def _expanded(text: str, tabsize: int = 8) -> int:
    return text.count("\t") * tabsize


def _joined(text: str, items: Any) -> int:
    return current().walk(items) + len(items) * len(text)


def _looked_up(items: Any, value: Any, *args: Any) -> int:
    return len(items) * current().walk(value)


_LINEAR = """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier
islower isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rstrip split
splitlines startswith strip swapcase title upper"""

METHODS: dict[type, dict[str, Cost]] = {
    str: {
        **dict.fromkeys(_LINEAR.split(), _nothing),
        **dict.fromkeys(("rfind", "rindex", "rpartition", "rsplit"), _backwards),
        **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
        "expandtabs": _expanded,
        "join": _joined,
        "replace": _replaced,
    },
    dict: dict.fromkeys(("copy", "get", "items", "keys", "values"), _nothing),
    list: {"copy": _nothing, "count": _looked_up, "index": _looked_up},
    tuple: {"count": _looked_up, "index": _looked_up},
}
"""The methods of values that a template may call, and their costs; the environment handles str.format and format_map"""


def method_cost(method: MethodType | BuiltinMethodType) -> Cost | None:
    """The cost of a method; None if a template may not call it."""
    for kind, methods in METHODS.items():
        if isinstance(method.__self__, kind):
            return methods.get(method.__name__)
    return None


# Operators

_CONVERSION = re.compile(r"%(\([^()]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")


def percent(meter: Meter, text: str, values: Any) -> str:
    """text % values. Every conversion is paid for as if it wrote all the values."""
    written = meter.walk(values)
    numbers = values if isinstance(values, tuple) else (values,)
    widest = sum(abs(number) for number in numbers if isinstance(number, int))
    total = len(text)
    for conversion in _CONVERSION.finditer(text):
        key, *sizes = conversion.groups()
        if key is None and text.startswith("(", conversion.start() + 1):
            raise TemplateRuntimeError("the key of a %-format may hold no parentheses")
        total += ITEM + written + sum(widest if size == "*" else int(size or 0) for size in sizes)
        meter.spend(ITEM)
    meter.make(total)
    return text % values


def check_integers(operator: str, left: int, right: int) -> None:
    """Raises OverLimit for integers whose result could be very long."""
    bits = max(left.bit_length(), right.bit_length())
    if operator == "**":
        bits = max(bits, left.bit_length() * abs(right))
    if bits > MAX_INT_BITS:
        raise OverLimit(f"it makes a number of more than {MAX_INT_BITS} bits")


# Functions


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > MAX_STRFTIME:
        raise OverLimit(f"strftime_now takes a format of at most {MAX_STRFTIME} characters")
    return datetime.now().strftime(format)


class SafeNamespace(Namespace):
    """A namespace that refuses names with a leading underscore, which Python itself might look up."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise TemplateRuntimeError(f"a namespace can't hold {name!r}: its names are strings without a leading _")
        super().__setitem__(name, value)


class DictFunction:
    """The function dict(), without access to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "range": safe_range,
    "dict": DictFunction(),
    "cycler": Cycler,
    "joiner": Joiner,
    "namespace": SafeNamespace,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}


# Filters and tests


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML. It is made in pieces, and each is paid for as it comes."""
    meter = current()
    meter.spend(indent if isinstance(indent, int) else 0)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(value):
        meter.spend(ITEM + len(piece))
        pieces.append(piece)
    meter.make(sum(map(len, pieces)))
    return "".join(pieces)


@pass_eval_context
def _join(eval_ctx: Any, value: Iterable[Any], d: Any = "", attribute: Any = None) -> Any:
    meter = current()
    items = list(meter.each(value))
    meter.make(meter.walk(items) + len(items) * meter.walk(d))
    return do_join(eval_ctx, items, d, attribute)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("format takes positional or keyword arguments, not both")
    meter = current()
    meter.walk(value)
    return percent(meter, str(value), kwargs or args)


@pass_context
def _sum(context: Context, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    meter = current()
    items = list(meter.each(iterable))
    if attribute is not None:
        items = list(map(make_attrgetter(context.environment, attribute), items))
    # sum() copies the lists that it has added so far for each further one.
    longest = sum(len(item) for item in [start, *items] if isinstance(item, (list, tuple)))
    meter.spend(ITEM * len(items) * longest)
    return sum(items, start)


def _indented(text: Any, width: int | str = 4, *args: Any, **kwargs: Any) -> int:
    return (len(str(text).splitlines()) + 1) * (width if isinstance(width, int) else len(width))


def _rounded(value: Any, precision: int = 0, *args: Any, **kwargs: Any) -> int:
    if abs(precision) > MAX_PRECISION:
        raise OverLimit(f"round takes a precision of at most {MAX_PRECISION}")
    return 0


_COSTS: dict[str, Cost] = {
    "batch": lambda value, linecount, fill_with=None: ITEM * linecount,
    "center": lambda value, width=80: width,
    "indent": _indented,
    "replace": lambda eval_ctx, text, old, new, count=None: _replaced(str(text), str(old), str(new)),
    "round": _rounded,
    "slice": lambda eval_ctx, value, slices, fill_with=None: ITEM * slices,
}
_SHALLOW = """attr batch count d default first format items join last length list map reject rejectattr reverse select
selectattr slice sum tojson"""
"""Filters that don't look inside the items they are given, or that pay for it themselves"""
_SHALLOW_TESTS = """boolean callable defined divisibleby escaped even false filter float integer iterable mapping none
number odd sameas sequence string test true undefined"""
_LEFT_OUT = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters that are slow or random, and of no use in a chat"""


def _paid(function: Callable[..., Any], shallow: bool, cost: Cost = _nothing) -> Callable[..., Any]:
    """`function`, a filter or test, made to pay for its arguments, for `cost` and for its result."""

    def given(meter: Meter, value: Any) -> Any:
        if shallow:
            meter.spend(len(value) >> 4 if isinstance(value, (str, list, tuple, dict)) else 0)
            return value
        value = meter.settled(value)
        meter.walk(value)
        return value

    @wraps(function)  # keeps Jinja's marks on the function, for example that it takes the context
    def paid(*args: Any, **kwargs: Any) -> Any:
        meter = current()
        meter.spend(STEP)
        args = tuple(given(meter, value) for value in args)
        kwargs = {name: given(meter, value) for name, value in kwargs.items()}
        meter.spend(cost(*args, **kwargs))
        return meter.made(function(*args, **kwargs))

    return paid


_FILTERS: Mapping[str, Any] = FILTERS
_TESTS: Mapping[str, Any] = TESTS
_OWN: dict[str, Callable[..., Any]] = {"format": _format, "join": _join, "sum": _sum, "tojson": _tojson}
PAID_FILTERS: dict[str, Callable[..., Any]] = {
    name: _paid(function, name in _SHALLOW.split(), _COSTS.get(name, _nothing))
    for name, function in {**_FILTERS, **_OWN}.items()
    if name not in _LEFT_OUT
}
PAID_TESTS = {name: _paid(function, name in _SHALLOW_TESTS.split()) for name, function in _TESTS.items()}
