"""What a client reads behind its prompt, from models with the tokenizers of Llama 2 and Gemma."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.commands.main import main
from isthmus.model.text.tokenizer import Tokenizer
from tests.model.text.tokenizers import llama2
from tests.serve.api.conftest import StartServer
from tests.serve.api.harness import PATIENCE, RunningServer, collect, cycle, save_model, scripted_params
from tests.support import without_progress

TOKENIZER = Tokenizer(llama2())
WRITTEN = ["▁a", "b", "▁", "<0xE2>", "<0x82>", "<0xAC>", "<0x80>", "!", "<0xC3>", "é"]
"""What the model goes through, over and over: words, a euro sign that the byte after it spoils, half a character"""


def ids_of(*tokens: str) -> list[int]:
    ids = [TOKENIZER.token_id(token) for token in tokens]
    return [token for token in ids if token is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    params = scripted_params(cycle(ids_of(*WRITTEN)))
    return save_model(tmp_path_factory.mktemp("models") / "text", TOKENIZER, params)


@pytest.fixture(scope="module")
def text_server(start_server: StartServer, folder: Path) -> RunningServer:
    return start_server(model=folder)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 9, 10, 25])
@pytest.mark.parametrize(
    "prompt", [["▁"], ["b"], ["▁a"], ["<0x82>"], ["<0xE2>"], ["a", "<0xE2>", "<0x82>"], ["!", "é"]]
)
def test_prompt_and_answer_are_one_text(prompt: list[str], count: int, text_server: RunningServer) -> None:
    """The space between them was lost, and bytes that are no UTF-8 ended the call as UNKNOWN."""
    ids = ids_of("<s>", *prompt)
    with text_server.client() as client:
        whole = client.generate(ids, max_tokens=count, temperature=0.0, timeout=PATIENCE)
        streamed = collect(client.stream(ids, max_tokens=count, temperature=0.0, timeout=PATIENCE))
        assert streamed.text == whole.text
        assert len(whole.token_ids) == count
        before, both = client.detokenize(ids), client.detokenize([*ids, *whole.token_ids])
        lost = len(before) - len(before.rstrip("\ufffd"))
        assert both in {before[: len(before) - unfinished] + whole.text for unfinished in range(lost + 1)}


def test_generate_prints_prompt_and_answer_as_one_text(
    folder: Path, text_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """It printed "helloworld"; and it drew at 0.8, 0.95, whatever the model's makers recommend."""
    text = ["é", "--max-tokens", "2"]
    (folder / "generation_config.json").write_text("{}")  # greedy
    small = ["--engine.max-sequences", "1", "--engine.prefill-tokens", "32", "--engine.draft-rows", "0"]
    for where in (["--model", str(folder), *small], ["--address", text_server.address, "--temperature", "0"]):
        assert main(["generate", *text, *where]) == 0
        captured = capsys.readouterr()
        assert (captured.out, without_progress(captured.err)) == ("é ab\n", "")


def test_generate_warns_of_a_special_token_that_is_taken_for_text(
    text_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversation written out by hand would get garbage for an answer, without a word."""
    words = ["generate", "<|turn|>é", "--max-tokens", "2", "--temperature", "0", "--address", text_server.address]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out == "<|turn|>é ab\n" and "<|turn|> in the prompt is taken for text" in captured.err
    assert main([*words, "--parse-special"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("<|turn|>é ab\n", "")
