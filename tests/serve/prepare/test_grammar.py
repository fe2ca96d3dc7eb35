"""What a user asks of a text is what comes out of any model, token by token; and what can't be had is refused by name,
before it costs anybody else anything."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer as Inner

from isthmus.errors import InvalidRequest
from isthmus.forms import Choices, Grammar, JsonObject, JsonSchema, Regex, ResponseFormat
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.serve.engine.constraint import Constraint, ConstraintError
from isthmus.serve.prepare.grammar import Grammars, Limits
from isthmus.types import SamplingParams
from tests.model.text import tokenizers
from tests.serve.prepare.schemas import allowed, random_schema, small_tokenizer, walk

PADDING = 6
TOKENIZER = small_tokenizer()
IDS = TOKENIZER.vocab_size + PADDING
GRAMMARS = Grammars(TOKENIZER, IDS)


def texts(asked: ResponseFormat, count: int = 8) -> list[str]:
    """Texts that random tokens make, of those that came to an end."""
    constraint = GRAMMARS.constraint(asked)
    found = [walk(constraint.copy(), TOKENIZER, IDS, random.Random(seed)) for seed in range(count)]
    return [text for text in found if text is not None]


def check_schemas(seeds: range) -> None:
    valid = 0
    for seed in seeds:
        dice = random.Random(seed)
        schema = random_schema(dice)
        try:
            constraint = GRAMMARS.constraint(JsonSchema(schema))
        except InvalidRequest as refused:
            assert "Unsatisfiable" in refused.message or "exclusive bound" in refused.message, (seed, refused)
            continue
        for _ in range(2):
            text = walk(constraint.copy(), TOKENIZER, IDS, dice)
            if text is not None:
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
                valid += 1
    assert valid > len(seeds)  # of twice as many


def test_random_tokens_make_what_a_schema_allows() -> None:
    """A model that is asked for a schema gives what the program behind it can't read, and it is the model's fault."""
    check_schemas(range(50))


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", [50, *(pytest.param(start, marks=pytest.mark.long) for start in range(550, 10_050, 500))]
)
def test_random_tokens_make_what_any_schema_allows(start: int) -> None:
    check_schemas(range(start, start + 500))


def test_any_object() -> None:
    found = texts(JsonObject())
    assert found and all(isinstance(json.loads(text), dict) for text in found)


def test_whitespace_ends() -> None:
    """A model that likes line breaks would draw them until max_tokens, and the answer never come."""
    constraint = GRAMMARS.constraint(JsonSchema({"type": "object", "required": ["a"]}))
    for character in "{\n" + 20 * " ":
        constraint.accept(TOKENIZER.encode_part(character)[0])
    assert "".join(sorted({TOKENIZER.decode([index])[:1] for index in allowed(constraint, IDS)})) == '"'


def test_properties_come_in_the_order_of_the_schema() -> None:
    """A schema that lets the model think before it answers lets it answer first."""
    names = ["why", "answer", "b", "a"]
    schema = {"type": "object", "properties": {name: {"type": "boolean"} for name in names}, "required": names}
    for form in (schema, json.dumps(schema)):
        assert all(list(json.loads(text))[:4] == names for text in texts(JsonSchema(form)))


def test_a_class_that_knows_its_schema() -> None:
    """Whoever has a pydantic model would have to write its schema out."""

    class Person:
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return {"const": "me"}

    assert set(texts(JsonSchema(Person))) == {'"me"'}


def test_choices() -> None:
    """A text that begins another one is never given, or never goes on; characters of a grammar are none in a choice."""
    given = ["yes", "yes!", 'a "|" b', "漢\n/", "no"]
    assert set(texts(Choices(given), 150)) == set(given)


def test_a_regular_expression_fits_the_whole_text() -> None:
    found = texts(Regex(r'[a-f]{2,3}/(x|\d)"?'))
    assert found and all(re.fullmatch(r'[a-f]{2,3}/(x|\d)"?', text) for text in found)


def test_a_lark_grammar() -> None:
    lark = 'start: list # <a comment>\nlist: "(" (item ("," item)*)? ")"\nitem: /[a-c]<?/ | list'
    for text in texts(Grammar(lark), 20):
        while (shorter := re.sub(r"\((([a-c]<?|L)(,([a-c]<?|L))*)?\)", "L", text)) != text:
            text = shorter
        assert text == "L"


def test_a_union_that_is_told_apart_by_a_constant() -> None:
    """Pydantic's discriminated unions, which are written as oneOf, are refused."""
    kinds = {
        name: {"type": "object", "properties": {"kind": {"const": name}, name: {"type": "null"}}, "required": ["kind"]}
        for name in ("cat", "dog")
    }
    one_of = {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "$defs": kinds}
    found = [json.loads(text)["kind"] for text in texts(JsonSchema(one_of), 20)]
    assert set(found) == {"cat", "dog"}


