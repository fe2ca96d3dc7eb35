"""Which JSON schemas are taken: those whose every keyword llguidance keeps. It ignores keywords that it doesn't know,
and reads some otherwise than the specification (draft 2020-12) does; those are refused here by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from isthmus.errors import InvalidRequest

MAX_SCHEMA = 128 << 10
"""Most bytes of a schema's text. llguidance follows references on the stack, so the text must be short enough for it"""
MOST = 1_000_000
"""The largest number of characters, items or properties that a schema may count to"""
EXACT = 1 << 53
"""Whole numbers up to here are exact as float64, in which llguidance keeps them"""
MAX_MULTIPLE = 10_000
"""The largest multipleOf; llguidance needs as many states, and multiplies two in 32 bits"""
MAX_PROPERTIES = 500
"""Most properties of an object; the time to compile it grows with their square"""

MAX_PATTERNS = 16
"""Most patternProperties of an object, of which each pair is compared"""

_ANNOTATIONS = frozenset(
    [
        "$comment",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "contentMediaType",
        "contentEncoding",
        "discriminator",
    ]
)
_VALUES = frozenset(["type", "enum", "const", "format", "pattern", "required", "multipleOf", "$ref"])
_COUNTS = frozenset(["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"])
_NUMBERS = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
_SCHEMAS = frozenset(["items", "additionalProperties"])
_LISTS = frozenset(["anyOf", "oneOf", "allOf", "prefixItems"])
_MAPS = frozenset(["properties", "patternProperties", "$defs", "definitions"])
_HONOURED = _ANNOTATIONS | _VALUES | _COUNTS | _NUMBERS | _SCHEMAS | _LISTS | _MAPS
_AT_ROOT = frozenset(["$schema", "$id"])
"""What says nothing at the root, and changes the meaning of others further in"""
_INSTEAD = {
    "additionalItems": "use prefixItems and items, as in draft 2020-12",
    "nullable": 'JSON Schema has no such keyword: use "type": ["string", "null"] or anyOf',
}
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Values of `format` that are kept; those that aren't would be refused or ignored"""


def checked(text: str) -> str:
    """The schema as it is compiled. Raises InvalidRequest, naming the keyword and where it stands."""
    if (size := len(text.encode())) > MAX_SCHEMA:
        raise InvalidRequest("schema", f"has {size} bytes; at most {MAX_SCHEMA}")
    root = _parsed(text)
    if not isinstance(root, dict):
        raise InvalidRequest("schema", "must be a JSON object")
    for name in _AT_ROOT & root.keys():  # an older draft's name would make llguidance ignore prefixItems
        del root[name]
    todo: list[tuple[Any, str]] = [(root, "#")]
    seen: set[int] = set()
    while todo:
        schema, where = todo.pop()
        if isinstance(schema, bool) or id(schema) in seen:
            continue
        if not isinstance(schema, dict):
            raise _refused(where, "must be a schema: an object, true or false")
        seen.add(id(schema))
        _check_keywords(schema, where, root)
        todo += _inside(schema, where, root)
    return json.dumps(root)


def _refused(where: str, message: str) -> InvalidRequest:
    return InvalidRequest("schema", f"at {where[:200]}: {message}")


def _parsed(text: str) -> Any:
    def finite(name: str) -> None:
        raise ValueError(f"{name} is not a number in JSON")

    try:
        return json.loads(text, parse_constant=finite)
    except RecursionError:
        raise InvalidRequest("schema", "is nested too deep") from None
    except ValueError as error:
        raise InvalidRequest("schema", f"is not JSON: {error}") from None


def _check_keywords(schema: dict[str, Any], where: str, root: dict[str, Any]) -> None:
    """Checks a schema without those inside it. Removes what says nothing, for which llguidance would refuse it."""
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    for keyword, value in schema.items():
        if keyword not in _HONOURED:
            instead = _INSTEAD.get(keyword, "it is not supported, and ignoring it would give other texts than it says")
            raise _refused(where, f"{keyword!r:.80}: {instead}")
        if (check := _CHECKS.get(keyword)) and (wrong := check(value)):
            raise _refused(where, f"{keyword!r}: {wrong}")
    if (missing := schema.get("minProperties", 0) - len(schema.get("required", ()))) > 1:
        raise _refused(where, f"'minProperties': {missing} more than are required; a name may come twice, so at most 1")
    if _too_narrow(schema):
        raise _refused(where, "a whole number as exclusive bound can't be kept within 1 of the other: include it")
    if "pattern" in schema:
        schema["pattern"] = _kept_pattern(schema["pattern"], where)
    if "patternProperties" in schema:
        named = schema["patternProperties"]
        schema["patternProperties"] = {_kept_pattern(name, where): named[name] for name in named}
    if isinstance(options := schema.get("oneOf"), list) and "anyOf" not in schema and _exclusive(options, root):
        schema["anyOf"] = schema.pop("oneOf")


_CONTROL = re.compile(r"\\x[01][0-9a-fA-F]|\\u00[01][0-9a-fA-F]|\\[xu]\{0*[01]?[0-9a-fA-F]\}|[\x00-\x1f]")
_PARTS = re.compile(r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[xu]\{[^}]*\}|\\.|\[\^?\]?|\]|.", re.DOTALL)


def _kept_pattern(pattern: str, where: str) -> str:
    """The pattern as llguidance keeps it. In JSON it writes a class of characters that has backspace and form feed with
    every escape that there is, those of quote and backslash included, whether or not the class has these two. So they
    are taken out of classes that exclude characters, and classes with a range of control characters are refused."""
    made, inside = [], ""
    for part in _PARTS.findall(pattern):
        if part.startswith("["):
            inside = "excluding" if part.startswith("[^") else inside or "naming"
            made.append(part.replace("[^", r"[^\x08\x0c").replace("]", r"\]"))
            continue
        if inside == "naming" and _CONTROL.fullmatch(part):
            raise _refused(where, f"'pattern': {pattern!r:.80} has control characters in [ ]: write them one by one")
        inside = "" if part == "]" else inside
        made.append(part)
    return "".join(made)


