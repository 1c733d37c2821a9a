"""The HTTP edge: wire words come in here and never go further."""