REFUSED: list[tuple[Any, str]] = [
    ({"type": "string", "format": "regex"}, "'format'"),
    ({"type": "string", "format": "unknown"}, "'format'"),
    ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "use anyOf"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    ({"type": "array", "contains": {}}, "'contains'"),
    ({"items": [{}], "additionalItems": False}, "'additionalItems'"),
    ({"properties": {"a": {"not": {}}}}, "at #/properties/a: 'not'"),
    ({"if": {}, "then": {}}, "'if'"),
    ({"dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
    ({"propertyNames": {}}, "'propertyNames'"),
    ({"type": "object", "unevaluatedProperties": False}, "'unevaluatedProperties'"),
    ({"type": "string", "nullable": True}, "'nullable'"),
    ({"type": "string", "maxlength": 3}, "'maxlength'"),
    ({"type": "string", "x-guidance": {"lenient": True}}, "'x-guidance'"),
    ({"type": "object", "minProperties": 3}, "'minProperties'"),
    ({"$ref": "https://example.com/schema"}, r"'\$ref'"),
    ({"$ref": "#/$defs/none"}, r"'\$ref'"),
    ({"$ref": "#/examples/0", "examples": [{"not": {}}]}, "'not'"),
    ({"$ref": "#"}, "no text fits"),
    ({"const": 2**53 + 1}, "'const'"),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "exclusive bound"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "object", "patternProperties": {"^a": {}, "b$": {}}}, "not disjoint"),
    ([], "must be a JSON object"),
    ("{", "is not JSON"),
    ('{"minimum": NaN}', "NaN"),
    ("[" * 100_000, "nested"),
    ({"properties": {"a": 1}}, "at #/properties/a: must be a schema"),
]


