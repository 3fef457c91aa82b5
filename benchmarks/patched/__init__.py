"""Models of others, patched and not: forward, a training step and generation, eager and compiled.

    python -m benchmarks.patched --json FILE --resume    # every family; or --only NAME
    python -m benchmarks.patched --show FILE             # the rows of FILE as a table in Markdown
    python -m benchmarks.patched --show FILE --into DOC  # the same, between two marks in DOC
    python -m benchmarks.patched --modules --json FILE   # what gptfast/patching/speed.py rests on

Contenders take turns, on the same weights in the same memory: where a copy happens to lie changes
the time of a model this small. Rows are written when a family is done, and `--resume` goes on
behind the last one. What fails is shown as failed, the rest is timed all the same, and the exit
status is 1. Before anything is timed, logits, loss and gradients of the patched model are
held against the unpatched one's, both against fp64, in the mode that the model is made in and
uncompiled: no figure is given for a model that computes something else there. What `torch.compile`
makes of the two, and generated text, are not compared here; tests do that, on smaller models.
"""
