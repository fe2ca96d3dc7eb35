"""Commands that are told to end, at every stage: they end at once, say so, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from isthmus import Client
from isthmus.commands.main import COMMANDS
from tests.model.weights.huggingface.folders import write_folder
from tests.serve.api.harness import (
    PATIENCE,
    SERVING,
    check_health,
    save_model,
    train_tokenizer,
    varied_params,
    wait_for,
)
from tests.support import without_progress

ROOT = Path(__file__).parents[1]
ISTHMUS = Path(sys.executable).with_name("isthmus")

TOLD = """
import os, signal, sys, threading
name, kind, where, *words = sys.argv[1:]
number = getattr(signal, name)
signal.signal(number, signal.SIG_DFL if name != "SIGINT" else signal.default_int_handler)  # whatever ran the tests
told = False
module, _, function = where.partition(":")

def tell():
    global told
    if not told:
        told = True
        os.kill(os.getpid(), number)

class Imports:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            tell()

def calls(frame, event, argument):
    if event == "call" and frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
        tell()

if kind == "import":
    sys.meta_path.insert(0, Imports())
else:
    threading.setprofile(calls)
    sys.setprofile(calls)
if words[0] == "python -m isthmus":
    import runpy
    sys.argv = words
    runpy.run_module("isthmus", run_name="__main__", alter_sys=True)
from isthmus.commands.main import main
sys.argv = ["isthmus", *words]
status = main()
print("never told" if not told else "told, and went on")
sys.exit(status)
"""
"""A command that sends itself a signal when a module is first imported, or a function first called: always the same
stage, however fast the machine."""


@dataclass(frozen=True)
class Ended:
    status: int
    printed: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    return save_model(tmp_path_factory.mktemp("stopping") / "model", train_tokenizer(), varied_params())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("stopping") / "published", "llama3")


def tell(number: str, stage: str, *words: object, home: Path | None = None) -> Ended:
    """Runs `isthmus WORDS`, told by a signal at the stage "import MODULE" or "call MODULE:FUNCTION"."""
    done = subprocess.run(
        [sys.executable, "-c", TOLD, number, *stage.split(), *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "1000", **({} if home is None else {"HOME": str(home)})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    return Ended(done.returncode, done.stdout)


def check(ended: Ended, status: int = 130) -> None:
    assert ended.status == status, ended.printed
    assert ended.printed.rstrip().endswith("stopped"), ended.printed
    for word in ("Traceback", "Exception ignored", "Error", "SERVING"):
        assert word not in ended.printed


WORDS = {name: [name] for name in COMMANDS} | {"bench": ["bench", "step"], "kernels": ["kernels", "list"]}
WORDS |= {"train": ["train", "text"], "serve": ["serve", "--model", "m"], "convert": ["convert", "a", "b"]}
WORDS |= {"generate": ["generate", "a", "--model", "m"], "python -m isthmus": ["python -m isthmus", "train", "text"]}


@pytest.mark.parametrize("command, module", [*((name, "numpy") for name in WORDS), ("serve", "jax.numpy")])
def test_ctrl_c_while_modules_are_imported(command: str, module: str) -> None:
    """The first seconds: an interrupt there was swallowed, and a server came up, or it was a traceback."""
    check(tell("SIGINT", f"import {module}", *WORDS[command]))


@pytest.mark.parametrize(
    "stage, number, status",
    [
        ("call isthmus.serve.engine.build:open_model", "SIGHUP", 129),
        ("call isthmus.serve.engine.build:load_served", "SIGTERM", 143),  # on the thread that loads
        ("call isthmus.serve.engine.programs:compile_steps", "SIGINT", 130),  # on the one that compiles
    ],
)
def test_a_server_that_loads(folder: Path, stage: str, number: str, status: int) -> None:
    """The event loop, a thread that loads and one that compiles are all there, and none can be joined."""
    check(tell(number, stage, "serve", "--model", folder, "--port", 0), status)


@pytest.mark.parametrize(
    "stage", ["call isthmus.serve.engine.build:load_served", "call isthmus.serve.engine.engine:submit"]
)
def test_generating_here(folder: Path, stage: str) -> None:
    small = ["--engine.max-sequences", 1, "--engine.prefill-tokens", 32, "--engine.draft-rows", 0]
    check(tell("SIGINT", stage, "generate", "a", "--model", folder, *small))


def test_calling_a_server_that_does_not_answer() -> None:
    """The address is nobody's: connecting waits."""
    check(tell("SIGINT", "call isthmus.client:follow", "generate", "a", "--address", "10.255.255.1:1"))


