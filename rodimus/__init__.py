"""Rodimus and Rodimus+ language models (arXiv 2410.06577): model, generation and training."""

__version__ = "0.1.0"