def _count(value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number and 0 <= value <= MOST and value == int(value) else f"must be a whole number up to {MOST}"


def _number(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number"
    return None if abs(value) <= EXACT else "must be within ±2^53"


def _multiple(value: Any) -> str | None:
    return _number(value) or (None if 0 < value <= MAX_MULTIPLE else f"must be above 0, and at most {MAX_MULTIPLE}")


def _too_narrow(schema: dict[str, Any]) -> bool:
    """Whether it excludes a whole number that another bound is within 1 of: llguidance lets that number through."""
    if schema.get("type") == "integer":
        return False
    sides = (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    for (_, excluded), others in (sides, sides[::-1]):
        bound = schema.get(excluded, 0.5)
        if bound == int(bound) and any(abs(schema.get(name, math.inf) - bound) < 1 for name in others):
            return True
    return False


def _values(value: Any) -> str | None:
    """What is wrong with a value that a text may have."""
    todo = [value]
    while todo:
        match todo.pop():
            case bool() | None | str():
                pass
            case int() | float() as number if abs(number) > EXACT:
                return f"the number {number!r:.40} must be within ±2^53"
            case list() as items:
                todo += items
            case dict() as members:
                todo += members.values()
    return None


def _options(value: Any) -> str | None:
    return _values(value) if isinstance(value, list) and value else "must be a list of at least one value"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "must be a string"


def _format(value: Any) -> str | None:
    return None if value in FORMATS else f"must be one of {', '.join(FORMATS)}, not {value!r:.80}"


def _reference(value: Any) -> str | None:
    plain = isinstance(value, str) and (value == "#" or (value.startswith("#/") and value != "#/"))
    if not plain or "~" in value or "%" in value:
        return f"must be a path in this schema, such as #/$defs/item, without escapes, not {value!r:.80}"
    return None


def _names(value: Any) -> str | None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return "must be a list of strings"
    return None if len(value) <= MAX_PROPERTIES else f"has {len(value)} names; at most {MAX_PROPERTIES}"


def _few(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "must be an object"
    return None if len(value) <= MAX_PROPERTIES else f"has {len(value)} properties; at most {MAX_PROPERTIES}"


def _patterns(value: Any) -> str | None:
    if isinstance(value, dict) and len(value) > MAX_PATTERNS:
        return f"has {len(value)} patterns; at most {MAX_PATTERNS}"
    return None


_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    **dict.fromkeys(_COUNTS, _count),
    **dict.fromkeys(_NUMBERS, _number),
    "multipleOf": _multiple,
    "const": _values,
    "enum": _options,
    "pattern": _text,
    "format": _format,
    "$ref": _reference,
    "required": _names,
    "properties": _few,
    "patternProperties": _patterns,
}


def _inside(schema: dict[str, Any], where: str, root: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """The schemas in a schema, and the one that it refers to, each with its path."""
    for keyword, value in schema.items():
        path = f"{where}/{keyword}"
        if keyword == "$ref":
            yield _target(value, where, root), value
        elif keyword in _SCHEMAS:
            yield value, path
        elif keyword in _LISTS:
            if not isinstance(value, list) or not value:
                raise _refused(where, f"{keyword!r}: must be a list of schemas")
            yield from ((each, f"{path}/{index}") for index, each in enumerate(value))
        elif keyword in _MAPS:
            if not isinstance(value, dict):
                raise _refused(where, f"{keyword!r}: must be an object of schemas")
            yield from ((each, f"{path}/{name}") for name, each in value.items())


def _target(reference: str, where: str, root: dict[str, Any]) -> Any:
    """What a reference that is well formed leads to. Raises InvalidRequest if that is nothing."""
    found: Any = root
    for part in reference[2:].split("/") if reference != "#" else ():
        if isinstance(found, list) and part.isdecimal() and len(part) < 8 and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, dict) and part in found:
            found = found[part]
        else:
            raise _refused(where, f"'$ref': {reference[:80]!r} leads nowhere")
    return found


# oneOf


def _exclusive(options: list[Any], root: dict[str, Any]) -> bool:
    """Whether at most one of the schemas can fit, because a property that all of them require has another constant in
    each. Then oneOf, which llguidance mostly can't keep, is anyOf. Pydantic's discriminated unions are so."""
    tags = [_tags(option, root) for option in options]
    shared = set.intersection(*(set(each) for each in tags)) if tags else set()
    return any(_apart([each[name] for each in tags]) for name in shared)


def _tags(option: Any, root: dict[str, Any]) -> dict[str, list[str]]:
    """The properties that a schema requires and that can only be one of some strings; and these."""
    if isinstance(option, dict) and option.keys() == {"$ref"} and _reference(option["$ref"]) is None:
        option = _target(option["$ref"], "#", root)
    if not isinstance(option, dict) or option.get("type") != "object" or not isinstance(option.get("properties"), dict):
        return {}
    required = option.get("required")
    found = {}
    for name, schema in option["properties"].items():
        if isinstance(required, list) and name in required and isinstance(schema, dict):
            values = [schema["const"]] if "const" in schema else schema.get("enum")
            if isinstance(values, list) and all(isinstance(value, str) for value in values):
                found[name] = values
    return found


def _apart(sets: list[list[str]]) -> bool:
    every = [value for each in sets for value in set(each)]
    return len(set(every)) == len(every)
