"""Which transactions were seen recently: the API draws at random and may repeat itself."""

from collections.abc import Iterable

from shared.records import Transaction


class Recent:
    """Remembers the identities of the last `size` transactions."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: dict[tuple[str, int], None] = {}

    def new(self, transactions: Iterable[Transaction]) -> list[Transaction]:
        """Those not seen before, in order; they are remembered, and the oldest forgotten."""
        fresh = []
        for transaction in transactions:
            if transaction.identity not in self._seen:
                self._seen[transaction.identity] = None
                fresh.append(transaction)
        while len(self._seen) > self._size:
            del self._seen[next(iter(self._seen))]
        return fresh
