"""The network in plain numpy and float64, written from the papers, sharing no line with the product.

Llama (Touvron et al. 2023, arXiv 2302.13971) with Qwen's options: RMSNorm, rotary embedding on half-split pairs,
grouped-query attention, SwiGLU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from isthmus.model.config import ModelConfig


def logits(
    config: ModelConfig,
    params: dict[str, Any],
    tokens: np.ndarray,
    positions: np.ndarray,
    segments: np.ndarray,
) -> np.ndarray:
    """float64[seq, vocab] of one sequence; tokens, positions, segments: int[seq]; params unstacked."""
    x = _double(params["embedding"])[tokens]
    for layer in range(config.layers):
        block = _below(f"blocks/{layer}", params)
        normed = _rms_norm(x, block["attention_norm/scale"], config.norm_eps)
        x = x + _attention(config, _below("attention", block), normed, positions, segments)
        normed = _rms_norm(x, block["mlp_norm/scale"], config.norm_eps)
        x = x + _swiglu(_below("mlp", block), normed)
    x = _rms_norm(x, params["norm/scale"], config.norm_eps)
    return x @ (_double(params["embedding"]).T if config.tie_embeddings else _double(params["head"]))


def _below(path: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters below a path, by what follows it."""
    return {name.removeprefix(f"{path}/"): x for name, x in params.items() if name.startswith(f"{path}/")}


def _double(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _rms_norm(x: np.ndarray, scale: Any, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * _double(scale)


def _project(part: dict[str, Any], name: str, x: np.ndarray, spec: str) -> np.ndarray:
    out = np.einsum(spec, x, _double(part[f"{name}/kernel"]))
    return out + _double(part[f"{name}/bias"]) if f"{name}/bias" in part else out


def _rotary(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """x: [seq, heads, head_dim]. Channel i turns with i + head_dim / 2, at theta^(-2i / head_dim) a position."""
    head_dim = x.shape[-1]
    out = x.copy()
    for i in range(head_dim // 2):
        angle = (positions * theta ** (-2 * i / head_dim))[:, None]
        a, b = x[..., i], x[..., i + head_dim // 2]
        out[..., i] = a * np.cos(angle) - b * np.sin(angle)
        out[..., i + head_dim // 2] = a * np.sin(angle) + b * np.cos(angle)
    return out


def _attention(
    config: ModelConfig, part: dict[str, Any], x: np.ndarray, positions: np.ndarray, segments: np.ndarray
) -> np.ndarray:
    q = _project(part, "query", x, "sd,dhk->shk")
    k = _project(part, "key", x, "sd,dhk->shk")
    v = _project(part, "value", x, "sd,dhk->shk")
    if config.qk_norm != "none":
        q = _rms_norm(q, part["query_norm/scale"], config.norm_eps)
        k = _rms_norm(k, part["key_norm/scale"], config.norm_eps)
    q, k = _rotary(q, positions, config.rope_theta), _rotary(k, positions, config.rope_theta)
    out = np.zeros_like(q)
    for head in range(config.heads):
        group = head // (config.heads // config.kv_heads)
        for query in range(len(x)):
            seen = [s for s in range(query + 1) if segments[s] == segments[query]]
            scores = k[seen, group] @ q[query, head] / np.sqrt(config.head_dim)
            weights = np.exp(scores - scores.max())
            out[query, head] = weights @ v[seen, group] / weights.sum()
    return _project(part, "out", out, "shk,hkd->sd")


def _swiglu(part: dict[str, Any], x: np.ndarray) -> np.ndarray:
    gate, up = _project(part, "gate", x, "sd,dm->sm"), _project(part, "up", x, "sd,dm->sm")
    return _project(part, "down", gate / (1 + np.exp(-gate)) * up, "sm,md->sd")
