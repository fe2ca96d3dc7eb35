"""Random JSON schemas, random texts that a constraint allows, and a tokenizer to spell them with."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np

from isthmus.model.text.tokenizer import Tokenizer
from isthmus.serve.engine.constraint import Constraint

NAMES = ("a", "b", "name", "a b", 'quo"te', "é", "id")
PATTERNS = ("^[a-c]{1,4}$", "^(x|yy)*$", r"^\d{3}-\d{2}$", "b+", r"^a.c$", r"^\w+@\w+$")


@cache
def small_tokenizer() -> Tokenizer:
    """Byte-level, with some tokens of several characters, as JSON has them."""
    texts = ['{"a": 1, "name": [true, false, null], "b": {"id": -12.5e3}}\n  "x": "yy"'] * 9
    return Tokenizer.train(texts, 290)


def allowed(constraint: Constraint, ids: int) -> np.ndarray:
    """The ids that may come next."""
    words = np.zeros(-(-ids // 32), np.int32)
    constraint.fill(words)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def walk(constraint: Constraint, tokenizer: Tokenizer, ids: int, rng: random.Random, most: int = 300) -> str | None:
    """The text that random tokens among those that may come make. None if it hasn't ended after `most` of them, from
    half of which on it ends where it can, and else takes the allowed token that most likely leads there."""
    drawn: list[int] = []
    while not constraint.done and len(drawn) < most:
        may = allowed(constraint, ids)
        ends = [index for index in may if index in tokenizer.eos_ids]
        if ends and (len(drawn) > most // 2 or rng.random() < 0.2):
            break
        rest = [int(index) for index in may if index not in tokenizer.eos_ids]
        if len(drawn) > most // 2:
            rest = [index for index in rest if tokenizer.decode([index]) in tuple('"}]')] or rest
        if not rest:
            break
        token = rng.choice(rest)
        constraint.accept(token)
        drawn.append(token)
    return None if len(drawn) >= most else tokenizer.decode(drawn)


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of what people ask for: nested objects and lists, enumerations, bounds, patterns, and unions."""
    makers = [_string, _string, _number, _integer, _enum, _scalar]
    if depth:
        makers += [_object, _object, _object, _array, _union]
    return rng.choice(makers)(rng, depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    extra = rng.random()
    if extra < 0.6:
        schema["additionalProperties"] = False
    elif extra < 0.8:
        schema["additionalProperties"] = random_schema(rng, 0)
    if extra > 0.9:
        schema["patternProperties"] = {"^a": {"type": "integer"}}
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array", "items": random_schema(rng, depth - 1)}
    if rng.random() < 0.5:
        schema["minItems"] = rng.randint(0, 3)
        schema["maxItems"] = schema["minItems"] + rng.randint(0, 3)
    if rng.random() < 0.2:
        schema["prefixItems"] = [random_schema(rng, 0), random_schema(rng, 0)]
    return schema


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if (kind := rng.random()) < 0.3:
        schema["pattern"] = rng.choice(PATTERNS)
    elif kind < 0.4:
        schema["format"] = rng.choice(("date-time", "uuid", "ipv4", "time", "email"))
    elif kind < 0.7:
        schema["minLength"] = rng.randint(0, 5)
        schema["maxLength"] = schema["minLength"] + rng.randint(0, 5)
    return schema


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.choice((-1000, -1.5, -0.001, 0, 0.25, 3, 1e-6, 123456.789))
    schema: dict[str, Any] = {"type": "number"}
    if rng.random() < 0.7:
        schema[rng.choice(("minimum", "exclusiveMinimum"))] = low
    if rng.random() < 0.7:
        schema[rng.choice(("maximum", "exclusiveMaximum"))] = low + rng.choice((0.001, 1, 17.25, 1e6))
    return schema


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.choice((-(2**40), -1000, -7, 0, 1, 99, 12345))
    schema: dict[str, Any] = {"type": "integer"}
    if rng.random() < 0.6:
        schema["minimum"] = low
    if rng.random() < 0.6:
        schema["maximum"] = low + rng.choice((0, 1, 25, 10**6))
    if not rng.randint(0, 5):
        schema = {"type": "integer", "multipleOf": rng.choice((2, 3, 10))}
    return schema


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    values = ["red", "gre\nen", 'b"lue', 7, -1.5, True, None, "漢", [1, "x"], {"k": 1}]
    if rng.random() < 0.3:
        return {"const": rng.choice(values)}
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _scalar(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(("boolean", "null", ["string", "null"], ["integer", "boolean"]))}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
