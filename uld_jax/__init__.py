"""Distil any teacher language model into any student, whatever their tokenizers, in JAX."""

__version__ = "0.1.0"
