"""The SDK. `sync.py` and `aio.py` are thin shells over `_core.py`; callers import the names from `llmos`."""
