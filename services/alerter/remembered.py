"""Remembers recently sent alarms, so that no alarm is sent again after a failed commit or a rebalance."""


class Remembered:
    """The identities of the last `size` alarms that this process sent."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._identities: dict[tuple[str, int], None] = {}  # oldest first

    def __contains__(self, identity: tuple[str, int]) -> bool:
        return identity in self._identities

    def add(self, identity: tuple[str, int]) -> None:
        """Remember an identity. If there are now more than `size` identities, forget the oldest."""
        self._identities[identity] = None
        if len(self._identities) > self._size:
            del self._identities[next(iter(self._identities))]
