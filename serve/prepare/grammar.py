"""Compiles what a text must be (isthmus/types.py: ResponseFormat) into a Constraint for the engine, by llguidance.

A grammar is somebody else's program. Its text is bounded, it is compiled first in a process that can be ended, and each
of its steps is bounded too (`Limits`). What is over a limit is an error of that request alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from isthmus.errors import InvalidRequest, Overloaded
from isthmus.forms import Choices, Grammar, JsonObject, JsonSchema, Regex, ResponseFormat, check_choices, check_string
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.serve.engine.constraint import ConstraintError
from isthmus.serve.prepare import grammar_trial, schema
from isthmus.serve.prepare.vocabulary import Vocabulary

MAX_REGEX = 16 << 10
MAX_GRAMMAR = 16 << 10
MAX_CHOICES = 1000
"""Most choices; of all of them together, most bytes are MAX_GRAMMAR"""
STACK = 256 << 20
"""Bytes of address space for the stack that compiles. llguidance recurses along references, and an overflow would end
the process; the worst texts within the limits take less than a fourth of it, and only what they take is memory"""
PATIENCE = 30.0
"""Seconds that a trial may take on a busy machine"""
WHITESPACE = r"\x20|\n[\x20\t]{0,20}"
"""The most whitespace at each place of a JSON text that may have some: a space, or a line and its indentation"""
ESCAPES = 'nrbtf\\"'
"""The letters that may follow a backslash in JSON. Without u each name of a property can be spelt in one way only"""


@dataclass(frozen=True)
class Limits:
    """What a grammar may take. With the defaults compiling takes less than a second, and a mask mostly less than a
    millisecond and at worst about 50."""

    seconds: int = 1
    """Most processor time for the trial of a grammar, of which the process's start is about a tenth"""
    memory: int = 3 << 30
    """Most address space for it, in bytes"""
    trials: int = 2
    """Most grammars that are compiled at once"""
    cached: int = 32
    """Most compiled grammars that are kept"""
    grammar_size: int = 50_000
    """Most symbols in a grammar's rules"""
    lexer_states: int = 25_000
    """Most states of all regular expressions of a grammar together, of about 1 kB each"""
    initial_fuel: int = 500_000
    """Most work on its regular expressions while it is compiled; 50,000 take about a millisecond"""
    step_fuel: int = 200_000
    """Most work on its regular expressions for one mask; 14,000 take about a millisecond"""
    step_items: int = 10_000
    """Most items of the parser for one mask; 1,000 take up to 5 milliseconds"""
    row_items: int = 3_000
    """Most items of the parser at one place of the text, about 4 for each property that may come next"""

    def parser(self) -> dict[str, Any]:
        """The arguments of LLParserLimits. Errors don't repeat the text, which is the user's."""
        return {
            "max_items_in_row": self.row_items,
            "initial_lexer_fuel": self.initial_fuel,
            "step_lexer_fuel": self.step_fuel,
            "step_max_items": self.step_items,
            "max_lexer_states": self.lexer_states,
            "max_grammar_size": self.grammar_size,
            "verbose_errors": False,
        }


class Grammars:
    """The grammars of one model. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, ids: int, limits: Limits | None = None) -> None:
        """ids: the width of the model's logits, padding included."""
        self._tokenizer, self._ids = tokenizer, ids
        self._limits = limits or Limits()
        self._places = threading.Semaphore(self._limits.trials)
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, _Compiled | InvalidRequest] = OrderedDict()

    def constraint(self, asked: ResponseFormat) -> GrammarConstraint:
        """The constraint of a new sequence. A form that wasn't asked for before takes a tenth of a second or two, the
        first one of all a second more for the vocabulary. Raises InvalidRequest, naming the library's keyword for the
        form, and Overloaded if the system has no time for it."""
        name, text = _written(asked)
        key = hashlib.sha256(f"{type(asked).__name__}\0{text}".encode()).digest()
        found = self._known(key)
        if found is None:
            try:
                found = self._compiled(name, _grammar(asked, text))
            except InvalidRequest as error:
                found = error
            self._keep(key, found)
        if isinstance(found, InvalidRequest):
            raise InvalidRequest(found.field, found.message)
        return GrammarConstraint(found, found.matcher.deep_copy())

    def prepare(self) -> None:
        """Does now what the first form would otherwise wait for."""
        with self._lock:
            _ = self._compile

    def _known(self, key: bytes) -> _Compiled | InvalidRequest | None:
        with self._lock:
            found = self._kept.get(key)
            if found is None or (isinstance(found, _Compiled) and found.spent):
                return None
            self._kept.move_to_end(key)
            return found

    def _keep(self, key: bytes, found: _Compiled | InvalidRequest) -> None:
        with self._lock:
            self._kept[key] = found
            self._kept.move_to_end(key)
            if len(self._kept) > self._limits.cached:
                self._kept.popitem(last=False)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._tokenizer, self._ids)

    @cached_property
    def _compile(self) -> Callable[[str], LLMatcher]:
        """Compiles a grammar that has been tried, and makes its first mask, which is when llguidance finds out that no
        text fits."""
        tokens, limits = self._vocabulary.llguidance(), LLParserLimits(**self._limits.parser())

        def work(grammar: str) -> LLMatcher:
            matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits)
            words = self._vocabulary.buffer()
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            return matcher

        return lambda grammar: _on_large_stack(lambda: work(grammar))

    def _compiled(self, name: str, grammar: str) -> _Compiled:
        with self._places:
            if error := _tried(grammar, self._limits):
                raise InvalidRequest(name, error)
            self.prepare()
            begun = time.monotonic()
            matcher = self._compile(grammar)
        if matcher.is_error():
            raise InvalidRequest(name, _reason(matcher.get_error()))
        compiled = _Compiled(matcher, self._vocabulary, lambda: self._compile(grammar), time.monotonic() - begun)
        try:
            GrammarConstraint(compiled, matcher.deep_copy()).fill(self._vocabulary.text.copy())
        except ConstraintError as error:
            raise InvalidRequest(name, str(error)) from None
        return compiled