@pytest.mark.parametrize("schema, reason", REFUSED)
def test_a_schema_that_would_not_be_kept_is_refused_by_its_keyword(schema: Any, reason: str) -> None:
    """The keyword is ignored, and the answer is checked nowhere."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(InvalidRequest, match=reason) as refused:
        GRAMMARS.constraint(JsonSchema(text))
    assert refused.value.field == "schema"


def nested(levels: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(levels - 1)} if levels else {"type": "null"}


def chain(unit: Callable[[str], dict[str, Any]], size: int = 130_000) -> str:
    """A schema of so many bytes whose every definition refers to the next."""
    count = size // len(f'"d9999":{json.dumps(unit("#/$defs/d9999"), separators=(",", ":"))},')
    found: dict[str, Any] = {f"d{index}": unit(f"#/$defs/d{index + 1}") for index in range(count)}
    return json.dumps({"$defs": {**found, f"d{count}": {}}, "$ref": "#/$defs/d0"}, separators=(",", ":"))


EXPLOSIVE: list[ResponseFormat] = [
    JsonSchema(nested(200)),
    JsonSchema({"enum": [f"value {index}" for index in range(20_000)]}),
    JsonSchema({"type": "string", "maxLength": 10**9}),
    JsonSchema({"type": "array", "items": {"type": "array", "minItems": 10**7}}),
    JsonSchema({"properties": {f"p{index}": {} for index in range(501)}}),
    JsonSchema({"patternProperties": {f"^x{index}.*z{index}$": {} for index in range(17)}}),
    JsonSchema({"allOf": [{"anyOf": [{"minimum": a * b} for a in range(9)]} for b in range(9)]}),
    JsonSchema({"properties": {f"p{index}": {"type": "integer", "multipleOf": 9900 + index} for index in range(99)}}),
    Regex("(a|b)*" * 6000),
    Regex("".join(9 * ["("]) + "x{9}" + "".join(9 * ["){9}"])),
    Grammar("start: T\nT: " + "&".join(f"/(?s:.*)[{chr(97 + n % 26)}-z]{{{n % 9}}}(?s:.*)/" for n in range(400))),
    Grammar("start: r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(5000)) + '\nr5000: "y"'),
    Grammar("start: " + "(" * 5000 + '"a"' + ")" * 5000),
    Choices(["a"] * 1001),
    Choices(["a" * 20_000]),
]


@pytest.mark.parametrize("asked", EXPLOSIVE, ids=lambda asked: f"{type(asked).__name__} {str(asked)[12:40]}")
def test_a_form_that_would_explode_is_refused(asked: ResponseFormat) -> None:
    """A stranger's schema takes a core for minutes and the memory of the machine, or ends the server."""
    with pytest.raises(InvalidRequest) as refused:
        GRAMMARS.constraint(asked)
    assert refused.value.field in ("schema", "regex", "grammar", "choices", "choices[0]")
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    "unit",
    [
        lambda ref: {"$ref": ref},
        lambda ref: {"items": {"$ref": ref}},
        lambda ref: {"allOf": [{"items": {"$ref": ref}}]},
    ],
    ids=["$ref", "items", "allOf"],
)
def test_the_longest_chain_of_references_ends_no_process(unit: Callable[[str], dict[str, Any]]) -> None:
    """llguidance follows references on the stack: a schema of 30 kB ends the server with SIGSEGV."""
    try:
        GRAMMARS.constraint(JsonSchema(chain(unit)))
    except InvalidRequest as refused:
        assert "large" in refused.message or "big" in refused.message or "long" in refused.message


@pytest.mark.parametrize(
    "lark",
    ["start: <[5]>", "start: <eos>", 'start: "a" %json {}', "start: @b", 'start: a\na[temperature=2]: "a"', "{}", ""],
)
def test_lark_without_what_the_engine_lacks(lark: str) -> None:
    """A grammar draws the token that starts another turn, or hides a schema that nobody checked."""
    with pytest.raises(InvalidRequest) as refused:
        GRAMMARS.constraint(Grammar(lark))
    assert refused.value.field == "grammar"


@pytest.mark.parametrize(
    "pattern",
    [
        '^[^"]{1,3}$',
        r'^[^"\\]+$',
        r"^[^\\]{2}$",
        r'^(a|[^"])$',
        r'^[^\n"]$',
        r'^[^\x00-\x1f"]{1,2}$',
        r'^\[[^"]\]$',
        r"^[\t\n]{2}$",
        r"^[!#-~]{1,2}$",
        r'^[\^"a]$',
        r"^\W{1,2}$",
        r"^.$",
    ],
)
def test_no_escape_brings_a_character_that_the_pattern_excludes(pattern: str) -> None:
    """A value that is checked again, or put into a query, would hold the quote that its pattern was to keep out."""
    for name, value in (
        ("string", {"type": "string", "pattern": pattern}),
        ("key", {"patternProperties": {pattern: {}}}),
    ):
        schema = value if name == "string" else {"type": "object", "additionalProperties": False, **value}
        constraint = GRAMMARS.constraint(JsonSchema(schema))
        for text in (r'"\""', r'"\\"', r'"\b"', r'"\n"', r'"x"', r'"\"\""', r'"\\\\"', r'"[x]"', r'"a\""'):
            whole = text if name == "string" else f"{{{text}: 1}}"
            if accepts(constraint, whole):
                jsonschema.Draft202012Validator(schema).validate(json.loads(whole))