@pytest.mark.parametrize(
    "stage, words, number, status",
    [
        ("call isthmus.model.weights.load:load_params", ["--to", "isthmus"], "SIGINT", 130),
        ("call isthmus.model.weights.huggingface.export:write_weights", ["--to", "huggingface"], "SIGTERM", 143),
        pytest.param(
            *("call isthmus.quality.compare:compare", ["--quantize", "int8", "--text", "{text}"], "SIGINT", 130),
            marks=pytest.mark.slow,
        ),
        ("call isthmus.model.weights.checkpoint:save", ["--to", "isthmus"], "SIGTERM", 143),
    ],
)
def test_a_conversion_leaves_nothing(
    published: Path, tmp_path: Path, stage: str, words: list[str], number: str, status: int
) -> None:
    """What looks like a model and isn't whole is worse than none, and so are gigabytes of it."""
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    words = [word.format(text=text) for word in words]
    check(tell(number, stage, "convert", published, tmp_path / "target", *words), status)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_training_before_its_first_step(tmp_path: Path) -> None:
    """From the first step on the run saves a checkpoint when it is told; before, there is nothing to save."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 600)
    words = ["train", tmp_path / "text.txt", "--out", tmp_path / "out", "--preset", "5m"]
    check(tell("SIGINT", "call isthmus.train.data:prepare", *words))


def test_compiling_the_kernels_leaves_nothing(tmp_path: Path) -> None:
    check(tell("SIGINT", "call isthmus.model.ops.cpu.library:_compile", "kernels", "build", home=tmp_path))
    assert not list((tmp_path / ".cache/isthmus/kernels").iterdir())


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for the process in /proc")
def test_a_server_ends_with_who_started_it(folder: Path, tmp_path: Path) -> None:
    """The demo's, or a benchmark's: it would keep its memory and its cores, and nobody knows of it."""
    code = f"""
import os, signal, sys
from pathlib import Path
from isthmus.benchmarks import servers
from isthmus.model.process.command import run

def work():
    with servers.isthmus_server(["--model", {str(folder)!r}], Path({str(tmp_path / "log")!r})):
        raise AssertionError("it was told before")

servers._wait_until_healthy = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(run(work))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr

    def servers() -> list[Path]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                found += [process] if str(folder).encode() in (process / "cmdline").read_bytes() else []
        return found

    wait_for(lambda: not servers(), "the end of the server")


def test_told_twice_it_does_not_clean_up_again() -> None:
    """Cleaning may take its time on a slow disk; who is in a hurry tells it once more."""
    code = """
import os, signal
from isthmus.model.process.cleaning import cleaning
from isthmus.model.process.signals import stop_at_once
stop_at_once()
with cleaning(lambda: os.kill(os.getpid(), signal.SIGTERM)), cleaning(lambda: print("cleaned", flush=True)):
    os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned\n", "")


def test_what_is_ignored_stays_ignored() -> None:
    """nohup isthmus …"""
    code = """
import os, signal
from isthmus.model.process.signals import stop_at_once
signal.signal(signal.SIGHUP, signal.SIG_IGN)
stop_at_once()
os.kill(os.getpid(), signal.SIGHUP)
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "still here\n"), done.stderr


# Nobody reads


def closed_pipe() -> int:
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(
    "words",
    [
        lambda folder: ["--help"],
        lambda folder: ["--version"],
        lambda folder: ["kernels", "list"],
        lambda folder: ["serve", "--help"],
        lambda folder: ["generate", "a", "--model", folder, "--max-tokens", "3"],
        pytest.param(
            lambda folder: ["generate", "--chat", "a", "--model", folder, "--max-tokens", "3"], marks=pytest.mark.slow
        ),
    ],
    ids=["help", "version", "kernels", "help of a command", "generate", "chat"],
)
def test_nobody_reads_what_it_prints(folder: Path, words: Callable[[Path], list[object]]) -> None:
    """isthmus … | head -1: the command ends, and a shell's pipeline has nothing to complain about."""
    template = folder / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    writing = closed_pipe()
    try:
        done = subprocess.run(
            [ISTHMUS, *map(str, words(folder))],
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
        )
    finally:
        os.close(writing)
        template.unlink()
    assert done.returncode in (1, 141) and without_progress(done.stderr) == ""


def test_a_server_goes_on_when_nobody_reads_its_log(folder: Path) -> None:
    """isthmus serve … | head -1 would take down what others call."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    writing = closed_pipe()
    words = ["serve", "--model", str(folder), "--port", str(port), "--engine.max-sequences", "1"]
    process = subprocess.Popen([ISTHMUS, *words], stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    try:
        with Client(f"127.0.0.1:{port}") as client:
            grpc.channel_ready_future(client.channel).result(PATIENCE)
            wait_for(lambda: check_health(client.channel) == SERVING, "the server")
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        _, errors = process.communicate()
    assert b"Traceback" not in errors and b"Exception" not in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_what_it_prints_is_said() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([ISTHMUS, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
