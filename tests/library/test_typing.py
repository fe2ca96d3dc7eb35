"""A user's own type checker sees what the library takes and gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RIGHT = """
from typing import assert_type
from isthmus import LLM, AsyncClient, AsyncModel, Client, Completion, Delta, Model, RequestError, SamplingParams
from isthmus import TrainConfig, train
from isthmus.protocol import AsyncModel as TheSame

def sync(llm: LLM, client: Client, ids: list[list[int]], talk: list[dict[str, str]]) -> None:
    models: list[Model] = [llm, client]
    for model in models:
        assert_type(model.generate("a", temperature=0.5), Completion)
        assert_type(model.generate([1, 2], SamplingParams(seed=1)), Completion)
        assert_type(model.generate(["a", "b"], max_tokens=3), list[Completion])
        assert_type(model.generate(ids), list[Completion])
        assert_type(model.generate(["a"], return_errors=True), list[Completion | RequestError])
        assert_type(model.chat(talk), Completion)
        assert_type(model.chat([talk, talk]), list[Completion])
        for delta in model.stream(talk, timeout=3.0):
            assert_type(delta, Delta)
        assert_type(model.detokenize(model.tokenize("a", parse_special=True)), str)
    assert_type(client.generate("a"), Completion)
    assert_type(llm.generate(["a"]), list[Completion])

async def asynchronous(llm: LLM, client: AsyncClient, talk: list[dict[str, str]]) -> None:
    models: list[AsyncModel] = [llm.aio, client]
    for model in models:
        assert_type(await model.generate("a"), Completion)
        assert_type(await model.generate(["a"]), list[Completion])
        assert_type(await model.generate(["a"], return_errors=True), list[Completion | RequestError])
        assert_type(await model.chat([talk]), list[Completion])
        async for delta in model.stream("a"):
            assert_type(delta.completion, Completion | None)
    same: TheSame = client

def training() -> float:
    return train(TrainConfig(steps=1)).loss
"""

WRONG = {
    'llm.generate("a", temprature=0)': "temprature",
    'llm.generate("a", temperature="hot")': "No overload",
    'llm.generate("a", return_errors=True)': "No overload",
    "llm.generate(3)": "No overload",
    'llm.generate("a").txt': 'has no attribute "txt"',
    'len(llm.generate("a"))': "len",
    'SamplingParams(max_tokens="3")': "max_tokens",
    'LLM("m", dtype="float16")': "dtype",
    'client.stream("a", progress=True)': "progress",
}


def mypy(folder: Path, text: str) -> tuple[int, str]:
    script = folder / "script.py"
    script.write_text(text)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--cache-dir",
        str(ROOT / ".mypy_cache" / "library"),
        str(script),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_script_that_is_right_passes(tmp_path: Path) -> None:
    """All four satisfy their protocol, one prompt gives one completion, and a list gives a list."""
    status, said = mypy(tmp_path, RIGHT)
    assert status == 0, said


@pytest.mark.slow
def test_a_script_that_misuses_an_argument_is_told(tmp_path: Path) -> None:
    """Without types a misspelt option is found in the night that the batch runs."""
    lines = "\n".join(f"    {line}" for line in WRONG)
    text = f"from isthmus import LLM, Client, SamplingParams\n\ndef work(llm: LLM, client: Client) -> None:\n{lines}\n"
    status, said = mypy(tmp_path, text)
    assert status == 1
    for number, (line, word) in enumerate(WRONG.items(), 4):
        found = [message for message in said.splitlines() if f"script.py:{number}: error" in message]
        assert any(word in message for message in found), f"{line}: {said}"


@pytest.mark.parametrize(
    "name", ["Client", "AsyncClient", "SamplingParams", "Completion", "RequestError", "Model", "train"]
)
def test_what_needs_no_jax_imports_none(name: str) -> None:
    """A program that calls a server would wait seconds for a compiler that it never uses, and need it installed."""
    code = f"import sys; from isthmus import {name}; print('jax' in sys.modules, callable({name}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_every_name_is_there_and_listed() -> None:
    import isthmus

    for name in isthmus.__all__:
        assert getattr(isthmus, name) is not None
    assert set(isthmus.__all__) == {*isthmus._MODULES, "train"} == set(dir(isthmus))
    with pytest.raises(AttributeError, match="no attribute 'LM'"):
        isthmus.LM  # noqa: B018
