"""Somebody who types what a page says into a terminal, in a folder with the files that the page takes for given."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from isthmus.commands.main import main
from isthmus.model.config import LoraConfig
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.text.tokenizer import END_OF_TEXT
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.huggingface.adapters import save_adapter
from isthmus.model.weights.lora import split
from tests.docs.pages import Block, statements
from tests.serve.api.harness import CHAT_TEMPLATE, NETWORK, save_model, train_tokenizer, varied_params
from tests.support import narrowest_dtype, random_params

PATIENCE = 600.0
"""Seconds that anything may take before a test calls it stuck."""
PORT = "50051"
"""The port that pages use, as it is the default; each reader has one of their own instead."""

TINY = "--model.dim 32 --model.layers 2 --model.heads 4 --model.kv-heads 2 --model.head-dim 8 --model.mlp-dim 64"
SHORT = "--batch 8 --text.seq 64 --text.vocab-size 300"
SMALL = "--engine.max-sequences 2 --engine.prefill-tokens 32 --engine.draft-rows 2"
EIGHT_DEVICES = "XLA_FLAGS=--xla_force_host_platform_device_count=8"
REPLACEMENTS = (
    # pattern, what is typed in its place
    (r"(isthmus train .*--preset) \S+", rf"\1 5m --steps 3 {TINY} {SHORT}"),
    (r"(isthmus bench step .*--preset) \S+", rf"\1 nano --repeats 3 --warmup 1 --overhead-tokens 8 {SMALL}"),
    (r"--init (\S+)", r"--init \1 --steps 3 --batch 4 --text.seq 64"),
    (r"--steps \d\d+", "--steps 3"),
    (r"(isthmus train .*--mesh)", rf"{EIGHT_DEVICES} \1"),
    (r"steps=\d+, batch=\d+", "steps=2, batch=1"),
    (r"(isthmus convert .*--quantize \S+)", r"\1 --windows 2 --calibration 2 --force"),
    (r"isthmus serve", f"isthmus serve --port 50051 {SMALL}"),
    (r"isthmus generate", "isthmus generate --address 127.0.0.1:50051 --max-tokens 8"),
    (r"(isthmus generate .*--model \S+)", rf"\1 {SMALL}"),
    (r"import LLM\b(.*)", r"import LLM\1, EngineConfig"),
    (r"\bLLM\((\S+)\)", r"LLM(\1, engine=EngineConfig(2, prefill_tokens=32, draft_rows=2, steps_per_launch=1))"),
    (r"max_tokens=\d+", "max_tokens=8"),
)
"""Sizes and steps that a test has time for. Where an option is given twice, the later one counts."""

_SERVES = re.compile(r"(\w+=\S+ +)*isthmus serve ")


# Files


def write_files(folder: Path) -> None:
    """All that pages take for given: texts, a model that was trained here, and a published one."""
    words = [f"The {n}th sentence says that {n * n} is the square of {n}." for n in range(900)]
    (folder / "notes").mkdir()
    for name, part in {"notes/one.md": words[:80], "notes/two.txt": words[80:160], "book.txt": words[160:400]}.items():
        (folder / name).write_text("\n".join(part))
    (folder / "prose.txt").write_text(" ".join(words))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    (folder / "chats.jsonl").write_text("".join(_conversation(n) for n in range(100)))
    trained = save_model(folder / "runs" / "mine", train_tokenizer(), varied_params())
    for seed, name in enumerate(("poems", "code")):
        config = dataclasses.replace(NETWORK, lora=LoraConfig(4))
        _, adapter = split(config, random_params(config, build_mesh(MeshShape()), seed))
        save_adapter(folder / "runs" / name, open_folder(trained), config, adapter)
    published = folder / "SmolLM2-135M-Instruct"
    assert main(["convert", str(trained), str(published)]) == 0
    (published / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (published / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": END_OF_TEXT}}))


def _conversation(n: int) -> str:
    turns = {"user": f"What is {n} plus {n}?", "assistant": f"{n} plus {n} is {n + n}."}
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    return json.dumps({"messages": messages}) + "\n"


# The reader


class Reader:
    """Runs blocks in a folder, one after the other. A server that a block starts runs until the next one starts."""

    def __init__(self, folder: Path, programs: Path) -> None:
        """programs: an empty folder, for commands that the reader finds on the PATH."""
        self._folder, self._port = folder, _free_port()
        self._server: subprocess.Popen[bytes] | None = None
        _write_program(programs / "isthmus", "-m isthmus")
        _write_program(programs / "python", "")
        path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        self._environment = {**os.environ, "PATH": os.pathsep.join(path), "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
        del self._environment["XLA_FLAGS"]  # a reader has one CPU device, where a page doesn't say otherwise

    def run(self, block: Block) -> None:
        """Fails with what was printed where a command doesn't end with the status 0."""
        code = self._typed(block.code)
        if block.language == "python":
            self._execute(block, [sys.executable, "-c", code], code)
            return
        for script in _scripts(code):
            if _SERVES.match(script):
                self._serve(block, script)
            else:
                self._execute(block, ["bash", "-euo", "pipefail", "-c", script], script)

    def stop(self) -> None:
        """Ends the server as Ctrl-C in its terminal would. Fails unless it drains."""
        if (server := self._server) is None:
            return
        self._server = None
        server.send_signal(signal.SIGTERM)
        try:
            assert server.wait(PATIENCE) == 0, self._log.read_text()
        finally:
            server.kill()

    @property
    def _log(self) -> Path:
        return self._folder / "serve.log"

    def _typed(self, code: str) -> str:
        """The code with what a test has no time for, what this jax can't compute in, and the port replaced."""
        for pattern, replacement in (*REPLACEMENTS, ("dtype bfloat16", f"dtype {narrowest_dtype()}")):
            code = re.sub(pattern, replacement, code)
        return code.replace(PORT, str(self._port))

    def _execute(self, block: Block, command: list[str], code: str) -> None:
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"{block} ended with status {done.returncode}:\n{code}\n{done.stdout}"

    def _serve(self, block: Block, statement: str) -> None:
        self.stop()
        command = ["bash", "-c", f"exec env {statement}"]
        with self._log.open("wb") as log:
            self._server = subprocess.Popen(
                command, cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE
        while "SERVING on" not in (printed := self._log.read_text(errors="replace")):
            assert self._server.poll() is None, f"{block}: the server ended:\n{statement}\n{printed}"
            assert time.monotonic() < deadline, f"{block}: the server never served:\n{statement}\n{printed}"
            time.sleep(0.05)


@contextlib.contextmanager
def reader(folder: Path, programs: Path) -> Iterator[Reader]:
    """A Reader whose server ends with it."""
    one = Reader(folder, programs)
    try:
        yield one
    finally:
        one.stop()


def _scripts(code: str) -> Iterator[str]:
    """The statements of a block: each server by itself, what lies between them together."""
    together: list[str] = []
    for statement in statements(code):
        if _SERVES.match(statement):
            if together:
                yield "\n".join(together)
            yield statement
            together = []
        else:
            together.append(statement)
    if together:
        yield "\n".join(together)


def _write_program(path: Path, arguments: str) -> None:
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
    path.chmod(0o755)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def copy_of(folder: Path, target: Path, without: tuple[str, ...]) -> Path:
    """A copy of the files, without those that a page makes itself."""
    shutil.copytree(folder, target)
    for name in without:
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return target