def accepts(constraint: Constraint, text: str) -> bool:
    ahead = constraint.copy()
    try:
        for token in TOKENIZER.encode_part(text):
            ahead.accept(token)
    except ConstraintError:
        return False
    return True


@pytest.mark.parametrize("pattern", [r"^[\x00-\x1f]{1,2}$", r"^[\x00-!]$", r"^[a\u0001-\u0020]$"])
def test_a_class_of_control_characters_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match=r"'pattern'.*control characters"):
        GRAMMARS.constraint(JsonSchema({"type": "string", "pattern": pattern}))


def test_a_token_that_may_not_come() -> None:
    """A draw that went past the mask goes unnoticed, and the text is something else."""
    constraint = GRAMMARS.constraint(Regex("ab"))
    a, b = (TOKENIZER.encode_part(letter)[0] for letter in "ab")
    assert list(allowed(constraint, IDS)) == [a]
    for token in (b, -1, IDS, 1 << 40):
        with pytest.raises(ConstraintError):
            constraint.copy().accept(token)
    constraint.accept(a)
    constraint.accept(b)
    assert constraint.done


def test_copies_go_their_own_ways() -> None:
    """Of several samples of one request, one would write into the others."""
    first = GRAMMARS.constraint(Choices(["ab", "cd"]))
    second = first.copy()
    first.accept(TOKENIZER.encode_part("a")[0])
    second.accept(TOKENIZER.encode_part("c")[0])
    assert TOKENIZER.decode(list(allowed(first, IDS))) == "b"
    assert TOKENIZER.decode(list(allowed(second, IDS))) == "d"


def test_forced_tokens_are_those_that_may_come() -> None:
    """A draft that the grammar refuses is computed in vain."""
    constraint = GRAMMARS.constraint(Regex('\\{"name": [01]'))
    forced = constraint.forced()
    assert TOKENIZER.decode(forced) and '{"name": '.startswith(TOKENIZER.decode(forced))
    for token in forced:
        assert token in allowed(constraint, IDS)
        constraint.accept(token)


KINDS: dict[str, Callable[[], Inner]] = {
    "llama2": tokenizers.llama2,
    "gemma": tokenizers.gemma,
    "metaspace": tokenizers.metaspace,
    "byte level": tokenizers.byte_level,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer(kind: str) -> None:
    """A model whose tokens are spelt otherwise writes other texts than were asked for, or special tokens."""
    tokenizer = Tokenizer(KINDS[kind]())
    tokenizer.eos_ids = frozenset({2, 3})
    ids = tokenizer.vocab_size + 40
    constraint = Grammars(tokenizer, ids).constraint(Choices([" a b漢!", " aé"]))
    for seed in range(9):
        text, one = "", constraint.copy()
        stream = tokenizer.stream(tokenizer.encode_part("b"))
        while not one.done:
            may = [int(index) for index in allowed(one, ids)]
            assert max(may) < tokenizer.vocab_size and not tokenizer.special_ids.intersection(may)
            one.accept(token := random.Random(seed).choice(may))
            text += stream.push([token])
        assert text + stream.flush() in (" a b漢!", " aé")


def test_a_text_ends_by_any_of_the_ends_and_only_when_it_is_complete() -> None:
    """A chat model's turn never ends, or a text ends half-way."""
    tokenizer = Tokenizer(tokenizers.byte_level())
    tokenizer.eos_ids = frozenset({2, 3})
    constraint = Grammars(tokenizer, tokenizer.vocab_size).constraint(Regex("ab*"))
    assert not {2, 3} & set(allowed(constraint, tokenizer.vocab_size))
    constraint.accept(tokenizer.encode_part("a")[0])
    assert {2, 3} < set(allowed(constraint, tokenizer.vocab_size))
    constraint.accept(3)
    assert constraint.done


def test_a_model_with_fewer_ids_than_its_tokenizer_and_no_end() -> None:
    """Gemma 3's tokenizer has one token more than the model; a tokenizer may know no token that ends a text."""
    tokenizer = Tokenizer(tokenizers.byte_level())
    ids = tokenizer.encode_part("b")[0]
    constraint = Grammars(tokenizer, ids).constraint(Regex("a[b-d]?a"))
    a = tokenizer.encode_part("a")[0]
    assert list(allowed(constraint, ids)) == [a]
    constraint.accept(a)
    assert list(allowed(constraint, ids)) == [a]
    constraint.accept(a)
    assert constraint.done


def test_a_tokenizer_without_bytes_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="this model's tokenizer"):
        Grammars(Tokenizer(tokenizers.stripped_bytes()), 300).constraint(JsonObject())


