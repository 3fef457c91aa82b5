"""`attn_implementation="gptfast"`: our attention, through transformers' own registries.

    from gptfast.integrations.huggingface_attention import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="gptfast")

transformers makes a mask once in a forward, through its mask registry, and hands it to every layer.
Ours is the mask of its `sdpa` implementation, and beside it a `Plan` of what the kernel has to be
told instead: which keys each row has, whether they are causal, the window. So a layer reads no
mask, and nothing waits for the device a second time. Where there is no plan, a layer goes to
transformers' own implementation, with the mask that this one would have got; `FALLBACKS` counts the
reasons.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from gptfast.integrations.huggingface_recipes import SWITCHED
from gptfast.ops.attention import attention
from gptfast.ops.attention_decode import MAX_QUERIES, attention_decode
from gptfast.ops.attention_varlen import attention_varlen
from gptfast.patching.registry import Patched

NAME = "gptfast"
FALLBACKS: Counter[str] = Counter()  # calls that went to transformers' own, by reason; eager only


def register() -> None:
    """Make "gptfast" an attention implementation of transformers. Twice is as good as once."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, prepare_mask)
    for original, name in SWITCHED.items():
        AttentionInterface.register(name, partial(attention_forward, original=original))
        AttentionMaskInterface.register(name, prepare_mask)


# ---- Once in a forward ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What the kernel has to be told in place of a mask.

    Args:
        causal: query i sees the keys j <= i + S - T, S keys being visible in its row.
        window: as in `gptfast.attention`.
        keys: how many of the keys are filled: less than there are in a static cache.
        rows: the keys (start, end) of each row, where there is padding.
        cu_seqlens: of queries and keys, int32, where there is padding; see `attention_varlen`.
    """

    causal: bool
    window: tuple[int, int] | None
    keys: int
    rows: tuple[tuple[int, int], ...] | None = None
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None = None


Planned = Plan | str  # or the reason why there is no plan
_PLANS: dict[int, tuple[weakref.ref[torch.Tensor], int, Planned | Callable[[], Planned]]] = {}


def _remember(mask: torch.Tensor, plan: Planned | Callable[[], Planned]) -> None:
    """Let `plan_of` find the plan of this mask, which is made when it is first asked for.

    A mask stays an ordinary tensor, which models may compute with and compilers understand: its
    plan is found by where it lies, as long as it lives and nobody has written to it. So it is
    found again for the detached alias that a reentrant checkpoint hands to the layers it repeats.
    """
    place = mask.data_ptr()
    forget = weakref.ref(mask, lambda _: _PLANS.pop(place, None))
    _PLANS[place] = (forget, mask._version, plan)


def plan_of(mask: torch.Tensor) -> Planned:
    """The plan of a mask of `prepare_mask`, or the reason why there is none."""
    made, version, plan = _PLANS.get(mask.data_ptr(), (None, 0, ""))
    same = None if made is None else made()
    if (
        same is None
        or mask.is_inference()
        or mask._version != version
        or (mask.dtype, mask.shape, mask.stride()) != (same.dtype, same.shape, same.stride())
    ):
        return "a mask of the caller's"
    if callable(plan):
        plan = plan()
        _remember(same, plan)
    return plan


def prepare_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """The entry in transformers' mask registry: arguments and result are those of `sdpa_mask`."""
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor, of a static cache
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **options,
    )
    if mask is None or is_tracing(mask) or mask.device.type == "meta":
        return mask
    if mask.is_inference():  # which would not notice that it is written to
        with torch.inference_mode(False):
            mask = mask.clone()
    pattern = _pattern(mask_function)
    if pattern is None:
        _remember(mask, "the mask is of another kind than causal, window or padding")
        return mask
    # Now, since a static cache adds to its offset while the layers run.
    filled = int(q_offset) + q_length - kv_offset if pattern[0] else kv_length
    sizes = filled, q_length, kv_length, kv_offset
    _remember(mask, lambda: _plan(*pattern, *sizes, attention_mask))
    return mask


def _pattern(mask_function: Callable[..., Any]) -> tuple[bool, tuple[int, int] | None] | None:
    """Causal or not, and the window, of a mask function of transformers; None for any other."""
    if mask_function is causal_mask_function:
        return True, None
    if mask_function is bidirectional_mask_function:
        return False, None
    # A window is the intersection of an overlay, which knows its width, and one of the above.
    if _maker(mask_function) != "and_masks":
        return None
    parts = _closure(mask_function)["mask_functions"]
    if len(parts) != 2:
        return None
    windows = {  # by what made the overlay
        "sliding_window_overlay": (causal_mask_function, True),
        "sliding_window_bidirectional_overlay": (bidirectional_mask_function, False),
    }
    other, causal = windows.get(_maker(parts[0]) or "", (None, False))
    if parts[1] is not other:
        return None
    width = _closure(parts[0])["sliding_window"]
    return causal, ((width - 1, 0) if causal else (width, width))


