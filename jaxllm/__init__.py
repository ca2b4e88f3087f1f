"""Train a language model through every stage, from random weights to a reasoning model, as pure functions."""

__version__ = "0.1.0"
