"""What weights mean: tables about weights, a model and its data, each checked against a measurement.

One file = one table, imported from its own file: ``from steelyard.explain.signal import signal``. The tables
that read only files (``inventory``, ``histograms``) need no torch.
"""
