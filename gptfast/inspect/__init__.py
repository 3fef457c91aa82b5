"""Looking into a model: what its heads attend to, what it would say after each layer, which tokens
it holds for alike, and where its parameters and FLOPs are.

Nothing here runs in a forward pass of training or generation: hooks keep what a pass on one text
computes anyway, and the rest is computed again from it.
"""

from gptfast.inspect.attention import attention_maps
from gptfast.inspect.draw import draw
from gptfast.inspect.embeddings import analogy, neighbours, one_token, print_similar
from gptfast.inspect.lens import Lens, logit_lens
from gptfast.inspect.page import write_page
from gptfast.inspect.table import Row, parameter_rows, print_parameters

__all__ = [
    "Lens",
    "Row",
    "analogy",
    "attention_maps",
    "draw",
    "logit_lens",
    "neighbours",
    "one_token",
    "parameter_rows",
    "print_parameters",
    "print_similar",
    "write_page",
]
