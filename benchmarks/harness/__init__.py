"""What the benchmarks share: the machine, the contestants, and the processes that these run in."""