def _maker(function: Any) -> str | None:
    """The function of transformers that has made this one."""
    theirs = getattr(function, "__module__", None) == causal_mask_function.__module__
    return function.__qualname__.partition(".<locals>")[0] if theirs else None


def _closure(function: Any) -> dict[str, Any]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _plan(
    causal: bool,
    window: tuple[int, int] | None,
    filled: int,
    q_length: int,
    kv_length: int,
    kv_offset: int,
    attention_mask: torch.Tensor | None,
) -> Planned:
    """The plan of a mask with this pattern, or the reason why there is none."""
    if not 0 < filled <= kv_length:
        return "the cache has dropped keys that the mask counts"
    if attention_mask is None:
        return Plan(causal, window, filled)
    visible = attention_mask[:, kv_offset : kv_offset + filled]
    if visible.shape[1] < filled:
        return "the padding mask is shorter than the keys"
    rows = []
    for row in visible.cpu().bool():  # the one wait for the device
        seen = row.nonzero()[:, 0]
        start, end = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (filled, filled)
        if end - start != len(seen):
            return "the padding mask has holes"
        # The kernel takes the last query to stand at the last key.
        if end < filled and (causal or window is not None):
            return "padding on the right, with causality or a window"
        rows.append((start, end))
    if all(row == (0, filled) for row in rows):
        return Plan(causal, window, filled)
    device = attention_mask.device
    queries = torch.arange(len(rows) + 1, dtype=torch.int32, device=device) * q_length
    ends = list(accumulate((end - start for start, end in rows), initial=0))
    keys = torch.tensor(ends, dtype=torch.int32, device=device)
    return Plan(causal, window, filled, tuple(rows), (queries, keys))


