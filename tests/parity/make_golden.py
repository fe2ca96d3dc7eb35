"""Run by the peers' Python: writes golden/FAMILY/ from torch and transformers, in float32 and eager mode.

    python tests/parity/make_golden.py [--out DIR] [--seed N] [--families a,b] [--folders]

A family's seed is the first from N whose greedy tokens and routed experts are clear of rounding. FAMILY/ gets
config.json, config_v4.json (the same with the keys of transformers 4), manifest.json, golden.npz and grad_norms.json;
`--folders` adds model.safetensors, which makes it a folder that from_pretrained loads.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from check_export import load
from golden_families import COMMON, FAMILIES, FIRST_TOKEN, VOCAB, Family, published_config
from weights import random_tensors

LENGTHS = (1, 7, 30, 60)
PROMPT_LENGTHS = (4, 11, 26)
NEW_TOKENS = 64
TRAIN_SHAPE = (2, 33)
MIN_TOKEN_MARGIN = 1e-3
"""Of the two best logits, relative to the best: rounding in float32 moves logits by less than a hundredth of it"""
MIN_ROUTER_MARGIN = 2e-4
"""Of the last expert taken and the first left out, relative to the scores' deviation"""
MIN_DISTINCT = 8
"""Different tokens in each greedy completion: one that repeats itself shows nothing"""
SEED_TRIES = 400
VERSIONS = {
    "numpy": np.__version__,
    "python": platform.python_version(),
    "torch": str(torch.__version__),
    "transformers": transformers.__version__,
}


class Unclear(Exception):
    """This seed's weights leave a choice too close to call."""


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def describe(family: Family, folder: Path) -> dict[str, list[int]]:
    """Writes config.json and returns the published names and shapes, both from save_pretrained."""
    config = getattr(transformers, family.config)(**copy.deepcopy({**COMMON, **family.sizes}))
    getattr(transformers, family.model)(config).float().save_pretrained(folder)
    return {name: list(tensor.shape) for name, tensor in sorted(load_file(folder / "model.safetensors").items())}


class RouterMargins:
    """Smallest distance, over all calls, between the last expert that a router takes and the first it leaves."""

    def __init__(self, model: Any) -> None:
        self.smallest = float("inf")
        for module in model.modules():
            if type(module).__name__.lower().endswith("topkrouter"):
                module.register_forward_hook(self._observe)

    def check(self) -> None:
        if self.smallest < MIN_ROUTER_MARGIN:
            raise Unclear("two experts are too close")

    def _take(self, scores: torch.Tensor, k: int) -> None:
        if k < scores.shape[-1]:
            best = scores.sort(-1, descending=True).values
            margins = (best[:, k - 1] - best[:, k]) / scores[scores.isfinite()].std()
            self.smallest = min(self.smallest, margins.min().item())

    def _observe(self, router: Any, inputs: Any, outputs: Any) -> None:
        scores = outputs[0].detach().float()
        if hasattr(router, "e_score_correction_bias"):
            scores = scores.sigmoid() + router.e_score_correction_bias
            groups = scores.view(len(scores), router.num_group, -1)
            best = groups.topk(2, dim=-1).values.sum(-1)
            self._take(best, router.topk_group)
            out = best < best.topk(router.topk_group, dim=-1).values[:, -1:]
            scores = groups.masked_fill(out[..., None], float("-inf")).flatten(1)
        self._take(scores, router.top_k)


@torch.no_grad()
def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    """[tokens] -> [tokens, vocab], one sequence alone: no padding, no cache."""
    return model(torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0].numpy()


@torch.no_grad()
def states_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    """[tokens] -> [tokens, dim], one sequence alone: what comes out of the last norm."""
    return model.base_model(torch.from_numpy(tokens)[None].long(), use_cache=False).last_hidden_state[0].numpy()


