"""The parts of fuzz.py, flood.py and hang.py: hostile frames, a private llmosd, neighbours that must not notice, and the watch on it all."""
