"""Restartable processes around the microkernel. Services never import each other."""
