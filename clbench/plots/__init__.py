"""Figures: what is known in, a matplotlib figure out; nothing here reads, writes or shows."""
