"""Grammars: checked and made normal by tokenizer services, followed by executors."""
