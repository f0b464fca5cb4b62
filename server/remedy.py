"""Collapse: signs of it in a round's figures, and what the server does about them if it is told to."""

from dataclasses import dataclass, replace

import torch

from fedssl import progress
from fedssl.collapse import diagnose
from fedssl.methods.base import PROTOTYPES
from fedssl.prototypes import reseed
from fedssl.training import RANKME_SAMPLES
from fedssl.wire import MOST_CONTRAST
from server.rounds import RoundResult

_SETTLING_ROUNDS, _SETTLING_SHARE = 3, 0.2  # untrained codes look collapsed at first


@dataclass(frozen=True)
class Remedy:
    """What to watch and what to do.

    Attributes:
        rounds: of the whole federation.
        num_prototypes: K, or 0.
        num_blocks: groups of prototypes that do not compete.
        width: of the encoder's features.
        seed: of the run.
        reseed: start prototypes that no site uses again beside busy ones, while most sites show signs.
        contrast: factor on the contrastive term's weight for each round in which most sites show signs; 1: off.
    """

    rounds: int
    num_prototypes: int
    num_blocks: int
    width: int
    seed: int
    reseed: bool
    contrast: float

    def treat(self, result: RoundResult, contrast: float) -> RoundResult:
        """Look for signs of collapse in a round, and change its state and the next round's ``contrast``.

        Args:
            result: of the round; it is not changed.
            contrast: factor of the contrastive term in this round.
        """
        if result.number <= max(_SETTLING_ROUNDS, _SETTLING_SHARE * self.rounds):
            return replace(result, contrast=contrast)
        result = replace(result, signs=self._signs(result), contrast=contrast)
        ill = len(result.signs) * 2 > len(result.metrics)
        if ill and self.reseed and PROTOTYPES in result.state and result.number < self.rounds:
            result = self._reseeded(result)
        return replace(result, contrast=self._next_contrast(result)) if self.contrast > 1.0 else result

    def _signs(self, result: RoundResult) -> dict[str, list[str]]:
        found = {}
        for site, metrics in result.metrics.items():
            samples = min(RANKME_SAMPLES, result.examples[site])
            competing = self.num_prototypes // self.num_blocks
            signs = diagnose(metrics, num_prototypes=competing, width=self.width, samples=samples)
            if signs:
                found[site] = signs
        return found

    def _reseeded(self, result: RoundResult) -> RoundResult:
        shares = torch.tensor(list(result.usage.values()))
        generator = torch.Generator().manual_seed(self.seed * 100_003 + result.number)
        prototypes, count = reseed(result.state[PROTOTYPES], shares, generator, blocks=self.num_blocks)
        if count:
            text = f"Round {result.number}: {count} prototypes that no site uses start again beside busy ones."
            progress.publish(progress.Note(text))
        return replace(result, state={**result.state, PROTOTYPES: prototypes}, reseeded=count)

    def _next_contrast(self, result: RoundResult) -> float:
        """Raise the factor while more than half of the sites show signs, lower it when none does."""
        changed = result.contrast
        if len(result.signs) * 2 > len(result.metrics):
            changed = min(result.contrast * self.contrast, MOST_CONTRAST)
        elif not result.signs:
            changed = max(result.contrast / self.contrast, 1.0)
        if changed != result.contrast:
            text = f"Round {result.number}: the contrastive term weighs {changed:.3g} times from now on."
            progress.publish(progress.Note(text))
        return changed
