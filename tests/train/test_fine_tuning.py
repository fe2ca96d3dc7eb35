"""From a published folder to a tuned one, by the command line: what comes out opens, serves and can go on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.commands.convert import main as convert
from isthmus.commands.train import main, parse
from isthmus.model.config import MixtureConfig, ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights import lora
from isthmus.model.weights.checkpoint import Checkpoints
from isthmus.model.weights.folder import ModelFolder, open_folder
from isthmus.model.weights.layout import unstack_params
from isthmus.train.config import DataConfig, OptimizerConfig, TrainConfig
from isthmus.train.data import TokenFile, TrainingData
from isthmus.train.loop import train
from isthmus.train.metrics import read_metrics
from isthmus.train.optimizer import build_optimizer
from isthmus.train.resume import load_saved, save_settings
from isthmus.train.step import Trainer
from tests.support import forward, on_host, random_params
from tests.train.chat_model import END, write_chat_model, write_chats

STEPS, KILLED_AFTER = 12, 6
SETTINGS = (
    *("--steps", str(STEPS), "--batch", "4", "--text.seq", "32", "--text.heldout-fraction", "0.2", "--mesh", "dp=1"),
    *(
        "--scan-layers",
        "--optimizer.lr",
        "0.01",
        "--optimizer.warmup-steps",
        "2",
        "--checkpoint-every",
        "4",
        "--eval-every",
        "0",
    ),
)
LORA = ("--model.lora.rank", "4", "--model.lora.targets", "attention/query|mlp/(up|down)")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, chats.jsonl, and what the runs of this module left: full/, adapter/."""
    folder = tmp_path_factory.mktemp("tuning")
    write_chat_model(folder / "model")
    write_chats(folder / "chats.jsonl")
    return folder


def words(room: Path, out: str, *more: str) -> list[str]:
    return ["--init", str(room / "model"), str(room / "chats.jsonl"), "--out", str(room / out), *SETTINGS, *more]


@pytest.fixture(scope="module")
def full(room: Path) -> Path:
    assert main(words(room, "full")) == 0
    return room / "full"


@pytest.fixture(scope="module")
def adapter(room: Path) -> Path:
    assert main(words(room, "adapter", *LORA)) == 0
    return room / "adapter"


def heldout_loss(folder: ModelFolder, data: Path, mesh: Mesh) -> float:
    """Nats a target of the held-out split in the run `data`, by the model in `folder`."""
    split = TokenFile.open(data / "data" / "heldout")
    trainer = Trainer(folder.config, build_optimizer(OptimizerConfig(), 1, folder.config), mesh)
    params, trainer.base = folder.load_params(mesh), None
    if folder.config.lora.rank:
        trainer.base, params = lora.split(folder.config, params)
    batches = TrainingData(split, split, 32, 0).heldout_batches(4)
    return sum(float(trainer.evaluate(params, batch)) for batch in batches) / split.targets


def test_a_full_run_leaves_a_model_that_learnt(full: Path, room: Path, mesh: Mesh) -> None:
    """And one that is served as its source was: template, end of turn, and the way back to its family."""
    source, tuned = open_folder(room / "model"), open_folder(full)
    before, after = heldout_loss(source, full, mesh), heldout_loss(tuned, full, mesh)
    assert after < before - 1
    assert read_metrics(full)[-1]["heldout_loss"] == pytest.approx(after, rel=1e-4)
    assert tuned.config == source.config and tuned.family is None
    assert tuned.tokenizer.eos_ids == source.tokenizer.eos_ids == {2, 4}
    assert tuned.end_id == source.end_id == source.tokenizer.token_id(END)
    assert tuned.tokenizer.vocab_size == source.tokenizer.vocab_size and tuned.generation == source.generation
    assert tuned.chat is not None and source.chat is not None and tuned.chat.source == source.chat.source
    assert (full / "huggingface.json").read_bytes() == (room / "model" / "config.json").read_bytes()


def test_without_settings_for_it_a_fine_tuned_folder_ends_where_its_source_did(full: Path, tmp_path: Path) -> None:
    """Most base models say in config.json alone what ends a text."""
    for name in ("config.json", "tokenizer.json", "huggingface.json"):
        (tmp_path / name).write_bytes((full / name).read_bytes())
    assert open_folder(tmp_path).tokenizer.eos_ids == {2}


def test_an_adapter_run_leaves_an_adapter(adapter: Path, room: Path, mesh: Mesh) -> None:
    """What PEFT and `isthmus serve --model` read is what was trained."""
    source, tuned = open_folder(room / "model"), open_folder(adapter)
    assert not (adapter / "config.json").exists() and tuned.adapter == adapter
    assert tuned.config.lora.rank == 4 and tuned.tokenizer.eos_ids == {2, 4}
    assert heldout_loss(tuned, adapter, mesh) < heldout_loss(source, adapter, mesh) - 0.5
    base, adapters = lora.split(tuned.config, tuned.load_params(mesh))
    jax.tree.map(np.testing.assert_array_equal, on_host(base), on_host(source.load_params(mesh)))
    config = dataclasses.replace(source.config, lora=parse(["--resume", "--out", str(adapter)]).model.lora)
    abstract = Trainer(config, build_optimizer(OptimizerConfig(), 1, config), mesh).abstract_state(stacked=True)
    assert all(path.startswith("blocks/0-4/") for path in abstract.params)
    checkpoints = Checkpoints(adapter)
    stored = checkpoints.newest_params()
    stored.check(abstract.params)
    saved = unstack_params({path: stored.read(path, leaf) for path, leaf in abstract.params.items()})
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, on_host(adapters), on_host(saved))
    tokens = [[3, 5, 7, 9, 11]]
    theirs, ours = (forward(f.config, f.load_params(mesh), tokens) for f in (source, tuned))
    assert np.abs(ours - theirs).max() > 0.1


