"""Codecs against originals: systems, alignment, processes, statistics and the report."""
