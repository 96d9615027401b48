"""How far a pruning run is: its rounds, and the file from which one that was stopped goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tpvprune.disk.digest import digest_of
from tpvprune.disk.tensors import by_part, load_tensors, read_facts, read_tensors, save_tensors
from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.removal import remove_channels
from tpvprune.processes.membership import num_processes
from tpvprune.widths.ranking import PARTS, Ranking
from tpvprune.widths.speed import Speed

_PARTS = ("model", "kept", *PARTS)
_PLAIN = ("chosen", "history", "seconds", "predicted")


@dataclass
class Rounds:
    """What the rounds so far have led to.

    Attributes:
        model: The network as it is; of round number ``chosen`` the channels have left.
        kept: What stays of the dense channels.
        ranking: Of the dense network.
        chosen: Number of the round, from 1; 0: nothing has left.
        history: One entry for every round.
        speed: As it was measured, where milliseconds are the budget.
        seconds: By stage.
        predicted: The output variance that curves promised so far.
    """

    model: nn.Module
    kept: Kept
    ranking: Ranking
    chosen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    speed: Speed | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    predicted: float = 0.0


@dataclass(frozen=True)
class Record:
    """The file in which a run notes where it stands, if it does."""

    path: Path | None
    key: str

    @classmethod
    def of(cls, path: str | Path | None, *parts: Any) -> Record:
        """Return that of a run; several processes have none."""
        if path is None or num_processes() > 1:
            return cls(None, "")
        return cls(Path(path), digest_of(*parts).hex())

    def facts(self) -> dict[str, Any]:
        """Return what is known of this run where it stopped, but tensors; empty if it did not."""
        if self.path is None or not self.path.exists():
            return {}
        facts: dict[str, Any] = read_facts(self.path)
        return facts if facts.get("key") == self.key else {}

    def load(self, model: nn.Module, groups: ChannelGroups) -> Rounds | None:
        """Return where this run stopped, of the network that its channels left."""
        facts = self.facts()
        if self.path is None or not facts:
            return None
        parts = read_tensors(self.path, _PARTS)
        kept: Kept = {g.name: parts["kept"][g.name] for g in groups}
        pruned = remove_channels(model, groups, kept)
        load_tensors(pruned, parts["model"])
        ranking = Ranking.from_parts(parts, facts["ranking"])
        speed = None if facts["speed"] is None else Speed(**facts["speed"])
        plain = {name: facts[name] for name in _PLAIN}
        return Rounds(pruned, kept, ranking, speed=speed, **plain)

    def save(self, rounds: Rounds, depth: Mapping[str, Any] | None = None) -> None:
        """Write where the run stands, and which branches left, in the place of what was there."""
        if self.path is None:
            return
        ranked, ranking = rounds.ranking.to_parts()
        parts = {"model": rounds.model.state_dict(), "kept": rounds.kept, **ranked}
        speed = None if rounds.speed is None else asdict(rounds.speed)
        plain = {name: getattr(rounds, name) for name in _PLAIN}
        facts = {"key": self.key, **plain, "speed": speed, "ranking": ranking, "depth": depth}
        save_tensors(self.path, by_part(parts), facts)
