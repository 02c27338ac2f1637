"""The parts of chaos.py: clients and their histories, the judge that reads them, the nemesis, the stand-in for systemd."""