def _tried(grammar: str, limits: Limits) -> str | None:
    """Why a grammar is refused, after its trial in another process; None if it isn't. Raises Overloaded."""
    # The trial is run by its path, so that no module in the folder where the command runs is imported instead.
    sizes = (str(size) for size in (limits.seconds, limits.memory, STACK))
    command = [sys.executable, "-P", grammar_trial.__file__, *sizes, json.dumps(limits.parser())]
    try:
        done = subprocess.run(command, input=grammar.encode(), capture_output=True, check=False, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Overloaded(f"a grammar couldn't be tried out: {type(error).__name__}") from None
    if done.returncode:
        return "takes too long, or too much memory, to compile: make it simpler"
    return _reason(done.stdout.decode(errors="replace")) if done.stdout else None


_STARTING = threading.Lock()


def _on_large_stack(work: Callable[[], LLMatcher]) -> LLMatcher:
    """Returns work(), run on a thread with a stack of STACK bytes. That is a setting of the process for new threads:
    one that starts elsewhere meanwhile gets it too, which costs it nothing."""
    results: list[LLMatcher] = []
    thread = threading.Thread(target=lambda: results.append(work()), name="grammar", daemon=True)
    with _STARTING:
        before = threading.stack_size(STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    (result,) = results
    return result


# Texts


def _written(asked: ResponseFormat) -> tuple[str, str]:
    """The library's keyword for a form of text, and what it says. Raises InvalidRequest."""
    match asked:
        case JsonObject():
            return "json", ""
        case JsonSchema():
            return "schema", asked.text()
        case Regex(pattern):
            return "regex", _bounded("regex", pattern, MAX_REGEX)
        case Grammar(lark):
            return "grammar", _bounded("grammar", lark, MAX_GRAMMAR)
        case Choices(texts):
            return "choices", _listed(texts)
    raise InvalidRequest("response_format", f"must be a form of text, not {type(asked).__name__}")


def _bounded(name: str, text: str, most: int) -> str:
    if not check_string(name, text):
        raise InvalidRequest(name, "must not be empty")
    if (size := len(text.encode())) > most:
        raise InvalidRequest(name, f"has {size} bytes; at most {most}")
    return text


def _listed(texts: Sequence[str]) -> str:
    texts = check_choices(texts)
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest("choices", f"has {len(texts)}; give 1 to {MAX_CHOICES}")
    for index, text in enumerate(texts):
        _bounded(f"choices[{index}]", text, MAX_GRAMMAR)
    return _bounded("choices", json.dumps(texts, ensure_ascii=False), MAX_GRAMMAR)


def _grammar(asked: ResponseFormat, text: str) -> str:
    """The grammar in llguidance's own format. Raises InvalidRequest."""
    match asked:
        case JsonObject():
            return _json_grammar('{"type": "object"}')
        case JsonSchema():
            return _json_grammar(schema.checked(text))
        case Regex():
            return LLMatcher.grammar_from_regex(text)
        case Grammar():
            _check_lark(text)
            return LLMatcher.grammar_from_lark(text)
    options = (json.dumps(option, ensure_ascii=False).replace("\x7f", r"\u007f") for option in json.loads(text))
    return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(options)}")


def _json_grammar(text: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_pattern": WHITESPACE, "json_allowed_escapes": ESCAPES}
        )
    except ValueError as error:  # the library's parser of JSON nests less deep than Python's
        raise InvalidRequest("schema", str(error)) from None


_LARK = re.compile(
    r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\])+/|(?://|#)[^\n]*'
    r"|(?P<token><)|(?P<part>%(?:json|lark)\b|@)|(?P<option>\b(?:temperature|stop)\s*=)"
)
_REFUSED = {
    "token": "special tokens can't be asked for",
    "part": "other grammars inside of it aren't supported; a JSON schema is given as schema=",
    "option": "the engine doesn't support this option",
}