def ragged(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """tokens [4, 60] right-padded with 0, lengths [4], logits [4, 60, vocab] with zeros in the padding; mean_state and
    last_state [4, dim] of the hidden states."""
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    logits = np.zeros((*tokens.shape, VOCAB), np.float32)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = rng.integers(FIRST_TOKEN, VOCAB, length)
        logits[row, :length] = logits_of(model, tokens[row, :length])
    if not np.isfinite(logits).all():
        raise Unclear("logits are not finite")
    states = [states_of(model, tokens[row, :length]) for row, length in enumerate(LENGTHS)]
    return {
        "tokens": tokens,
        "lengths": np.array(LENGTHS, np.int32),
        "logits": logits,
        "mean_state": np.array([each.mean(axis=0, dtype=np.float64) for each in states], np.float32),
        "last_state": np.array([each[-1] for each in states]),
    }


def token_margin(model: Any, prompt: np.ndarray, new: np.ndarray) -> float:
    """Asserts that `new` is the greedy completion without a cache too; its smallest relative margin of two best."""
    known = np.concatenate([prompt, new])
    positions = range(len(prompt), len(known))
    if "original_max_position_embeddings" in model.config.to_dict():  # longrope turns all positions by the length
        rows = [logits_of(model, known[:end])[-1] for end in positions]
    else:
        rows = list(logits_of(model, known)[len(prompt) - 1 : -1])
    best = np.argsort(np.array(rows), axis=-1)[:, -2:]
    first, second = (np.take_along_axis(np.array(rows), best[:, i : i + 1], -1)[:, 0] for i in (1, 0))
    margin = float(((first - second) / np.abs(first)).min())
    if margin > MIN_TOKEN_MARGIN:
        assert (best[:, 1] == new).all(), "generate() and the whole forward pass differ"
    return margin


def greedy(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """prompts [3, 26] right-padded with 0, prompt_lengths [3], generated [3, 64], generated_margin (relative)."""
    prompts = np.zeros((len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)), np.int32)
    generated = np.zeros((len(PROMPT_LENGTHS), NEW_TOKENS), np.int32)
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    margins = []
    for row, length in enumerate(PROMPT_LENGTHS):
        prompts[row, :length] = rng.integers(FIRST_TOKEN, VOCAB, length)
        prompt = torch.from_numpy(prompts[row : row + 1, :length]).long()
        generated[row] = model.generate(prompt, attention_mask=torch.ones_like(prompt))[0, length:].numpy()
        if len(set(generated[row].tolist())) < MIN_DISTINCT:
            raise Unclear("a completion repeats itself")
        margins.append(token_margin(model, prompts[row, :length], generated[row]))
        if margins[-1] <= MIN_TOKEN_MARGIN:
            raise Unclear("two tokens are too close")
    return {
        "prompts": prompts,
        "prompt_lengths": np.array(PROMPT_LENGTHS, np.int32),
        "generated": generated,
        "generated_margin": np.array(min(margins), np.float32),
    }


def train_step(model: Any, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """train_tokens [2, 33], loss (mean over 2 x 32 targets), grad_norm; and {published name: gradient norm}."""
    tokens = rng.integers(FIRST_TOKEN, VOCAB, TRAIN_SHAPE).astype(np.int32)
    batch = torch.from_numpy(tokens).long()
    logits = model(batch[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    total = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
    norms = published_norms(model, grads)
    assert abs(sum(norm**2 for norm in norms.values()) ** 0.5 / total - 1) < 1e-6
    return {
        "train_tokens": tokens,
        "loss": np.array(loss.item(), np.float32),
        "grad_norm": np.array(total, np.float32),
    }, norms


@torch.no_grad()
def published_norms(model: Any, grads: list[torch.Tensor]) -> dict[str, float]:
    """Puts the gradients in the place of the parameters and saves, so that they get the published names and layout."""
    buffers = {name for name, _ in model.named_buffers()}
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.copy_(grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(f"{folder}/model.safetensors")
    norms = {name: float(np.linalg.norm(grad.astype(np.float64))) for name, grad in saved.items()}
    return {name: float(f"{norm:.8g}") for name, norm in sorted(norms.items()) if name not in buffers}


def check_published(folder: Path, config: dict[str, Any], golden: dict[str, np.ndarray]) -> None:
    """transformers reads the old keys as the same network, bit for bit."""
    with tempfile.TemporaryDirectory() as old:
        write_json(Path(old) / "config.json", config)
        shutil.copy(folder / "model.safetensors", old)
        model = load(Path(old))
    for row, length in enumerate(golden["lengths"]):
        assert np.array_equal(logits_of(model, golden["tokens"][row, :length]), golden["logits"][row, :length])


def attempt(folder: Path, shapes: dict[str, list[int]], seed: int) -> dict[str, Any]:
    """Everything of one seed. Raises Unclear when it has a near-tie."""
    save_file(random_tensors(shapes, seed), folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    routers = RouterMargins(model)
    rng = np.random.default_rng([seed, *folder.name.encode()])
    golden = ragged(model, rng)
    routers.check()
    golden |= greedy(model, rng)
    routers.check()
    step, norms = train_step(model, rng)
    routers.check()
    return {"golden": golden | step, "norms": norms, "router_margin": routers.smallest}


def first_clear(folder: Path, shapes: dict[str, list[int]], seed: int) -> tuple[int, dict[str, Any]]:
    for candidate in range(seed, seed + SEED_TRIES):
        try:
            return candidate, attempt(folder, shapes, candidate)
        except Unclear:
            continue
    raise SystemExit(f"{folder.name}: no seed from {seed} to {seed + SEED_TRIES - 1} is clear")


def make(name: str, target: Path, seed: int, keep_weights: bool) -> str:
    """Writes one family's folder; returns the line to print."""
    family = FAMILIES[name]
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        shapes = describe(family, folder)
        seed, result = first_clear(folder, shapes, seed)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        old = published_config(family, config)
        check_published(folder, old, result["golden"])
        if keep_weights:
            load(folder).save_pretrained(target)
            (target / "generation_config.json").unlink(missing_ok=True)
    write_json(target / "config.json", config)
    write_json(target / "config_v4.json", old)
    write_json(target / "grad_norms.json", result["norms"])
    write_json(
        target / "manifest.json",
        {"architecture": family.model, "seed": seed, "dtype": "float32", "versions": VERSIONS, "tensors": shapes},
    )
    golden = result["golden"]
    np.savez_compressed(target / "golden.npz", **golden)
    return (
        f"{name:14} seed {seed:3}  tensors {len(shapes):3}  {(target / 'golden.npz').stat().st_size / 1024:5.1f} kB"
        f"  logits std {golden['logits'][-1].std():5.2f}  margin {golden['generated_margin']:.4f}"
        f"  router {result['router_margin']:.5f}  loss {golden['loss']:.4f}  grad {golden['grad_norm']:8.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "golden")
    parser.add_argument("--seed", type=int, default=0, help="the first seed to try")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--folders", action="store_true", help="write model.safetensors too")
    args = parser.parse_args()
    names = args.families.split(",")
    if unknown := [name for name in names if name not in FAMILIES]:
        parser.error(f"--families: {', '.join(unknown)} are none of {', '.join(FAMILIES)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "versions.json", VERSIONS)
    for name in names:
        print(make(name, args.out / name, args.seed, args.folders), flush=True)


if __name__ == "__main__":
    main()