BLOWS_UP = Regex("(.*x.{300}|.*y.{300})")


def test_what_explodes_while_it_is_stepped_ends_that_sequence() -> None:
    """A regular expression with more states than there is memory takes the server down a token at a time."""
    constraint = Grammars(TOKENIZER, IDS, replace(Limits(), lexer_states=2000)).constraint(BLOWS_UP)
    with pytest.raises(ConstraintError, match="too many states"):
        run_over(constraint, random.Random(1))


def test_others_with_the_same_grammar_go_on() -> None:
    """One sequence uses up the states that all with this grammar share, and all fail, for as long as it is kept."""
    grammars = Grammars(TOKENIZER, IDS, replace(Limits(), lexer_states=2000))
    other, exploding = grammars.constraint(BLOWS_UP), grammars.constraint(BLOWS_UP)
    a = TOKENIZER.encode_part("a")[0]
    other.accept(a)
    with pytest.raises(ConstraintError):
        run_over(exploding, random.Random(1))
    for one in (other, other.copy(), grammars.constraint(BLOWS_UP)):
        assert a in allowed(one, IDS)
        one.accept(a)


def run_over(constraint: Any, dice: random.Random) -> None:
    tokens = [TOKENIZER.encode_part(letter)[0] for letter in "xya"]
    for _ in range(500):
        allowed(constraint, IDS)
        constraint.accept(dice.choice(tokens))


def test_a_grammar_is_compiled_once() -> None:
    """Every request of a batch with one schema waits for it to be compiled, and a refused one costs a second each time.
    The number of those that are kept is bounded, or each schema of a stranger would stay."""
    grammars = Grammars(TOKENIZER, IDS, replace(Limits(), cached=2))
    for text in ("a", "b", "a"):
        grammars.constraint(Choices([text]))
    kept = dict(grammars._kept)
    grammars.constraint(Choices(["a"]))
    assert list(grammars._kept.values()) == list(kept.values())
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            grammars.constraint(Regex("("))
    assert len(grammars._kept) == 2 and next(iter(kept)) not in grammars._kept


def test_a_keyword_asks_for_one_form() -> None:
    """A call with two forms would silently have one of them."""
    forms: dict[str, Any] = {"json": True, "schema": {}, "regex": "a", "grammar": "start: a", "choices": ["a"]}
    kinds = [JsonObject(), JsonSchema({}), Regex("a"), Grammar("start: a"), Choices(["a"])]
    assert [SamplingParams().replace(**{name: form}).response_format for name, form in forms.items()] == kinds  # type: ignore[misc]
    assert SamplingParams(response_format=Regex("a")).replace(json=False, seed=1) == SamplingParams(seed=1)
    with pytest.raises(InvalidRequest, match="one form"):
        SamplingParams().replace(regex="a", choices=["a"])


def test_masks_are_as_wide_as_the_logits() -> None:
    words = np.full(-(-IDS // 32), -1, np.int32)
    GRAMMARS.constraint(Regex("(?s:.*)")).fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert not bits[TOKENIZER.vocab_size :].any() and bits.sum() > 200
