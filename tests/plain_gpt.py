"""A GPT of any options in plain PyTorch: the formulas alone, with no kernel and no cache."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def logits_of(config, weights, idx, memory=None):
    """(B, T, V), in the dtype of `weights`, a dict by the model's names."""
    y = hidden(config, weights, idx, memory)
    wte = weights["transformer.wte.weight"]
    z = y @ weights.get("lm_head.weight", wte).T
    cap = config.logit_softcap
    return z if cap is None else cap * torch.tanh(z / cap)


def hidden(config, weights, idx, memory=None):
    c, T = config, idx.shape[1]
    w = {name.removeprefix("transformer."): x for name, x in weights.items()}

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name):
        weight, bias = w.get(f"{name}.weight"), w.get(f"{name}.bias")
        if c.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, bias, c.norm_eps)
        return F.rms_norm(x, x.shape[-1:], weight, c.norm_eps)

    def split(x, n):
        return x.unflatten(-1, (n, c.head_dim)).transpose(1, 2)

    def turn(x):
        """Pairs (i, i + D/2) as complex numbers, times e^(i pos / base^(2 i / D))."""
        half = c.head_dim // 2
        powers = torch.arange(half, dtype=torch.float64) / half
        angle = torch.arange(T, dtype=torch.float64)[:, None] / c.rope_base**powers
        turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([turned.real, turned.imag], -1).to(x.dtype)

    def attend(q, k, v, visible=None):
        k, v = (x.repeat_interleave(c.n_head // c.kv_heads, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(c.head_dim)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def attention(x, at):
        joined = linear(x, f"{at}.c_attn")
        q, k, v = split(joined, c.n_head + 2 * c.kv_heads).split(
            [c.n_head, c.kv_heads, c.kv_heads], 1
        )
        if c.qk_norm:
            sizes = (c.head_dim,)
            q = F.rms_norm(q, sizes, w.get(f"{at}.q_norm.weight"), c.norm_eps)
            k = F.rms_norm(k, sizes, w.get(f"{at}.k_norm.weight"), c.norm_eps)
        if c.positions == "rotary":
            q, k = turn(q), turn(k)
        i, j = torch.arange(T)[:, None], torch.arange(T)
        visible = torch.ones(T, T, dtype=torch.bool)
        if c.causal:
            visible &= j <= i
        if c.window is not None:
            visible &= (i - j).abs() < c.window
        return linear(attend(q, k, v, visible), f"{at}.c_proj")

    def cross(x, at):
        k, v = split(linear(memory, f"{at}.c_kv"), 2 * c.kv_heads).chunk(2, 1)
        q = split(linear(x, f"{at}.c_q"), c.n_head)
        return linear(attend(q, k, v), f"{at}.c_proj")

    def mlp(x, at):
        h = linear(x, f"{at}.c_fc")
        if c.mlp == "swiglu":
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        else:
            h = {"gelu": lambda: F.gelu(h, approximate="tanh"), "relu": h.relu,
                 "relu2": lambda: h.relu() ** 2}[c.mlp]()  # fmt: skip
        return linear(h, f"{at}.c_proj")

    x = w["wte.weight"][idx]
    if c.positions == "learned":
        x = x + w["wpe.weight"][:T]
    elif c.positions == "sinusoidal":
        wave = torch.empty(T, c.n_embd, dtype=torch.float64)
        for pos in range(T):
            for i in range(c.n_embd // 2):
                angle = pos / 10000 ** (2 * i / c.n_embd)
                wave[pos, 2 * i], wave[pos, 2 * i + 1] = math.sin(angle), math.cos(angle)
        x = math.sqrt(c.n_embd) * x + wave.to(x.dtype)
    if c.embedding_norm:
        x = norm(x, "ln_emb")
    for n in range(c.n_layer):
        branches = [("ln_1", attention, "attn"), ("ln_2", mlp, "mlp")]
        if c.cross_attention:
            branches.insert(1, ("ln_cross", cross, "cross"))
        for ln, function, name in branches:
            at, ln = f"h.{n}.{name}", f"h.{n}.{ln}"
            x = x + function(norm(x, ln), at) if c.pre_norm else norm(x + function(x, at), ln)
    return norm(x, "ln_f") if c.pre_norm else x
