"""What happens to a row that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torchrec_hilomoe.errors import DataError


class BadRows:
    """Raises at a bad row, or counts bad rows by reason (``data.on_bad_row``).

    Args:
        mode (str): ``"raise"`` or ``"skip"``.

    Example:
        >>> bad_rows = BadRows("skip")
        >>> bad_rows.reject("the label is not 0 or 1", 2, lambda: "train.csv: row 3: '7'")
        >>> dict(bad_rows.counts)
        {'the label is not 0 or 1': 2}
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.counts: Counter[str] = Counter()

    def reject(self, reason: str, count: int, describe_first: Callable[[], str]) -> None:
        """Raises, or counts the rows.

        Args:
            reason (str): what is wrong with the rows.
            count (int): how many there are.
            describe_first (Callable[[], str]): names file, row, line, column and value of the
                first one; called only to raise.

        Raises:
            DataError: if the mode is ``"raise"``.
        """
        if self.mode == "raise":
            raise DataError(
                f"{describe_first()}: {reason}. Correct the file, or leave such rows out with "
                "data.on_bad_row=skip"
            )
        self.counts[reason] += count
