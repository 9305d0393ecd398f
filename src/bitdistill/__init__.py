"""Convert Hugging Face language models into 1.58-bit (ternary) task models."""

__version__ = "0.1.0"
