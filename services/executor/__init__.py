"""See the module table in README.md."""
