"""Datasets in, vectors out: readers, the stream through the engine, sinks."""
