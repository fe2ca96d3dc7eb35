"""The command line as a newcomer meets it: help that teaches, and mistakes that are named."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import tyro

from isthmus.commands.chat import chat
from isthmus.commands.main import COMMANDS, main
from tests.model.weights.huggingface.folders import write_folder

ISTHMUS = Path(sys.executable).with_name("isthmus")
WITHOUT_ARGUMENTS = {"demo"}
"""Commands whose plain use needs no example."""


def test_the_installed_command_lists_every_command() -> None:
    """In a process of its own, as after `pip install`."""
    done = subprocess.run([ISTHMUS, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", done.stdout, re.MULTILINE)


def test_the_list_of_commands_is_quick() -> None:
    """Help must not import JAX first: it takes seconds."""
    code = "import sys; from isthmus.commands.main import main; main(['--help']); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_client_needs_no_jax() -> None:
    """Other programs import it."""
    code = "import sys; import isthmus, isthmus.v1; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["False"], done.stderr


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_a_command_shows_how_it_is_used(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: isthmus {name}" in said
    if name not in WITHOUT_ARGUMENTS:
        assert "examples:" in said and re.search(rf"^\W*isthmus {name} (?!\[)", said, re.MULTILINE), "no example"


def test_without_a_command_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: isthmus COMMAND" in capsys.readouterr().out


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"isthmus {version('isthmus')}\n"


@pytest.mark.parametrize("name", ["tain", "../serve", "--port", ""])
def test_an_unknown_command_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    said = capsys.readouterr().err
    assert repr(name) in said and "usage: isthmus COMMAND" in said


@pytest.mark.parametrize(
    "words, meant",
    [
        (["serv"], "did you mean serve?"),
        (["chat"], "isthmus generate --chat"),
        (["quality"], "isthmus bench quality"),
        (["check", "determinsm"], "did you mean determinism?"),
    ],
)
def test_what_was_meant_is_suggested(words: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert meant in said and repr(words[-1]) in said


@pytest.mark.parametrize("words", [["train", "text"], ["serve", "--model", "folder"], ["generate", "prompt"]])
def test_an_unknown_option_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--no-such-option", "1"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "--no-such-option" in captured.err + captured.out


def test_train_without_data_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path / "out")]) == 2
    assert "data" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_serve_without_a_model_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "--model" in captured.err + captured.out


def test_generate_says_what_to_do_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--address", "127.0.0.1:1"]) == 1
    captured = capsys.readouterr()
    assert "127.0.0.1:1" in captured.err and "isthmus serve" in captured.err and captured.out == ""


class Answering(grpc.GenericRpcHandler):
    """A server that ends every call alike."""

    def __init__(self, code: grpc.StatusCode, details: str, *, ours: bool) -> None:
        self._end = (code, details)
        self._metadata = (("grpc-status-details-bin", b""),) if ours else ()

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def end(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            context.set_trailing_metadata(self._metadata)
            context.abort(*self._end)
            yield b""

        return grpc.unary_stream_rpc_method_handler(end)


@pytest.mark.parametrize(
    "code, details, ours, hint",
    [
        (grpc.StatusCode.UNAVAILABLE, "the model is still loading", True, None),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", False, "another server's port"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "256 requests wait", True, None),
    ],
)
def test_generate_hints_at_what_can_be(
    code: grpc.StatusCode, details: str, ours: bool, hint: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told "still loading; is a server running there?" one looks for a fault where there is none."""
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Answering(code, details, ours=ours)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert main(["generate", "what to go on from", "--address", f"127.0.0.1:{port}"]) == 1
    finally:
        server.stop(None).wait()
    captured = capsys.readouterr()
    assert captured.out == "", "the prompt was printed, though nothing went on from it"
    assert f"{code.name}: {details}" in captured.err and "isthmus serve" not in captured.err
    assert hint is None or hint in captured.err


