"""Models built on the kernels."""

from gptfast.models.bigram import Bigram, BigramConfig
from gptfast.models.config import GPTConfig
from gptfast.models.encoder_decoder import EncoderDecoder
from gptfast.models.gpt import GPT

__all__ = ["GPT", "Bigram", "BigramConfig", "EncoderDecoder", "GPTConfig"]
