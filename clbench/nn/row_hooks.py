"""Hooks on parts of a model that treat every row of a batch by itself."""

from __future__ import annotations


class RowHook:
    """A hook to which it makes no difference whether it sees a batch or some of its rows.

    Where the rows of a batch are shared out among processes, a model with other hooks inside is
    computed whole by each of them.
    """
