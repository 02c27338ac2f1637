"""HTTP: what the ecosystem speaks, and llmos's own verbs. A gateway process like the ZeroMQ one, with the same inside (`../core.py`); its
handlers are clients in the same process (`sessions.py`). One file per family of endpoints; `routes.py` lists them. Entry: `service.py`.
"""
