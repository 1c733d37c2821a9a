"""Source trees in, tables to search out."""
