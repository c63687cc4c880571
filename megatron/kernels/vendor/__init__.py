"""Thin adapters for libraries of others, imported only where the configuration asks for them.

Each checks the GPU and the library's version, and compares itself with the reference on the present device before it is
used. None of them has been run on a GPU by this project.
"""
