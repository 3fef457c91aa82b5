"""Every op and the whole model on the CPU, against PyTorch eager and torch.compile(max-autotune).

    make bench-cpu JSON=out/cpu.json
    python -m benchmarks.cpu --only gelu layer_norm --quick

Every contender is timed in turns with the others in one process, and beside them the ceiling: a
loop that moves the same bytes, or does the same operations, and nothing else. There is a process
for each number of threads and for each of two allocators: glibc as found, and warmed, which keeps
what it is given back and asks for huge pages. `works.py` says what is timed, `worker.py` times it.
"""