def _check_lark(text: str) -> None:
    """Raises InvalidRequest for what llguidance's Lark has and the engine doesn't."""
    if text.lstrip().startswith("{"):  # the library's own format, whose schemas would not be checked
        raise InvalidRequest("grammar", "must be a Lark grammar")
    for found in _LARK.finditer(text):
        if found.lastgroup is not None:
            line = text.count("\n", 0, found.start()) + 1
            raise InvalidRequest("grammar", f"line {line}: {found[0]!r}: {_REFUSED[found.lastgroup]}")


def _reason(error: str) -> str:
    """An error of llguidance in a line. A panic of it, which comes with a backtrace, has met a limit."""
    error = error.removesuffix("<non-verbose/>").strip()
    if error.startswith("panic"):
        return "is too large to be compiled"
    if error.startswith("NoExtensionBias"):
        return "no text fits it"
    if "coerce_one_of" in error:
        return "'oneOf': that no text fits two of its schemas isn't plain here: use anyOf, which allows a text to"
    lines = [line for line in error.split("\n") if not re.match(r"\s*(\d+ \||\^|$)", line)]
    return re.sub(r"^(at )?\d+\(\d+\): ", "", " ".join(lines))[:300]


# Sequences


RENEWAL_SECONDS = 0.1
"""A grammar that took longer to compile isn't compiled again while the engine waits"""


@dataclass
class _Compiled:
    """A grammar. All copies of its matcher share the states of its regular expressions, which so are found once, and
    the limit on them, which the copies of many requests reach together."""

    matcher: LLMatcher
    vocabulary: Vocabulary
    again: Callable[[], LLMatcher]
    """Compiles it again"""
    seconds: float
    """What that takes"""
    spent: bool = False
    """Whether that limit was reached. Its copies are of no more use, and the next request compiles it again"""


class GrammarConstraint:
    """A Constraint by a matcher of llguidance. That never raises: its errors stay, and each call looks for one."""

    def __init__(self, grammar: _Compiled, matcher: LLMatcher) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._tokens: list[int] = []
        self._alone = False
        """Whether the matcher shares its states with no other request"""
        self._words = grammar.vocabulary.buffer()
        self._place = self._words.ctypes.data, self._words.nbytes

    def fill(self, into: np.ndarray) -> None:
        words, vocabulary = self._words, self._grammar.vocabulary
        self._attempt(self._mask)
        may_end = self._matcher.is_accepting() or self._matcher.is_stopped()
        np.bitwise_and(words[: len(into)], vocabulary.text_or_end if may_end else vocabulary.text, out=into)
        if not into.any():
            raise ConstraintError("the grammar leaves no token that may come next")

    def _mask(self) -> bool:
        self._matcher.unsafe_compute_mask_ptr(*self._place)
        return not self._matcher.is_error()

    def accept(self, token: int) -> None:
        if not 0 <= token < self._grammar.vocabulary.ids:
            raise ConstraintError(f"{token} is no token of the model")
        self._attempt(lambda: self._matcher.consume_token(token))
        self._tokens.append(token)

    def forced(self) -> list[int]:
        tokens = self._matcher.compute_ff_tokens()
        fitting = self._matcher.validate_tokens(tokens) if tokens else 0
        return tokens[:fitting]

    @property
    def done(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def copy(self) -> GrammarConstraint:
        copied = GrammarConstraint(self._grammar, self._matcher.deep_copy())
        copied._tokens, copied._alone = list(self._tokens), self._alone
        return copied

    def _attempt(self, step: Callable[[], bool]) -> None:
        """Does a step of the matcher. If it fails, others with the same grammar may have used up the states that all
        share; then it is tried once more with states of its own. Raises ConstraintError."""
        if step():
            return
        if not (self._exhausted() and self._renew() and step()):
            raise ConstraintError(_reason(self._matcher.get_error()))

    def _exhausted(self) -> bool:
        return not self._alone and self._matcher.get_error().startswith("lexer error: too many")

    def _renew(self) -> bool:
        self._grammar.spent = True
        if self._grammar.seconds > RENEWAL_SECONDS:
            return False
        self._matcher, self._alone = self._grammar.again(), True
        return self._matcher.consume_tokens(self._tokens)
