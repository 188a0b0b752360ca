"""Why a prefix was not hit: one line per look-up at debug level, and counters per reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sglang_jenga.layers.base import LayerKind
from sglang_jenga.radix.node import Match, Miss

logger = logging.getLogger(__name__)

NEVER_SEEN = "not cached"


class MissReport:
    """Counts the tokens that look-ups did not hit, by reason.

    Reasons are the layer groups' labels (the tree has the tokens, but that group lost what it
    needs) and `NEVER_SEEN` (no cached key goes on like this, or the full group lost it too; an
    image is there as a whole or not at all). SGLang looks a waiting request up in every scheduling
    round, so look-ups are counted, not requests.
    """

    def __init__(self, kinds: Sequence[LayerKind], metric_labels: dict[str, str] | None) -> None:
        self._labels = [kind.label for kind in kinds]
        self._per_prefix = [kind.policy.per_prefix for kind in kinds]
        self.tokens: Counter[str] = Counter()
        self._metric = None
        if metric_labels is not None:
            from prometheus_client import Counter as Metric  # after SGLang set its directory

            self._metric = Metric(
                "sglang:jenga_missed_prefix_tokens_total",
                "Tokens that prefix look-ups did not hit, by the reason.",
                labelnames=[*metric_labels, "reason"],
            )
            self._metric_labels = metric_labels

    def record(self, match: Match, length: int, request: Any) -> None:
        """``length``: tokens looked up; ``request``: SGLang's, or None."""
        for miss in match.misses:
            self._count(self._labels[miss.group_id], miss.before - miss.after)
        if length > match.agreed:
            self._count(NEVER_SEEN, length - match.agreed)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "jenga prefix rid=%s looked up %d, hit %d%s",
                getattr(request, "rid", None),
                length,
                match.node.end,
                "".join(f"; {reason}" for reason in self.reasons(match, length)),
            )

    def _count(self, reason: str, tokens: int) -> None:
        self.tokens[reason] += tokens
        if self._metric is not None:
            self._metric.labels(**self._metric_labels, reason=reason).inc(tokens)

    def reasons(self, match: Match, length: int) -> list[str]:
        """One sentence per cut, the first to happen first."""
        found = []
        if length > match.agreed:
            found.append(f"tokens {match.agreed:,}-{length:,} are not cached")
        return found + [self._sentence(miss) for miss in match.misses]

    def _sentence(self, miss: Miss) -> str:
        label, (begin, end) = self._labels[miss.group_id], miss.lost
        if self._per_prefix[miss.group_id]:
            return f"no {label} at {end:,}"
        return f"{label} group lost tokens {begin:,}-{end:,}"