def test_a_killed_adapter_run_goes_on_as_if_it_had_not_been(adapter: Path, room: Path) -> None:
    """Its checkpoints hold no base: --resume reads that again from --init."""
    out = room / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "isthmus", "train", *words(room, "killed", *LORA)], env=os.environ
    )
    deadline = time.monotonic() + 240
    while max((row["step"] for row in read_metrics(out)), default=0) < KILLED_AFTER:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert main(["--resume", "--out", str(out)]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    for name in ("loss", "heldout_loss"):
        ours, theirs = ([row[name] for row in read_metrics(run) if name in row] for run in (out, adapter))
        assert ours == theirs


def test_the_settings_come_back(adapter: Path, room: Path) -> None:
    saved = TrainConfig.from_json((adapter / "train.json").read_text())
    assert saved.init == room / "model" and saved.model.lora.rank == 4
    assert TrainConfig.from_json(saved.to_json()) == saved
    assert TrainConfig.from_json(TrainConfig().to_json()) == TrainConfig()


def test_the_settings_of_a_run_before_this_version_come_back() -> None:
    """They told how a model is computed and trained among what it is; --resume goes on as the run began."""
    execution, optimizer = Execution("bfloat16", scan_layers=True, remat="dots"), OptimizerConfig(correction_rate=0.5)
    saved = TrainConfig(execution=execution, optimizer=optimizer)
    fields = json.loads(saved.to_json())
    fields["model"].update(fields.pop("execution"))
    fields["model"]["mixture"]["correction_rate"] = fields["optimizer"].pop("correction_rate")
    assert TrainConfig.from_json(json.dumps(fields)) == saved
    del fields["model"]["mixture"], fields["model"]["latent"]  # from before there were any
    want = dataclasses.replace(saved, optimizer=OptimizerConfig())
    assert TrainConfig.from_json(json.dumps(fields)) == want


def test_a_fine_tuned_model_can_be_tuned_again(full: Path, room: Path, tmp_path: Path) -> None:
    """In our own format too, and texts as well as conversations; what its source published stays with it."""
    data = tmp_path / "mixed.jsonl"
    texts = "".join(json.dumps({"text": f"line {index} of a text."}) + "\n" for index in range(8))
    data.write_text((room / "chats.jsonl").read_text() + texts)
    out = tmp_path / "again"
    words = ["--init", str(full), str(data), "--out", str(out), *SETTINGS]
    assert main(words) == 0
    assert (out / "huggingface.json").read_bytes() == (full / "huggingface.json").read_bytes()
    assert open_folder(out).tokenizer.eos_ids == {2, 4}
    assert read_metrics(out)[0]["loss"] < 4, "it did not start from what the first run had learnt"


def test_a_mixture_of_experts_trains_and_balances(tmp_path: Path, mesh: Mesh) -> None:
    """The correction is moved by the load, not by a gradient: nothing else shows that it is alive."""
    text, source, out = tmp_path / "text.txt", tmp_path / "model", tmp_path / "out"
    text.write_text("one two three four five six seven. " * 30)
    source.mkdir()
    mixture = MixtureConfig(experts=4, per_token=2, dim=16, scores="sigmoid", correction=True)
    config = ModelConfig(
        vocab_size=260,
        dim=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp_dim=16,
        context_length=16,
        mixture=mixture,
    )
    config.save(source / "config.json")
    Tokenizer.train([], 257).save(source / "tokenizer.json")
    checkpoints = Checkpoints(source)
    before = random_params(config, mesh, stacked=True)
    checkpoints.save(1, before, {"count": np.zeros((), np.int32)}, {"step": 1})
    checkpoints.close()
    start = TrainConfig((str(text),), out, source, model=config, text=DataConfig(seq=16), steps=4, batch=4, mesh="dp=1")
    report = train(start)
    assert math.isfinite(report.loss) and report.bits_per_byte is not None
    loads = [row["expert_load"] for row in read_metrics(out) if "expert_load" in row]
    assert len(loads) == 4 and all(1 <= load <= 4 for load in loads)
    after = open_folder(out).load_params(mesh)["blocks/0/mlp/router/correction"]
    moved = np.asarray(after - before["blocks/0-0/mlp/router/correction"][0])
    moves = moved / start.optimizer.correction_rate
    np.testing.assert_allclose(moves, np.round(moves), atol=1e-2)
    assert moves.any() and np.abs(moves).max() < 4.5


# what can't work


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--model.layers", "3"], "model.layers can't be set with --init: it is 5"),
        (["--model.vocab-size", "0"], "model.vocab_size"),
        (["--model.rope-scaling.factor", "2"], "model.rope_scaling.factor"),
        (["--preset", "5m"], "preset can't be set with --init"),
        (["--text.seq", "97"], "text.seq=97 must be 1 to model.context_length=96"),
        (["--text.tokenizer", "mine.json"], "text.tokenizer"),
        (["--model.lora.rank", "-1"], "model.lora.rank"),
        (["--model.lora.rank", "4", "--model.lora.targets", "mlp/gait"], "model.lora.targets"),
        (["--init", "/nowhere"], "/nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_setting_that_does_not_go_with_a_model_is_named(
    room: Path, change: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is computed, and without a trace of a run."""
    assert main(words(room, "refused", *change)) == 2
    assert named in " ".join(capsys.readouterr().out.split())
    assert not (room / "refused" / "train.json").exists()


def test_what_changes_no_answer_may_be_set(room: Path) -> None:
    """How a model is trained is the user's business."""
    change = ["--remat", "full", "--scan-layers", "--dtype", "bfloat16", "--model.lora.rank", "2"]
    config = parse(words(room, "free", *change))
    assert config.execution == Execution("bfloat16", scan_layers=True, remat="full") and config.model.lora.rank == 2


def test_the_learning_rate_is_one_for_tuning(room: Path) -> None:
    """That of a network which is trained from nothing would erase what the model knows."""
    plain = ["--init", str(room / "model"), "data.jsonl"]
    assert parse(plain).optimizer.lr == 2e-5
    assert parse([*plain, "--model.lora.rank=8"]).optimizer.lr == 2e-4
    assert parse(["data.jsonl"]).optimizer.lr == TrainConfig().optimizer.lr


def test_adapters_need_a_model(tmp_path: Path, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(room / "chats.jsonl")
    assert main([data, "--out", str(tmp_path / "out"), "--model.lora.rank", "4"]) == 2
    assert "model.lora.rank needs --init" in capsys.readouterr().out


def test_a_model_is_not_written_over(room: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--out of habit where the download lies would cost the download."""
    before = (room / "model" / "config.json").read_bytes()
    assert main([*words(room, "model")]) == 2
    assert "out:" in capsys.readouterr().out
    assert (room / "model" / "config.json").read_bytes() == before
    assert main(["--init", str(adapter), str(room / "chats.jsonl"), "--out", str(room / "more")]) == 2
    assert "is an adapter" in capsys.readouterr().out


def test_a_field_that_is_ignored_stays_so(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever the published configuration is read again: when the run goes on, and on the way back to its family."""
    shutil.copytree(room / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_magic": 3, "other_magic": 0}))
    sizes = ("--steps", "1", "--batch", "2", "--text.seq", "32", "--text.heldout-fraction", "0.2", "--mesh", "dp=1")
    start = ("--init", str(tmp_path / "model"), str(room / "chats.jsonl"), "--out", str(tmp_path / "out"), *sizes)
    assert main(start) == 2 and "--ignore-field attention_magic" in capsys.readouterr().out.replace("\n", "")
    assert main([*start, "--ignore-field", "attention_magic"]) == 0
    assert capsys.readouterr().out.count("other_magic=0 is unknown") == 1
    assert main(["--resume", "--out", str(tmp_path / "out")]) == 0
    again = parse(["--resume", "--out", str(tmp_path / "out"), "--ignore-field", "attention_magic"])
    assert again.ignore_field == ("attention_magic",)
    back = [str(tmp_path / "out"), str(tmp_path / "back")]
    assert convert(back) == 2
    assert convert([*back, "--ignore-field", "attention_magic"]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["attention_magic"] == 3


def test_a_run_goes_on_from_the_model_that_its_name_stood_for(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer version that comes into the cache meanwhile is another model, and --resume asks nobody for one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, out = tmp_path / "hub" / "models--Org--Name", tmp_path / "out"
    snapshot = repository / "snapshots" / "first"
    shutil.copytree(room / "model", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("first")
    sizes = ("--steps", "1", "--batch", "2", "--text.seq", "32", "--text.heldout-fraction", "0.2", "--mesh", "dp=1")
    assert main(["--init", "Org/Name", str(room / "chats.jsonl"), "--out", str(out), *sizes]) == 0
    assert load_saved(out).init == snapshot
    save_settings(dataclasses.replace(load_saved(out), download=True), out)
    assert not parse(["--resume", "--out", str(out)]).download
    assert parse(["--resume", "--download", "--out", str(out)]).download


def test_a_flag_may_be_spelt_with_either_line(room: Path, tmp_path: Path) -> None:
    """The command line takes both; what is looked for before it is read must, too."""
    shutil.copytree(room / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_magic": 3}))
    for words in (["--ignore-field", "attention_magic"], ["--ignore_field", "attention_magic"]):
        assert parse(["--init", str(tmp_path / "model"), "text", *words]).ignore_field == ("attention_magic",)
