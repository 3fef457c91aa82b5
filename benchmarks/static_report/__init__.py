"""What can be said of the Triton kernels with no GPU: `python -m benchmarks.static_report`.

Every registered op runs on the cases that `gptfast.testing` names in `OpRow.reports`, once for each
GPU target. No kernel is launched: `launches` records what Triton would have compiled, with the
configuration that the op's own heuristic picks for the target; `compiled` compiles exactly that and
reads registers, spills, shared memory, matrix instructions and load widths from the result; and
`traffic` executes the launches in Triton's interpreter, counting bytes and floating-point
operations. `table` keeps the outcome in `benchmarks/static_report.json` and says what got worse.
"""
