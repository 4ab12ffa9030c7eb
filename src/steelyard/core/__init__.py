"""The nouns. Imports nothing of ours but ``errors``."""
