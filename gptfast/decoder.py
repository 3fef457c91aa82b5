"""Decoding on a CPU in one call a step: `csrc/cpu/decode_step.cpp`, and when it can be used.

Where the model is a plain `GPT` on a CPU, a token costs one call from Python and the time that its
weights take to be read. Everything else goes through the modules, with the same result.
"""

from __future__ import annotations

import struct
from typing import Any, cast

import torch
from torch import nn

from gptfast import backend
from gptfast.models import GPT
from gptfast.models.gpt import MLP, Block
from gptfast.nn import CausalSelfAttention, KVCache, LayerNorm, QuantizedLinear
from gptfast.ops.library import check_dtypes, fp32_parameter, pointer
from gptfast.ops.linear_decode import FORMAT_CODES

MAX_ROWS = 16  # of the products in csrc/cpu/linear_decode.h
# Options that are sizes to it, not another computation.
KNOWN_OPTIONS = ("n_kv_head", "n_inner", "norm_eps", "tied", "rope_base")
# Bytes of weights for each thread: below, the barriers of a step take longer than they save.
BYTES_PER_THREAD = 1 << 20
PLAIN = {
    *(GPT, Block, MLP, CausalSelfAttention, LayerNorm, QuantizedLinear),
    *(nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleDict, nn.ModuleList),
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def why_not(model: nn.Module, batch_size: int) -> str | None:
    """Why `Decoder` cannot stand in for the model's forward, or None."""
    if type(model) is not GPT:
        return f"the model is a {type(model).__name__}, not a GPT"
    option = model.config.unlike_gpt2(besides=KNOWN_OPTIONS)
    if option is not None:
        return f"the model has {option}"
    if backend.forced_backend() not in (None, "cpu"):
        return f"backend {backend.forced_backend()!r} is forced"
    if backend.missing("cpu"):
        return backend.missing("cpu")
    if batch_size > MAX_ROWS:
        return f"at most {MAX_ROWS} sequences, got {batch_size}"
    if torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled():
        return "ops are being watched"
    if any(getattr(nn.modules.module, f"_global{hooks}") for hooks in HOOKS):
        return "modules have global hooks"
    for name, module in model.named_modules():
        if type(module) not in PLAIN or "forward" in vars(module):
            return f"{name} is a {type(module).__name__}, or has a forward of its own"
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"{name} has hooks"
        if module.training:
            return f"{name} is in training mode"
        if isinstance(module, LayerNorm) and module.weight is None:
            return f"{name} has no weight"
        if isinstance(module, CausalSelfAttention) and (module.window or module.qk_norm):
            return f"{name} has a window or norms"
    t: Any = model.transformer
    if len({_sizes(block) for block in t["h"]}) > 1:
        return "its blocks differ in their sizes"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or type(tensor.data) is not torch.Tensor:
            return f"{name} is on {tensor.device}"
        if tensor.dtype not in FORMAT_CODES:
            return f"{name} is {tensor.dtype}"
    return None


def _sizes(block: Any) -> tuple[int, ...]:
    attn = block.attn
    return attn.n_head, attn.n_kv_head, attn.head_dim, block.mlp.c_fc.out_features


class Decoder:
    """Next-token logits of a GPT, one token of each sequence at a time, or a few.

    Weights are read where the model has them; under autocast on the CPU they are rounded to its
    dtype once, here, instead of in every product. What is not fp32 or not contiguous and has to be,
    is copied here: a decoder belongs to the weights as they are when it is made.

    Between the products everything is fp32.

    Args:
        model: one for which `why_not` returns None.
        cache: keys and values of at most 16 sequences, made by the model's `new_cache`.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self._kept: list[torch.Tensor] = []  # what the plan points to
        self._bytes = 0
        autocast = torch.is_autocast_enabled("cpu")
        self._autocast = torch.get_autocast_dtype("cpu") if autocast else None
        self.cache = cache
        self.batch_size = cache.data.shape[2]
        config, t = model.config, cast(Any, model.transformer)
        layers = b"".join(
            self._norm(block.ln_1)
            + self._linear(block.attn.c_attn)
            + self._linear(block.attn.c_proj)
            + self._norm(block.ln_2)
            + self._linear(block.mlp.c_fc)
            + self._linear(block.mlp.c_proj)
            + struct.pack("2q", *map(self._address, cache.data[i]))
            for i, block in enumerate(t["h"])
        )
        wte, wpe = (t[name].weight.detach().contiguous() for name in ("wte", "wpe"))
        tail = (
            struct.pack(
                "4q",
                backend.DTYPE_CODES[wte.dtype],
                backend.DTYPE_CODES[cache.data.dtype],
                self._address(wte),
                self._address(wpe.to(wte.dtype)),
            )
            + self._norm(t["ln_f"])
            + self._linear(model.lm_head)
        )
        self._vocab_size = config.vocab_size
        sizes = (*_sizes(t["h"][0])[:3], config.vocab_size)
        threads = max(1, min(torch.get_num_threads(), self._bytes // BYTES_PER_THREAD))
        head = struct.pack("8q", config.n_layer, config.n_embd, *sizes, cache.max_length, threads)
        self._plan = torch.frombuffer(bytearray(head + tail + layers), dtype=torch.int64)
        extension: Any = backend.extension()
        rows = (1, MAX_ROWS)  # a single row has a copy for each thread
        floats = max(extension.decode_workspace(self._plan.data_ptr(), M) for M in rows)
        # The kernels load whole vectors from it, aligned to 64 bytes.
        workspace = torch.empty(floats + 16)
        self._workspace = workspace[-(workspace.data_ptr() // 4) % 16 :]
        self._step = extension.decode_step

    def takes(self, tokens: int) -> bool:
        """Whether so many new tokens of each sequence fit into a step."""
        return 0 < tokens * self.batch_size <= MAX_ROWS

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, V), float32, of the token behind idx (B, T); the cache grows by idx.

        Raises:
            ValueError: idx does not fit into the cache, or into a step of 16 rows.
            TypeError: idx is not int64.
            IndexError: a token outside the vocabulary.
        """
        cache, B = self.cache, self.batch_size
        if idx.dim() != 2 or idx.shape[0] != B or not self.takes(idx.shape[1]):
            expected = f"({B}, T), T from 1 to {MAX_ROWS // B}"
            raise ValueError(f"Decoder: idx must be {expected}, got {tuple(idx.shape)}")
        check_dtypes("Decoder", torch.int64, idx=idx)
        T = idx.shape[1]
        if cache.length + T > cache.max_length:
            raise ValueError(f"KVCache: room for {cache.max_length} tokens, got {cache.length + T}")
        tokens, logits = idx.contiguous(), torch.empty(B, 1, self._vocab_size)
        self._step(
            self._plan.data_ptr(),
            tokens.data_ptr(),
            B,
            T,
            cache.length,
            self._workspace.data_ptr(),
            logits.data_ptr(),
        )
        cache.advance(T)
        return logits

    def _address(self, tensor: torch.Tensor | None) -> int:
        if tensor is not None:
            self._kept.append(tensor)
        return pointer(tensor)

    def _norm(self, norm: Any) -> bytes:
        parameters = (fp32_parameter(p) for p in (norm.weight.detach(), norm.bias))
        return struct.pack("2qd", *map(self._address, parameters), norm.eps)

    def _linear(self, layer: Any) -> bytes:
        scale = zero = None
        if isinstance(layer, QuantizedLinear):
            data, scale, zero, *_ = layer.quantized_weight
        else:
            data = layer.weight.detach()
            if self._autocast is not None:
                data = data.to(self._autocast)
        data = data.contiguous()
        self._bytes += data.numel() * data.element_size()
        bias = fp32_parameter(layer.bias)
        addresses = map(self._address, (data, scale, zero, bias))
        sizes = (FORMAT_CODES[data.dtype], layer.out_features, layer.in_features)
        return struct.pack("7q", *addresses, *sizes)
