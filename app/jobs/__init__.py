"""Bulk work on top of the engine's one door: files of lines in, files of lines out, whoever dies in between."""
