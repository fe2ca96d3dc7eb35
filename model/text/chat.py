"""The chat template of a model folder, which turns messages into text in the form that the model was trained on."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes

from isthmus.errors import ConfigError
from isthmus.model.process.files import present, read_json_if_present, read_text
from isthmus.model.text.answers import Indistinct, Span, find_answers
from isthmus.model.text.sandbox.environment import Sandbox
from isthmus.model.text.sandbox.meter import Meter, RenderLimits, metered

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names that a template may use for special tokens"""
MAX_SOURCE = 256 << 10
"""Most characters of a template"""
MAX_DEPTH = 64
"""Most levels of lists and mappings inside each other, in messages and arguments"""
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys under which templates look for the assistant's reasoning; the first is the usual one"""
_RESERVED = ("messages", "add_generation_prompt")

Message = Mapping[str, Any]


class ChatError(ValueError):
    """The template doesn't accept the messages, or it fails; the message says why."""


class ChatTemplate:
    """A Jinja template that runs in a sandbox with limits. Safe to share between threads."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        name: str = "chat template",
        limits: RenderLimits | None = None,
    ) -> None:
        """special_tokens: the template's variables for them, such as "bos_token". name: what errors call the template.

        Raises ConfigError naming the line that isn't valid Jinja.
        """
        if len(source) > MAX_SOURCE:
            raise ConfigError(f"{name} has {len(source)} characters; a chat template may have {MAX_SOURCE}")
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._limits = limits or RenderLimits()
        environment = Sandbox()
        try:
            tree = environment.prepare(source)
            self._marks_assistant = tree.find(nodes.ExtensionAttribute) is not None
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{name}, line {error.lineno}: {error.message}") from None
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:  # Python's compiler has limits too
            raise ConfigError(f"{name} is no chat template that can be compiled: {error}") from None

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The folder's `chat_template.jinja`, or else `chat_template` in its `tokenizer_config.json`, or else None.

        Raises ConfigError naming a malformed file.
        """
        config = tokenizer_config(folder)
        path = folder / TEMPLATE_FILE
        source, name = (
            (read_text(path), str(path)) if present(path) else _template_of(config, folder / TOKENIZER_CONFIG)
        )
        return None if source is None else cls(source, special_tokens(folder), name=name)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, with special tokens spelt out. Raises ChatError.

        Keys of a message that have the value None are left out. arguments: more variables of the template, such as
        enable_thinking or tools.
        """
        with metered(self._limits) as meter:
            return self._write(meter, _checked(messages, arguments), add_generation_prompt)

    def render_with_assistant_spans(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """The text, and the spans of what the assistant said, each with the token that ends its turn.

        The template's {% generation %} blocks mark them. If it has none, `find_answers` looks for them. Raises
        ChatError, also when an answer can't be told apart from the text around it.
        """
        variables = _checked(messages, arguments)
        if self._marks_assistant:
            with metered(self._limits) as meter:
                whole = self._write(meter, variables, add_generation_prompt)
            return whole, _generated(whole, meter)

        def write(part: Sequence[dict[str, Any]], prompted: bool) -> str:
            with metered(self._limits) as meter:
                return self._write(meter, {**variables, "messages": list(part)}, prompted)

        try:
            return find_answers(
                variables["messages"], add_generation_prompt, write, tuple(self.special_tokens.values())
            )
        except Indistinct as error:
            if error.index == 0:
                said = "messages[0] is the assistant's: this template doesn't say where its answer begins"
            else:
                said = f"the answer in messages[{error.index}] can't be told apart from the rest of the text"
            raise ChatError(f"{said}. A template can mark answers with {{% generation %}} blocks") from None

    def _write(self, meter: Meter, variables: dict[str, Any], add_generation_prompt: bool) -> str:
        pieces = []
        try:
            for piece in self._template.generate(
                {**self.special_tokens, **variables, "add_generation_prompt": add_generation_prompt}
            ):
                meter.write(piece)
                pieces.append(piece)
            text = "".join(pieces)
            text.encode()  # a template can spell half a surrogate pair, which no tokenizer accepts
        except Exception as error:  # a template can raise whatever its operators do
            raise ChatError(_complaint(error)) from None
        return text


def _complaint(error: Exception) -> str:
    """What went wrong, and in which line of the template."""
    text = str(error)[:500]
    if type(error) is TemplateError:  # raise_exception: the template's own words
        return text
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    where = f"line {lines[-1]} of the chat template" if lines else "the chat template"
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return f"{where}: {kind}{text}"


def _generated(whole: str, meter: Meter) -> list[Span]:
    spans = [(start, start + len(text)) for start, text in meter.generated if text]
    for (start, end), text in zip(spans, (text for _, text in meter.generated if text), strict=True):
        if whole[start:end] != text:
            raise ChatError("the template has a {% generation %} block inside a macro or a {% set %} block")
    return spans


def _checked(messages: Sequence[Message], arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """The template's variables, copied to Python's own types. Raises ChatError."""
    if not messages:
        raise ChatError("messages must not be empty")
    arguments = dict(arguments or {})
    for name in _RESERVED:
        if name in arguments:
            raise ChatError(f"arguments must not hold {name!r}")
    chat = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return {"tools": None, "documents": None, **_plain(arguments, "arguments"), "messages": chat}


def _message(message: Message, where: str) -> dict[str, Any]:
    plain = _plain(message, where)
    if not isinstance(plain, dict) or not isinstance(plain.get("role"), str) or not plain["role"]:
        raise ChatError(f"{where} must be a mapping with a role")
    plain = {key: value for key, value in plain.items() if value is not None}
    thought = next((plain[key] for key in _THOUGHTS if key in plain), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


def _plain(value: Any, where: str, depth: int = MAX_DEPTH) -> Any:
    """A copy in types that JSON has, because others have methods that a template could misuse. Raises ChatError."""
    if depth == 0:
        raise ChatError(f"{where} is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ChatError(f"{where} has a key that is no string")
        return {str(key): _plain(item, f"{where}.{key}", depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]", depth - 1) for index, item in enumerate(value)]
    raise ChatError(f"{where} is a {type(value).__name__}, which JSON can't hold")


# Files


def _template_of(config: dict[str, Any], path: Path) -> tuple[str | None, str]:
    """The `chat_template` in `config`, the default one if there are several, or None; and what errors call it."""
    name = f"{path}: chat_template"
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if "default" not in named:
            raise ConfigError(f"{name} holds no template that is named default")
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"{name} must be a string, or a list of names and templates")
    return found, name


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; empty if there is none. Raises ConfigError naming the file."""
    return read_json_if_present(folder / TOKENIZER_CONFIG)


def special_tokens(folder: Path) -> dict[str, str]:
    """A folder's special tokens by name, such as {"eos_token": "</s>"}. Raises ConfigError naming the file."""
    config = tokenizer_config(folder)
    sources = [(folder / TOKENIZER_CONFIG, config)]
    if "added_tokens_decoder" not in config:  # older folders have a separate file for special tokens
        path = folder / SPECIAL_TOKENS_MAP
        sources.append((path, read_json_if_present(path)))
    tokens = {}
    for path, content in sources:
        for name in SPECIAL_TOKENS:
            if (value := content.get(name)) is not None:
                text = value.get("content") if isinstance(value, dict) else value
                if not isinstance(text, str):
                    raise ConfigError(f"{path}: {name} must be a string, or an object with its content")
                tokens[name] = text
    return tokens
