"""The client port: checks requests, turns text into tokens and back, relays to the microkernel. Entry: `service.py`."""