@pytest.mark.parametrize("content", [b"", b"two\nlines", b"\xff\xfe", "schl\u00fcssel".encode(), None])
def test_a_token_file_that_can_not_be_sent_is_named(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token.txt"
    if content is not None:
        token.write_bytes(content)
    assert main(["generate", "a", "--address", "127.0.0.1:1", "--auth-token-file", str(token)]) == 2
    said = capsys.readouterr().err
    assert "auth_token_file" in said and str(token) in said


def test_a_file_for_tls_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--address", "127.0.0.1:1", "--tls-ca", str(tmp_path / "ca.pem")]) == 2
    said = capsys.readouterr().err
    assert "tls_ca: " in said and "ca.pem" in said


def test_generate_asks_for_what_was_given_and_no_more() -> None:
    """Every prompt was drawn at 0.8 and 0.95, against what the model's makers recommend and the API promises."""
    from isthmus.commands.generate import GenerateConfig
    from isthmus.types import SamplingParams

    assert GenerateConfig(prompt="a").sampling() == SamplingParams()
    assert GenerateConfig(prompt="a", top_k=0, seed=5).sampling() == SamplingParams(top_k=0, seed=5)
    given = tyro.cli(GenerateConfig, args=["a", "--stop", "User:", "--stop", "\n\n"])
    assert given.sampling() == SamplingParams(stop=("User:", "\n\n"))


def test_generate_from_a_folder_that_is_no_model_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_every_command_that_is_listed_exists() -> None:
    for module, _ in COMMANDS.values():
        assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize(
    "words, said",
    [
        (["serve", "--model", "m", "--mesh", "tp=0"], "needs a whole number of devices, at least 1"),
        (["serve", "--model", "m", "--mesh", "dp=2"], "serving has tp and ep"),
        (["serve", "--model", "m", "--drain-seconds", "nan"], "drain_seconds=nan must be"),
        (["demo", "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
        (["demo", "--temperature", "nan"], "temperature=nan must be"),
        (["convert", "m", "new", "--quantize", "int8", "--windows", "0"], "windows=0 must be at least 1"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, or the complaint of something else, before."""
    assert main(words) == 2
    assert said in capsys.readouterr().out


def test_a_target_that_can_not_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its own name, not by that of the folder which becomes it."""
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "new"
    source = write_folder(tmp_path / "source", "llama3")
    assert main(["convert", str(source), str(target)]) == 2
    assert f"target: {target} can't be made: Not a directory" in capsys.readouterr().out.replace("\n", " ")


# Chat

CHAT_TEMPLATE = """\
{% for message in messages %}<{{ message.role }}>{{ message.content + "\n" }}
{%- endfor %}{% if messages | length > 4 %}{{ raise_exception('five messages are too many') }}{% endif %}<assistant>"""


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that writes nonsense, and a template for it."""
    from tests.serve.api.harness import save_model, train_tokenizer, varied_params

    folder = save_model(tmp_path_factory.mktemp("cli") / "chat", train_tokenizer(), varied_params())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "context_length": 256}))
    return folder


SMALL = ("--engine.max-sequences", "1", "--engine.prefill-tokens", "32", "--engine.draft-rows", "0")
"""Two programs, where the defaults have eleven"""


def talk(monkeypatch: pytest.MonkeyPatch, text: str, *words: object) -> int:
    """`isthmus generate --chat` with `text` piped in."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    options = ("--chat", "--temperature", "0", "--max-tokens", "6", *SMALL)
    return main(["generate", *options, *map(str, words)])


@contextmanager
def model_of(folder: Path) -> Iterator[Callable[[str], str]]:
    """What the model goes on with after a text as a template writes it, led by no token."""
    from isthmus import LLM, EngineConfig
    from isthmus.model.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    with LLM(folder, engine=EngineConfig(max_sequences=1, prefill_tokens=32, draft_rows=0, steps_per_launch=1)) as llm:
        yield lambda text: llm.generate(tokenizer.encode_chat(text), temperature=0, max_tokens=6).text


def test_chat_answers_each_line_with_what_was_said_before_in_mind(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Piped lines are turns: each answer must be what the model says to the whole conversation, and come in order."""
    lines = "\n  hello \n/reset\nhello\n/exit\nnever\n"
    assert talk(monkeypatch, lines, "first", "--model", chat_folder, "--system", "Be brief.") == 0
    said = capsys.readouterr().out
    start = "<system>Be brief.\n"
    with model_of(chat_folder) as answer:
        want, text = [], start
        for line in ("first", "hello"):
            text += f"<user>{line}\n"
            want.append(answer(f"{text}<assistant>"))
            text += f"<assistant>{want[-1]}\n"
        want.append(answer(f"{start}<user>hello\n<assistant>"))
    assert said == "".join(f"{one}\n" for one in want)


class Terminal(io.StringIO):
    """Somebody's typing."""

    def isatty(self) -> bool:
        return True


def test_a_slip_in_a_command_of_a_chat_is_no_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model would answer to /rest, and the conversation would go on with it."""
    monkeypatch.setattr(sys, "stdin", Terminal("/rest\n/home/me is full\n/exit\n"))
    asked: list[str] = []

    def complete(talk: Sequence[Mapping[str, str]]) -> Generator[str, None, None]:
        asked.append(talk[-1]["content"])
        yield "so be it"

    chat(complete, None, None)
    assert asked == ["/home/me is full"] and "/rest is no command" in capsys.readouterr().err


def test_chat_that_the_template_refuses_says_why(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script must see that an answer is missing."""
    assert talk(monkeypatch, "a\nb\nc\n", "--model", chat_folder) == 2
    assert "five messages are too many" in capsys.readouterr().err


def test_generate_takes_what_serve_takes(chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a server is to run could not be tried without one."""
    words = ["--temperature", "0", "--max-tokens", "6", "--quantize", "int8", "--dtype", "float32"]
    engine = ["--engine.context-length", "64", *SMALL]
    assert main(["generate", "abc", "--model", str(chat_folder), *words, *engine]) == 0
    assert capsys.readouterr().out.startswith("abc")
    assert main(["generate", "a b c " * 60, "--model", str(chat_folder), *words, *engine]) == 2
    assert "context of 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "a prompt is missing"),
        (["a", "--system", "b"], "--system needs --chat"),
        (["--chat", "--parse-special"], "--parse-special can't be given with --chat"),
        (["a", "--address", "127.0.0.1"], "address='127.0.0.1' must be HOST:PORT"),
        (["a", "--download"], "--base, --ignore-field and --download need --model"),
        (["a", "--quantize", "int8"], "--quantize needs --model"),
        (["a", "--merge-adapter"], "--merge-adapter needs --model"),
        (["a", "--engine.context-length", "64"], "--engine needs --model"),
        (["a", "--address", ""], "address=''"),
        (["a", "--address", "127.0.0.1:99999"], "must have a port of 1 to 65535"),
        (["a", "--address", "http://127.0.0.1:50051"], "HOST:PORT"),
        (["a", "--adapter", "poems", "--model", "."], "--adapter is one of a server's"),
        (["a", "--max-tokens", "-5"], "max_tokens=-5 must be"),
        (["a", "--max-tokens", "99999999999"], "max_tokens=99999999999 must be"),
        (["a", "--top-k", "-1"], "top_k=-1 must be"),
        (["a", "--seed", "-1"], "seed=-1 must be"),
    ],
)
def test_generate_names_what_is_missing_or_wrong(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, before anything is loaded or called."""
    assert main(["generate", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_an_answer_that_is_stopped_was_said_and_one_that_fails_was_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C must end the answer alone, and the request with it; an error must leave the conversation as it was."""
    from isthmus.commands.chat import chat
    from isthmus.errors import InvalidRequest

    asked, ended = [], []

    def complete(messages: Sequence[Mapping[str, str]]) -> Generator[str, None, None]:
        asked.append([message["content"] for message in messages])
        try:
            if messages[-1]["content"] == "fail":
                raise InvalidRequest("messages", "too long")
            yield "one "
            if messages[-1]["content"] == "stop":
                raise KeyboardInterrupt
            yield "two"
        finally:
            ended.append(messages[-1]["content"])

    monkeypatch.setattr(sys, "stdin", Terminal("stop\nfail\nlast\n"))
    chat(complete, None, None)
    assert asked == [["stop"], ["stop", "one ", "fail"], ["stop", "one ", "last"]]
    assert ended == ["stop", "fail", "last"]
    captured = capsys.readouterr()
    assert "one two\n" in captured.out and "messages: too long" in captured.err
