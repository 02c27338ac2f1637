"""The parts of fuzz.py and flood.py: hostile frames and peers, a private llmosd, neighbours that must not notice, the watch on it."""
