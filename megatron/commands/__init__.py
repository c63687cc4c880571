"""The verbs of the command line, one module each.

A module has `HELP` (one line), `add_arguments(parser)` and `run(arguments) -> int` (the exit code). One whose
`TAKES_OVERRIDES` is true gets the `--section.key value` words of its command line in `arguments.overrides`, and in
`arguments.unrecognized` those that no option takes: to refuse together with what is wrong with the overrides. Nothing
heavy (torch, numpy) is imported before `run`, so that help is instant.
"""
