"""Branches, and what has to change in a network for some of them to go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Branch:
    """What can go: a residual branch F of a sum x + F(x), or a layer of a chain.

    Without a layer of a chain, y = x + F(x) with F(x) = y - x, its input takes the place of its
    output: both have one shape, and the layer behind it can do what a linear map of x does for y.

    Attributes:
        name: Of the block that it is, or of the last of its modules.
        block: Member of a sequence of modules that goes with its branches; None: none does.
        modules: What nothing else needs, in the order of the calls: the outermost modules.
        end: Where it ends, in the order of a forward.
        channel_dim: Of x and F(x).
        addition: Which addition of two tensors ends it, in the order of a forward; None: it is a
            layer of a chain.
        identity: Which term of that is x: 0 or 1.
        members: Of the modules of a layer of a chain those that leave a sequence of modules.
    """

    name: str
    block: str | None
    modules: tuple[str, ...]
    end: int
    channel_dim: int
    addition: int | None = None
    identity: int = 0
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Removal:
    """What changes in a network: names of modules.

    Attributes:
        blocks: Members of sequences of modules, that leave them.
        zeroed: Modules in the place of which zeros are added.
        passed: Modules in the place of which nothing happens: zeroed ones read them, or their input
            takes the place of their output.
    """

    blocks: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.modules)

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that go."""
        return (*self.blocks, *self.zeroed, *self.passed)

    def behind(self, earlier: Removal) -> Removal:
        """Return what left a network in two removals, this one the second."""
        gone = tuple(f"{name}." for name in (*earlier.blocks, *self.blocks))

        def left(*names: str) -> tuple[str, ...]:
            return tuple(name for name in names if not name.startswith(gone))

        return Removal(
            left(*earlier.blocks, *self.blocks),
            left(*earlier.zeroed, *self.zeroed),
            left(*earlier.passed, *self.passed),
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
        parts = [b for b in going if b.block is None or b.block in staying]
        sums = [b.modules for b in parts if b.addition is not None]
        layers = [b for b in parts if b.addition is None]
        passed = [n for b in layers for n in b.modules if n not in b.members]
        return cls(
            (*dict.fromkeys(whole), *(name for b in layers for name in b.members)),
            tuple(modules[-1] for modules in sums),
            (*(name for modules in sums for name in modules[:-1]), *passed),
        )
