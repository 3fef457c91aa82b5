"""Pictures of attention and of the logit lens, as PNG. Needs matplotlib: the extra `plot`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gptfast.inspect.lens import Lens

COLOURS = "gist_heat_r"  # nothing is white, all of it black
MAX_LABELS = 64  # tokens beside a map; more of them cannot be read
MAX_LENS_TOKENS = 24  # columns of the lens; more make a picture too wide for a page


def plot_maps(
    maps: torch.Tensor, path: str | os.PathLike[str], title: str = "", gamma: float = 0.5
) -> Path:
    """Every layer and head in one picture: rows are layers, columns are heads.

    Args:
        maps: p (n_layer, H, T, T), from `attention_maps`.
        path: where the PNG goes.
        title: over the picture.
        gamma: the colour of p is that of p^gamma: a root shows small probabilities.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure_class, norms = _matplotlib()
    L, H = maps.shape[:2]
    panels = maps.numpy()
    figure = figure_class(figsize=(1 + 1.1 * H, 0.5 + 1.1 * L), layout="compressed")
    axes = figure.subplots(L, H, squeeze=False)
    norm = norms.PowerNorm(gamma, 0, 1)
    for layer in range(L):
        for head in range(H):
            axis = axes[layer][head]
            image = axis.imshow(
                panels[layer, head], cmap=COLOURS, norm=norm, interpolation="nearest"
            )
            axis.set(xticks=[], yticks=[])
            if layer == 0:
                axis.set_title(f"head {head}", fontsize=8)
            if head == 0:
                axis.set_ylabel(f"layer {layer}", fontsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("attention of a row's token to a column's", fontsize=7)
    figure.suptitle(_visible_line(title), fontsize=9)
    return _save(figure, path)


def plot_head(
    p: torch.Tensor, tokens: Sequence[str], path: str | os.PathLike[str], title: str = ""
) -> Path:
    """One head, with the tokens beside it.

    Args:
        p: (T, T), of `attention_maps`.
        tokens: T texts.
        path, title: as in `plot_maps`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure_class, norms = _matplotlib()
    size = 2.5 + 0.2 * min(len(tokens), MAX_LABELS)
    figure = figure_class(figsize=(size + 0.7, size), layout="compressed")
    axis = figure.subplots()
    image = axis.imshow(
        p.numpy(), cmap=COLOURS, norm=norms.PowerNorm(0.5, 0, 1), interpolation="nearest"
    )
    if len(tokens) <= MAX_LABELS:
        labels = [_visible(token) for token in tokens]
        axis.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=8, family="monospace")
        axis.set_yticks(range(len(tokens)), labels, fontsize=8, family="monospace")
    axis.set(xlabel="key: the token attended to", ylabel="query", title=title)
    figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
    return _save(figure, path)


def plot_lens(
    lens: Lens,
    idx: torch.Tensor,
    texts: Sequence[Sequence[str]],
    tokens: Sequence[str],
    path: str | os.PathLike[str],
    title: str = "",
) -> Path:
    """The likeliest next token behind every layer; the last layer, which speaks, on top.

    Bold is what the text does say next.

    Args:
        lens: from `logit_lens`.
        idx: (T,), what the model read.
        texts: (n_layer + 1, T), of lens.tokens[..., 0].
        tokens: T texts, of idx.
        path, title: as in `plot_maps`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure_class, _ = _matplotlib()
    p = lens.p[..., 0].numpy()
    L, T = p.shape
    longest = max(len(_shown(text)) for text in (*tokens, *(t for row in texts for t in row)))
    width = 0.3 + 0.06 * longest  # of a column, for letters of 8 points
    figure = figure_class(figsize=(1.8 + width * T, 1.4 + 0.3 * L), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(p, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer in range(L):
        for t in range(T):
            colour = "white" if p[layer, t] > 0.5 else "black"
            # Not by the texts: pieces of a letter look alike.
            right = t + 1 < T and bool(lens.tokens[layer, t, 0] == idx[t + 1])
            axis.text(
                t,
                layer,
                _shown(texts[layer][t]),
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
                fontweight="bold" if right else "normal",
            )
    axis.set_xticks(range(T), [_shown(token) for token in tokens], fontsize=8)
    axis.set_yticks(range(L), ["embedding", *(f"layer {n}" for n in range(L - 1))], fontsize=8)
    axis.set_xlabel("the token read (bold above it: what comes next in the text)", fontsize=8)
    axis.set_title(_visible_line(title), fontsize=9)
    bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("probability", fontsize=8)
    return _save(figure, path)


def _visible(text: str) -> str:
    """Spaces and line ends as signs; no mathematics in a dollar."""
    return text.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("$", r"\$") or "\u2205"


def _shown(text: str) -> str:
    return _visible(text)[:9]  # more does not fit into a column


def _visible_line(title: str) -> str:
    """A title on one line; no mathematics in a dollar."""
    return " ".join(title.split()).replace("$", r"\$")


def _matplotlib() -> tuple[Any, Any]:
    """The figure, which needs no display, and the colour norms."""
    try:
        from matplotlib import colors
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install 'gptfast-kernels[plot]'"
        ) from error
    return Figure, colors


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    figure.savefig(path, format="png", dpi=150, bbox_inches="tight")  # a title may be wider
    return path
