"""A model that computes nothing and knows what stands in each slot, and who reads it.

KV of a token, and a state, is a function of the tokens up to there. So a forward writes into each
slot a number that stands for exactly that prefix, where the real one would write numbers that
depend on it, and before that it checks that each slot which attention would read, or a recurrence
go on from, stands for the prefix that it should. The bytes are the pool's own: a page with two
owners, a page that is zeroed or handed out while somebody reads it, a slot that names another's
page all show up as a wrong read.

The next token is a function of the prefix as well, so an answer can be told without any memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from sglang_jenga.radix.policy import LayerPolicy, Prefix
from tests.faces.pools import Pools

ALPHABET = 3
"""Tokens are 0, 1 and 2: few, so that prompts and answers agree by chance."""
_MASK = (1 << 62) - 1


def _of_group(group_id: int) -> int:
    """What makes the same prefix read differently in each layer group."""
    return 0x1111 * (group_id + 1)


class WrongRead(AssertionError):
    """A forward would have read something else than its request's own prefix."""


class Line:
    """Tokens of one request as its forwards saw them, and the number of each prefix.

    ``prefixes[n]`` stands for the first n tokens.
    """

    def __init__(self, namespace: Hashable) -> None:
        self.tokens = array("q")
        self.prefixes = [_mix(0x5EED, hash(namespace) & 0xFFFF)]

    def put(self, begin: int, tokens: Iterable[int]) -> None:
        """The tokens from ``begin`` on are these."""
        assert begin <= len(self.tokens), "a forward begins behind what was computed"
        del self.tokens[begin:]
        del self.prefixes[begin + 1 :]
        for token in tokens:
            self.tokens.append(token)
            self.prefixes.append(_mix(self.prefixes[-1], token))

    def starts_with(self, tokens: Sequence[int]) -> bool:
        return self.tokens[: len(tokens)] == tokens

    @property
    def next_token(self) -> int:
        return (self.prefixes[-1] >> 20) % ALPHABET


def answer(prompt: Sequence[int], count: int, namespace: Hashable = None) -> list[int]:
    """The tokens that follow a prompt, without any memory."""
    line = Line(namespace)
    line.put(0, prompt)
    for _ in range(count):
        line.put(len(line.tokens), [line.next_token])
    return list(line.tokens[len(prompt) :])


def _mix(prefix: int, token: int) -> int:
    mixed = (prefix * 6364136223846793005 + token * 1442695040888963407 + 1442695041) & _MASK
    return mixed ^ (mixed >> 29)


def _tokens_read(policy: LayerPolicy, start: int, end: int) -> np.ndarray:
    """Which of the first ``end`` tokens a forward of ``[start, end)`` reads, by a layer type's own
    rule: those of the forward itself, and what each of them reads of what lies before it."""
    read = np.zeros(end, dtype=bool)
    read[start:] = True
    for length in range(max(1, start), end):
        for first, last in policy.update_last_access(Prefix(length)):
            read[first:last] = True
    return read


