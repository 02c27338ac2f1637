"""Encoder models: a text in, one vector out."""
