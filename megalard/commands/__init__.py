"""The commands of ``megalard``, one module each: what they take, and what they do.

A command module has ``NAME``, ``HELP``, ``add_arguments(parser)`` and ``run(options)``, which
returns the exit status. Modules with heavy imports are imported in ``run``, so that ``--help`` is
fast.
"""
