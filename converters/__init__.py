"""Readers of foreign model formats, and the writer of ours."""
