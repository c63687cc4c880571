"""Which tokens sample i is: the `megatron` order, exactly Megatron's GPT dataset's, and the `stable` order.

This module owns the two orders as arithmetic on lengths. It must not know where tokens are stored, nor torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron.data import native

_UINT32_SAMPLES = 2**32 - 2  # from here on Megatron's shuffle index is i64
_SEPARATE_BELOW = 0.80


@dataclass(frozen=True)
class MegatronOrder:
    """The three indices of Megatron's GPT dataset.

    `document_index` i32[epochs x documents]: the documents in the order in which they are joined. `sample_index`
    [samples + 1, 2]: (entry of `document_index`, token within it) at which each sample starts; sample j ends with the
    token at entry j + 1, which is also the first of sample j + 1. `shuffle_index` u32[samples]: sample i of the run is
    number `shuffle_index[i]`. `separate_last_epoch` says that the last epoch is shuffled apart from those before it.
    """

    document_index: NDArray[np.int32]
    sample_index: NDArray[np.integer]
    shuffle_index: NDArray[np.integer]
    epochs: int
    separate_last_epoch: bool

    def __len__(self) -> int:
        """Samples that exist: at least as many as were asked for."""
        return len(self.shuffle_index)


def megatron_order(sizes: NDArray[np.integer], *, sequence_length: int, samples: int, seed: int) -> MegatronOrder:
    """The order for `samples` requested samples of `sequence_length` + 1 tokens over sequences of the given sizes.

    Source: `GPTDataset` of Megatron Core, which equals Megatron-LLM's wherever that does not abort. There must be at
    least one token.
    """
    documents = np.arange(len(sizes), dtype=np.int32)
    epoch_tokens = int(np.sum(sizes, dtype=np.int64))
    assert epoch_tokens > 0 and samples > 0 and sequence_length > 0, (epoch_tokens, samples, sequence_length)
    epochs = max(1, -(-(samples * sequence_length + 1) // epoch_tokens))
    total = (epochs * epoch_tokens - 1) // sequence_length
    before_last = ((epochs - 1) * epoch_tokens - 1) // sequence_length
    separate = epochs > 1 and _is_separate(samples - before_last, (epoch_tokens - 1) // sequence_length)
    generator = np.random.RandomState(seed)  # only the shuffles below may consume it, in this order
    if separate:
        document_index = np.concatenate(
            (_shuffled_block(generator, documents, epochs - 1), _shuffled_block(generator, documents, 1))
        )
    else:
        document_index = _shuffled_block(generator, documents, epochs)
    sample_index = _sample_index(sizes, document_index, sequence_length, total)
    bounds = [(0, before_last), (before_last, total)] if separate else [(0, total)]
    shuffle_index = np.concatenate([_permutation(generator, low, high, total) for low, high in bounds])
    return MegatronOrder(document_index, sample_index, shuffle_index, epochs, separate)


def _is_separate(last_epoch_samples: int, samples_per_epoch: int) -> bool:
    """Whether the last epoch is used so little that mixing it in would favour some documents."""
    return last_epoch_samples < int(_SEPARATE_BELOW * samples_per_epoch)


def _shuffled_block(generator: np.random.RandomState, documents: NDArray[np.int32], copies: int) -> NDArray[np.int32]:
    block = np.tile(documents, copies)
    native.shuffle(generator, block)
    return block


def _permutation(generator: np.random.RandomState, low: int, high: int, total: int) -> NDArray[np.integer]:
    dtype = np.dtype(np.uint32 if total < _UINT32_SAMPLES else np.int64)
    numbers: NDArray[np.integer] = np.arange(low, high).astype(dtype)
    native.shuffle(generator, numbers)
    return numbers


def _sample_index(
    sizes: NDArray[np.integer], document_index: NDArray[np.int32], sequence_length: int, total: int
) -> NDArray[np.integer]:
    """(document entry, offset) of token j x sequence_length of the joined documents, for j = 0 … total."""
    index = native.sample_index(sizes.astype(np.int32, copy=False), document_index, sequence_length, total)
    large = max(len(document_index), int(sizes.max())) > np.iinfo(np.int32).max
    return index if large else index.astype(np.int32)


class KeyedPermutation:
    """A permutation of 0 … size − 1 that is computed, not stored: `permutation(i)` takes O(1) time and memory.

    A balanced Feistel network over the smallest even number of bits that holds `size`, keyed by (seed, epoch), with
    cycle walking: an output beyond `size` is fed in again (under four times on average), so the map stays one-to-one
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """

    _ROUNDS = 8
    _MASK64 = 2**64 - 1

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        assert size > 0, size
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        digest = hashlib.blake2b(f"stable order, seed {seed}, epoch {epoch}".encode(), digest_size=8 * self._ROUNDS)
        content = digest.digest()
        self._keys = [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content), 8)]
        self._key_words = np.array(self._keys, dtype=np.uint64)

    def __call__(self, index: int) -> int:
        """Where `index` goes."""
        assert 0 <= index < self.size, (index, self.size)
        value = self._encrypt(index)
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each of these goes."""
        return native.permute(self._key_words, self._half_bits, self.size, indices)

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (self._mix(right, key) & self._half_mask)
        return (left << self._half_bits) | right

    def _mix(self, value: int, key: int) -> int:
        """A keyed 64-bit hash with good low bits: the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
        value = (value * 0x9E3779B97F4A7C15 + key) & self._MASK64
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & self._MASK64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & self._MASK64
        return value ^ (value >> 31)
