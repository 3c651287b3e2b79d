"""Which alarms were raised: one that comes again, because its commit failed or its partition came back, is known."""


class Remembered:
    """The identities whose alarm this process raised last, at most `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._identities: dict[tuple[str, int], None] = {}  # the oldest first

    def __contains__(self, identity: tuple[str, int]) -> bool:
        return identity in self._identities

    def add(self, identity: tuple[str, int]) -> None:
        """Remember one, and forget the oldest if they are too many."""
        self._identities[identity] = None
        if len(self._identities) > self._size:
            del self._identities[next(iter(self._identities))]
