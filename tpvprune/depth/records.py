"""Residual branches, and what has to change in a network for some of them to go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Branch:
    """A residual branch F of a sum x + F(x), that can go.

    Attributes:
        name: Of the block that it is, or of the last of its modules.
        block: Member of a sequence of modules that goes with its branches; None: none does.
        modules: What nothing else needs, in the order of the calls: the outermost modules.
        addition: Which addition of two tensors ends it, in the order of a forward.
        identity: Which term of that is x: 0 or 1.
        channel_dim: Of x and F(x).
    """

    name: str
    block: str | None
    modules: tuple[str, ...]
    addition: int
    identity: int
    channel_dim: int


@dataclass(frozen=True)
class Removal:
    """What changes in a network: names of modules.

    Attributes:
        blocks: Members of sequences of modules, that leave them.
        zeroed: Modules in the place of which zeros are added.
        passed: Modules in the place of which nothing happens: only zeroed ones read them.
    """

    blocks: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.blocks or self.zeroed)

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that go."""
        return (*self.blocks, *self.zeroed, *self.passed)

    def behind(self, earlier: Removal) -> Removal:
        """Return what left a network in two removals, this one the second."""
        blocks = (*earlier.blocks, *self.blocks)
        gone = tuple(f"{name}." for name in blocks)

        def left(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(name for name in names if not name.startswith(gone))

        return Removal(
            tuple(name for name in blocks if not name.startswith(gone)),
            (*left(earlier.zeroed), *left(self.zeroed)),
            (*left(earlier.passed), *left(self.passed)),
        )

    @classmethod
    def read(cls, saved: Mapping[str, Sequence[str]]) -> Removal:
        """Return what was saved as lists by the names of the attributes."""
        return cls(**{key: tuple(names) for key, names in saved.items()})

    @classmethod
    def of(cls, branches: Sequence[Branch], gone: Collection[str]) -> Removal:
        """Return what changes when branches go.

        Returns whole blocks where all of their branches go, else modules.
        """
        staying = {b.block for b in branches if b.name not in gone}
        going = [b for b in branches if b.name in gone]
        whole = [b.block for b in going if b.block is not None and b.block not in staying]
        parts = [b.modules for b in going if b.block is None or b.block in staying]
        return cls(
            tuple(dict.fromkeys(whole)),
            tuple(modules[-1] for modules in parts),
            tuple(name for modules in parts for name in modules[:-1]),
        )
