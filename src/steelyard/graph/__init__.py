"""Who feeds whom, index by index: which parts of which tensors belong together, and modules of other widths.

Imports torch; knows nothing of files, of tasks, or of why something is removed.
"""
