"""Text to token ids in chunks that are remembered, so that a long conversation is cheap to encode again."""

from __future__ import annotations

import itertools
import re
import sys
import threading
from array import array
from collections import OrderedDict
from typing import Any

from hermes_atropos.rendering.tokenizers import LONG

__all__ = ["ChunkEncoder"]

#: Memory that the chunks may take, texts and ids together: about a million tokens in long ones.
REMEMBERED_BYTES = 2**23
#: What a chunk takes beside its text and its ids: a place in the dictionary.
PLACE_BYTES = 100


class ChunkEncoder:
    """Encodes as the tokenizer does, piece by piece.

    A tokenizer cuts a text at its special tokens before anything else, so what stands between two of them has the same
    ids in every conversation. Whether that holds for the tokenizer at hand is tried out; where it does not, texts are
    encoded whole. May be used from several threads.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        added = dict(getattr(tokenizer, "added_tokens_decoder", {}))
        #: Text and id of each special token.
        self.special = {str(token): token_id for token_id, token in added.items() if token.special}
        self._memo: OrderedDict[str, array[int]] = OrderedDict()
        #: Bytes of the chunks that are remembered.
        self.remembered = 0
        self._lock = threading.Lock()
        self._cut: re.Pattern[str] | None = None
        plain = "a b\n\n <x> ä\td  \n" + "".join(map(str, added.values()))
        if self._backend is not None and self.whole(plain) != self._by_transformers(plain):
            self._backend = None
        cuts = [
            str(token)
            for token in added.values()
            if token.special and not (token.lstrip or token.single_word or token.normalized)
        ]
        others = [str(token) for token in added.values() if str(token) not in cuts]
        if cuts and not _overlapping(cuts, others):
            self._cut = re.compile("|".join(re.escape(cut) for cut in sorted(cuts, key=len, reverse=True)))
            probe = "a b\n" + "".join(f"{cut}\n\n {cut} c{cut}\td  \n" for cut in cuts[:64])
            if self(probe) != self.whole(probe):
                self._cut = None

    def __call__(self, text: str) -> list[int]:
        """``[n] int``, the same as ``whole``."""
        if self._cut is None:
            return self.whole(text)
        starts = [match.start() for match in self._cut.finditer(text)]
        ids: list[int] = []
        for start, end in itertools.pairwise([0, *starts, len(text)]):
            if start < end:
                ids.extend(self._chunk(text[start:end]))
        return ids

    def whole(self, text: str) -> list[int]:
        """The tokenizer's own ids of a text in which special tokens are already written out."""
        if self._backend is not None and len(text) < LONG:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        if self._backend is not None:
            return list(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        return self._by_transformers(text)

    def _by_transformers(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _chunk(self, text: str) -> array[int]:
        with self._lock:
            ids = self._memo.get(text)
            if ids is not None:
                self._memo.move_to_end(text)
                return ids
        ids = array("I", self.whole(text))
        if _size(text, ids) > REMEMBERED_BYTES // 4:
            return ids
        with self._lock:
            if text not in self._memo:
                self._memo[text] = ids
                self.remembered += _size(text, ids)
            while self.remembered > REMEMBERED_BYTES:
                self.remembered -= _size(*self._memo.popitem(last=False))
        return ids


def _size(text: str, ids: array[int]) -> int:
    return sys.getsizeof(text) + sys.getsizeof(ids) + PLACE_BYTES


def _overlapping(cuts: list[str], others: list[str]) -> bool:
    """Whether another added token can hold a cut, or end with what a cut begins with: it might win the match."""
    beginnings = {cut[:length] for cut in cuts for length in range(1, len(cut) + 1)}
    return any(
        any(other[start:] in beginnings for start in range(1, len(other))) or any(cut in other for cut in cuts)
        for other in others
    )
