"""Trains the small demonstration model that ships with llmos, from text this package generates itself.

Role: a batch tool, never a running service; nothing at serving time imports it.
Invariants: every example is a function of a seed; no example of the held-out split is ever in the training text.
"""
