"""Rendering: a Table, or a picture of one, becomes text, JSON, CSV or HTML. Computes nothing on tensors."""
