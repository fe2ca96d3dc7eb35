"""nanoGPT's training step in eager torch, to be timed beside ours; it is asked as protocol.py says.

Written after github.com/karpathy/nanoGPT (model.py and train.py): pre-norm blocks, learned positions, GELU of four
times the width, tied head, no biases, no dropout; AdamW with decay on matrices, betas 0.9 and 0.99, clipping at 1. A
batch is drawn from a memory-mapped uint16 file between forward and backward pass of the step before; the loss is read
every step. `load` takes the sizes and the data file, `run` a number of steps.
"""

import math
import time

import numpy as np
import torch
from protocol import answer
from torch import nn
from torch.nn import functional as F


class LayerNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        batch, time_, dim = x.shape
        q, k, v = (
            part.view(batch, time_, self.heads, dim // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(dim, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=True)
        return self.dropout(self.proj(y.transpose(1, 2).contiguous().view(batch, time_, dim)))


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.act = nn.GELU()
        self.proj = nn.Linear(4 * dim, dim, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return self.dropout(self.proj(self.act(self.up(x))))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attention = LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = LayerNorm(dim), MLP(dim)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, layers, heads, dim, block, vocab):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(block, dim)
        self.dropout = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * layers) if name.endswith("proj.weight") else 0.02
                nn.init.normal_(parameter, 0.0, std)

    def forward(self, x, y):
        h = self.dropout(self.tokens(x) + self.positions(torch.arange(x.shape[1])))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1), ignore_index=-1)


class Run:
    def load(self, layers, heads, dim, block, vocab, batch, data):
        torch.manual_seed(1337)
        self.block, self.batch = block, batch
        self.data = np.memmap(data, dtype=np.uint16, mode="r")
        self.model = GPT(layers, heads, dim, block, vocab).train()
        self.parameters = list(self.model.parameters())
        decayed = [p for p in self.parameters if p.dim() >= 2]
        others = [p for p in self.parameters if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
        self.next = self.draw()
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self.parameters),
        }

    def draw(self):
        starts = torch.randint(len(self.data) - self.block, (self.batch,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(self.data[i + d : i + d + self.block].astype(np.int64)) for i in starts])
            for d in (0, 1)
        )
        return x, y

    def run(self, steps):
        start = time.perf_counter()
        for _ in range(steps):
            loss = self.model(*self.next)
            self.next = self.draw()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            value = loss.item()
        return {"seconds": time.perf_counter() - start, "loss": value}


if __name__ == "__main__":
    answer(Run())
