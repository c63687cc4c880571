"""Pipeline parallelism: which layers a stage has, in which order it works, and the engine that does it."""