class SymbolicModel:
    """SGLang's model worker, as far as its scheduler knows one."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._words = pools.buffer.bytes.numpy().view(np.int64)
        self._entry_words = [group.padded_entry_bytes // 8 for group in pools.plan.groups]
        groups = pools.allocator.groups
        self._row, self._state, self._encoder = groups.row, groups.state, groups.encoder
        self._mapped = {group_id: groups.kinds[group_id].policy for group_id in groups.mapped}
        self._lines: dict[str, Line] = {}
        self._known: dict[int, str] = {}
        self.forwards = 0

    def forward_batch_generation(self, batch: Any, **_: Any) -> Any:
        """One forward: write what the batch's tokens stand for, check what they read."""
        from sglang.srt.managers.utils import GenerationBatchResult

        self.forwards += 1
        # Where a model has an encoder SGLang counts text alone; a row has the encoder first.
        borders = [0] * len(batch.reqs) if self._encoder is None else batch.encoder_lens_cpu
        ends = [end + at for end, at in zip(batch.seq_lens.tolist(), borders, strict=True)]
        if batch.forward_mode.is_decode():
            starts = [end - 1 for end in ends]
        else:
            starts = [start + at for start, at in zip(batch.prefix_lens, borders, strict=True)]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        assert sum(counts) == len(batch.input_ids) == len(batch.out_cache_loc)
        rows = batch.req_pool_indices.tolist()
        lines, given = [], iter(batch.input_ids.tolist())
        for req, start, count in zip(batch.reqs, starts, counts, strict=True):
            lines.append(self._line(req, start, [next(given) for _ in range(count)]))
        spans = list(zip(batch.reqs, rows, lines, starts, ends, strict=True))
        if self._encoder is not None and not batch.forward_mode.is_decode():
            self._encode(batch, spans, borders)
        self._write_tokens(batch, spans)
        for (req, row, line, start, end), border in zip(spans, borders, strict=True):
            self._read_tokens(req, row, line, start, end, border)
        if self._pools.states is not None:
            self._run_states(batch, spans)
        tokens = torch.tensor([line.next_token for line in lines], dtype=torch.int64)
        return GenerationBatchResult(next_token_ids=tokens)

    def _line(self, req: Any, start: int, tokens: list[int]) -> Line:
        """The request's tokens with those of this forward at its end."""
        line = self._lines.get(req.rid)
        before = req.full_untruncated_fill_ids[:start]
        if line is None or not line.starts_with(before):
            line = self._lines[req.rid] = Line((req.extra_key, req.cache_salt))
            line.put(0, before)
        line.put(start, tokens)
        self._known.update((prefix, f"{req.rid}[:{n}]") for n, prefix in enumerate(line.prefixes))
        return line

    # ---- tokens -----------------------------------------------------------------------------

    def _slots(self, row: int, start: int, end: int) -> np.ndarray:
        return self._pools.rows.req_to_token[row, start:end].numpy().astype(np.int64)

    def _window_slots(self, group_id: int, slots: np.ndarray) -> np.ndarray:
        return self._pools.allocator.slot_maps[group_id].tensor.numpy()[slots]

    def _write_tokens(self, batch: Any, spans: Sequence[Any]) -> None:
        slots = batch.out_cache_loc.numpy()
        mine = np.concatenate([self._slots(row, start, end) for _, row, _, start, end in spans])
        if not np.array_equal(slots, mine):
            raise WrongRead("rows do not name the slots that this forward writes")
        values = np.concatenate(
            [np.array(line.prefixes[start + 1 : end + 1]) for _, _, line, start, end in spans]
        )
        self._put(self._row, slots, values)
        for group_id in self._mapped:
            self._put(group_id, self._window_slots(group_id, slots), values)

    def _encode(self, batch: Any, spans: Sequence[Any], borders: Sequence[int]) -> None:
        """Write what cross attention reads of pictures that are not cached."""
        fresh = [
            (self._slots(row, 0, border), line.prefixes[1 : border + 1])
            for (_, row, line, _, _), border, cached in zip(
                spans, borders, batch.encoder_cached, strict=True
            )
            if not cached
        ]
        named = [slots for slots, _ in fresh]
        mine = np.concatenate(named) if named else np.zeros(0, dtype=np.int64)
        if not np.array_equal(batch.encoder_out_cache_loc.numpy(), mine):
            raise WrongRead("rows do not name the slots that this forward's encoder writes")
        for slots, values in fresh:
            self._put(self._encoder, slots, np.array(values))

    def _read_tokens(
        self, req: Any, row: int, line: Line, start: int, end: int, border: int
    ) -> None:
        slots = self._slots(row, 0, end)
        expected = np.array(line.prefixes[1 : end + 1])
        every = np.arange(end)
        text, picture = every[border:], every[:border]
        self._check(self._row, req, slots[text], expected[text], text)
        if border:
            self._check(self._encoder, req, slots[picture], expected[picture], picture)
        for group_id, policy in self._mapped.items():
            read = every[_tokens_read(policy, start, end)]
            seen = self._window_slots(group_id, slots[read])
            self._check(group_id, req, seen, expected[read], read)

    # ---- states -----------------------------------------------------------------------------

    def _run_states(self, batch: Any, spans: Sequence[Any]) -> None:
        pool, group_id = self._pools.states, self._state
        if batch.mamba_clear_indices is not None:
            pool.clear_slots(batch.mamba_clear_indices)
        if batch.mamba_cow_src_indices is not None:
            pool.copy_from(batch.mamba_cow_src_indices, batch.mamba_cow_dst_indices)
        slots = self._pools.rows.req_index_to_mamba_index_mapping.numpy().astype(np.int64)
        for req, row, line, start, end in spans:
            own = slots[row : row + 1]
            if start:
                self._check(
                    group_id, req, own, np.array([line.prefixes[start]]), np.array([start - 1])
                )
            self._put(group_id, own, np.array([line.prefixes[end]]))
        if batch.mamba_track_mask is None:
            return
        for index, tracked in enumerate(batch.mamba_track_mask.tolist()):
            if tracked:
                _, _, line, start, end = spans[index]
                length = self._tracked_length(batch, index, start, end)
                slot = batch.mamba_track_indices[index : index + 1].numpy()
                if slot[0] >= 0:
                    self._put(group_id, slot, np.array([line.prefixes[length]]))

    @staticmethod
    def _tracked_length(batch: Any, index: int, start: int, end: int) -> int:
        """Length whose state this forward copies, as in SGLang's `_init_track_ssm_indices`: the
        last one if it lies on a chunk's end, else that of the last chunk's end before."""
        if batch.mamba_track_seqlens_cpu is None:
            return end
        chunk = batch.model_config.hf_text_config.mamba_chunk_size
        behind = batch.mamba_track_seqlens_cpu[index] - start
        if behind % chunk == 0:
            return end
        return start + behind // chunk * chunk

    # ---- the bytes --------------------------------------------------------------------------

    def _places(self, group_id: int, slots: np.ndarray) -> np.ndarray:
        width = self._entry_words[group_id]
        return slots[:, None] * width + np.arange(width)

    def _put(self, group_id: int, slots: np.ndarray, values: np.ndarray) -> None:
        if (slots == 0).any():
            raise WrongRead(f"group {group_id}: a token is written to the null page")
        self._words[self._places(group_id, slots)] = (values ^ _of_group(group_id))[:, None]

    def _check(
        self, group_id: int, req: Any, slots: np.ndarray, expected: np.ndarray, read: np.ndarray
    ) -> None:
        """``read``: the positions whose entries lie in these slots."""
        found = self._words[self._places(group_id, slots)] ^ _of_group(group_id)
        wrong = (found != expected[:, None]).any(axis=1) | (slots == 0)
        if not wrong.any():
            return
        at = int(wrong.argmax())
        holds = "the null page" if slots[at] == 0 else self._name(found[at])
        raise WrongRead(
            f"{req.rid} reads {holds} for its first {read[at] + 1} tokens in group {group_id}, "
            f"slot {slots[at]}; {int(wrong.sum())} of {slots.size} slots are wrong"
        )

    def _name(self, found: np.ndarray) -> str:
        names = {self._known.get(int(word), "bytes of nobody") for word in found}
        return " and ".join(sorted(names))
