"""Watching: what each step of an optimizer does to each tensor, in a Run or in anybody's loop.

``session`` holds the hooks and decides when things are read; ``norms`` (every step), ``looks`` and ``taps`` (some
steps) say how, ``suspects`` and ``origin`` ask the model, ``faults`` judges, ``log`` keeps it all in the tables of
``schema``, ``reading`` and ``parquet`` read and hand on what was kept. Only ``session`` and what it uses need torch.
"""