# ---- In every layer ------------------------------------------------------------------------------


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    original: str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The entry in transformers' attention registry.

    Args:
        module: the layer; where the mask is None its `is_causal` counts, as for `sdpa`.
        query: (B, H, T, D).
        key: (B, H_kv, S, D), not expanded to H heads.
        value: (B, H_kv, S, Dv).
        attention_mask: of `prepare_mask`, or another one of transformers' kinds.
        dropout: probability.
        scaling: of the scores; None means 1 / sqrt(D).
        is_causal: in place of the module's.
        softcap: of the scores.
        original: the attention, "sdpa" or "eager", of a config that `gptfast.patch` has switched:
            modules that are not patched keep it. None: the user chose ours, for every module.
        kwargs: what other implementations take.

    Returns:
        (B, T, H, Dv), contiguous, and None for the attention weights.
    """
    plan: Planned | None = None
    given = module, query, key, value, attention_mask
    compiling = torch.compiler.is_compiling()
    patched = module if isinstance(module, Patched) else None
    small = (
        not compiling
        and patched is not None
        and query.numel() < patched._gptfast_least[patched.training]
    )
    if small and original == "sdpa" and softcap is None:  # at once: generation waits for it
        return sdpa_attention_forward(*given, dropout, scaling, is_causal, **kwargs)
    ours = original is None if patched is None else not small and patched.worth(query)
    if ours:
        plan = _plan_of_call(module, query, key, attention_mask, is_causal, dropout, kwargs)
        if original == "eager" and isinstance(plan, Plan) and _hides_queries(plan, query.shape[2]):
            plan = "queries on padding, which eager attention lets see every key alike"
    if isinstance(plan, str) and not compiling:
        FALLBACKS[plan] += 1
        if patched is not None:
            patched.fell_back(plan)
    if not isinstance(plan, Plan):
        return _original(
            *given,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            softcap=softcap,
            original=original,
            **kwargs,
        )
    options: dict[str, Any] = {
        "scale": scaling,
        "window": plan.window,
        "softcap": softcap,
    }
    if plan.rows is not None:
        return _padded(plan, query, key, value, dropout, options), None
    key, value = key[:, :, : plan.keys], value[:, :, : plan.keys]
    if plan.causal and not dropout and _decodes(query, key, value):
        lengths = _full_lengths(query.shape[0], plan.keys, query.device)
        caches = (key.transpose(1, 2), value.transpose(1, 2))
        return attention_decode(query, *caches, lengths, **options).transpose(1, 2), None
    o = attention(query, key, value, causal=plan.causal, dropout_p=dropout, **options)
    return o.transpose(1, 2), None


def _plan_of_call(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> Planned:
    if dropout >= 1:
        return "a dropout probability of 1"
    if _has_sinks(module, kwargs):
        return "attention sinks"
    if kwargs.get("position_bias") is not None:
        return "a position bias"
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    if query.shape[0] != key.shape[0]:
        return "queries that are shared by the batch"
    T, S = query.shape[2], key.shape[2]
    if attention_mask is not None:
        if is_tracing(attention_mask):
            return "a mask, while compiling: a plan would be for this call alone"
        if attention_mask.shape != (query.shape[0], 1, T, S):
            return "a mask for other numbers of queries or keys"
        return plan_of(attention_mask)
    # As in transformers' `sdpa`: aligned to the first key; one query sees all.
    causal = T > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if not causal:
        return Plan(False, None, S)
    return Plan(True, None, T) if T <= S else "more queries than keys"


def _has_sinks(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    # Not `getattr`, which takes a microsecond to find that a module has no such parameter.
    return kwargs.get("s_aux") is not None or module._parameters.get("sinks") is not None


def _hides_queries(plan: Plan, T: int) -> bool:
    """Whether some of T queries see no key."""
    last = plan.keys - (T if plan.causal else 1)  # a key that all of them would see
    return plan.rows is not None and any(start > last for start, _ in plan.rows)


def _decodes(query: torch.Tensor, *caches: torch.Tensor) -> bool:
    """Whether `attention_decode`, which has no gradient, takes the call.

    Not on a CPU. With one query and two cores it is slower there than transformers' `sdpa` up to
    512 keys, and at any length where no key head is shared; it is faster in both dtypes only with
    8,192 keys of 8 heads that several queries share (1.3 to 1.8 times).
    """
    if query.device.type == "cpu" or query.shape[2] > MAX_QUERIES:
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, *caches)))


@lru_cache(maxsize=8)
def _full_lengths(B: int, S: int, device: torch.device) -> torch.Tensor:
    return torch.full((B,), S, dtype=torch.int32, device=device)


def _padded(
    plan: Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    options: dict[str, Any],
) -> torch.Tensor:
    """(B, T, H, Dv), with the padding among the keys left out; every query is computed."""
    assert plan.rows is not None
    assert plan.cu_seqlens is not None
    B, H, T, D = query.shape
    options = {**options, "causal": plan.causal, "dropout_p": dropout}
    if query.device.type == "cpu" and T <= MAX_QUERIES:
        # A few queries against a long cache: to pack the keys would cost more than to read them.
        rows = [
            attention(query[b, None], key[b, None, :, i:j], value[b, None, :, i:j], **options)
            for b, (i, j) in enumerate(plan.rows)
        ]
        return torch.cat([o.transpose(1, 2) for o in rows])
    packed = query.transpose(1, 2).reshape(B * T, H, D)
    keys, values = (_pack(x, plan.rows) for x in (key, value))
    longest = max(j - i for i, j in plan.rows)
    o = attention_varlen(packed, keys, values, *plan.cu_seqlens, T, longest, **options)
    return o.view(B, T, H, -1)


def _pack(x: torch.Tensor, rows: Sequence[tuple[int, int]]) -> torch.Tensor:
    """(N, H_kv, D) from (B, H_kv, S, D)."""
    each = zip(x.unbind(0), rows, strict=True)
    return torch.cat([heads[:, i:j].transpose(0, 1) for heads, (i, j) in each])


# ---- Otherwise -----------------------------------------------------------------------------------


def _original(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    softcap: float | None,
    is_causal: bool | None,
    original: str | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The original, or else transformers' `sdpa`, or what that cannot do: the model's eager one."""
    if original is None:
        weights = kwargs.get("output_attentions")
        beyond = softcap is not None or weights or _has_sinks(module, kwargs)
        original = "eager" if beyond else "sdpa"
    if softcap is not None:
        kwargs["softcap"] = softcap
    if original == "sdpa":
        given = (module, query, key, value, attention_mask)
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            *given, is_causal=is_causal, **kwargs
        )
        return out
    files = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    eager = next(f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward"))
    T, S = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and T > 1:
        attention_mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        attention_mask = torch.where(attention_mask, zero, least)
    weighted: tuple[torch.Tensor, torch.Tensor] = eager(
        module, query, key, value, attention_mask, **kwargs
    )
    return weighted
