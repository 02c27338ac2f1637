"""The `llmosctl` command line, a client like any other. Entry: `main.py`."""
