"""Tokenizers that know their characters, and the cutting of captions."""
