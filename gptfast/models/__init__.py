"""Models built on the kernels."""

from gptfast.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
