// The parts of the data path that run once per sample or per token, as C functions: megatron/data/native.py calls them
// through addresses, and has the same in numpy for where nothing is compiled. No header of Python or torch.

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// choices[i − start] is the member with the largest weight · max(i, 1) − count, the first of equals, whose count then
// grows by one, for i = start … stop − 1. In double arithmetic without fused operations, so that ties fall as they do
// in Megatron.
EXPORT void megatron_greedy_choices(const double* weights, double* counts, int64_t members, int64_t start,
                                    int64_t stop, int16_t* choices) {
  for (int64_t i = start; i < stop; ++i) {
    const double position = i > 1 ? static_cast<double>(i) : 1.0;
    int64_t best = 0;
    double lag = weights[0] * position - counts[0];
    for (int64_t member = 1; member < members; ++member) {
      const double other = weights[member] * position - counts[member];
      if (other > lag) {
        best = member;
        lag = other;
      }
    }
    choices[i - start] = static_cast<int16_t>(best);
    counts[best] += 1.0;
  }
}

// Where a keyed permutation of 0 … size − 1 sends each index: `rounds` rounds of a balanced Feistel network over twice
// `half_bits` bits, again as long as the result is not below size (megatron/data/order.py).
EXPORT void megatron_permute(const uint64_t* keys, int64_t rounds, int64_t half_bits, int64_t size,
                             const int64_t* indices, int64_t count, int64_t* permuted) {
  const uint64_t mask = (uint64_t{1} << half_bits) - 1;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t value = static_cast<uint64_t>(indices[i]);
    do {
      uint64_t left = value >> half_bits, right = value & mask;
      for (int64_t round = 0; round < rounds; ++round) {
        uint64_t mixed = right * 0x9E3779B97F4A7C15u + keys[round];
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
        mixed ^= mixed >> 31;
        const uint64_t next = left ^ (mixed & mask);
        left = right;
        right = next;
      }
      value = (left << half_bits) | right;
    } while (value >= static_cast<uint64_t>(size));
    permuted[i] = static_cast<int64_t>(value);
  }
}

namespace {

struct Pieces {
  const int64_t *starts, *rows, *columns, *lengths;
  int64_t count;
};

template <typename Token>
void split(const void* stored, const Pieces& pieces, int64_t width, int64_t* tokens, int64_t* labels, int64_t* range) {
  int64_t low = range[0], high = range[1];
  for (int64_t piece = 0; piece < pieces.count; ++piece) {
    const Token* from = static_cast<const Token*>(stored) + pieces.starts[piece];
    const int64_t column = pieces.columns[piece], length = pieces.lengths[piece];
    if (length <= 0) continue;
    Token least = from[0], most = from[0];
    for (int64_t i = 1; i < length; ++i) {
      least = from[i] < least ? from[i] : least;
      most = from[i] > most ? from[i] : most;
    }
    low = static_cast<int64_t>(least) < low ? static_cast<int64_t>(least) : low;
    high = static_cast<int64_t>(most) > high ? static_cast<int64_t>(most) : high;
    // The last token of a sample is a label alone, the first one no label.
    int64_t* token = tokens + pieces.rows[piece] * width + column;
    const int64_t inputs = column + length > width ? width - column : length;
    for (int64_t i = 0; i < inputs; ++i) token[i] = static_cast<int64_t>(from[i]);
    const int64_t skipped = column == 0 ? 1 : 0;
    int64_t* label = labels + pieces.rows[piece] * width + column - 1;
    for (int64_t i = skipped; i < length; ++i) label[i] = static_cast<int64_t>(from[i]);
  }
  range[0] = low;
  range[1] = high;
}

}  // namespace

// Pieces of a token stream into rows of `width` inputs and as many labels, each the token behind its input: piece k is
// the tokens from starts[k] on, lengths[k] of them, and begins at column columns[k] of row rows[k]; a row has width + 1
// tokens. range[0] and range[1] become the lowest and highest token where they are not already. `dtype` is the code of
// the format (1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16). 0 if it is known.
EXPORT int megatron_split(int dtype, const void* stored, const int64_t* starts, const int64_t* rows,
                          const int64_t* columns, const int64_t* lengths, int64_t count, int64_t width,
                          int64_t* tokens, int64_t* labels, int64_t* range) {
  const Pieces pieces{starts, rows, columns, lengths, count};
  switch (dtype) {
    case 1: split<uint8_t>(stored, pieces, width, tokens, labels, range); return 0;
    case 2: split<int8_t>(stored, pieces, width, tokens, labels, range); return 0;
    case 3: split<int16_t>(stored, pieces, width, tokens, labels, range); return 0;
    case 4: split<int32_t>(stored, pieces, width, tokens, labels, range); return 0;
    case 5: split<int64_t>(stored, pieces, width, tokens, labels, range); return 0;
    case 8: split<uint16_t>(stored, pieces, width, tokens, labels, range); return 0;
    default: return -1;
  }
}

// (entry, offset) of token j · sequence_length of the joined documents for j = 0 … total; `entries` documents.
EXPORT void megatron_sample_index(const int32_t* sizes, const int32_t* documents, int64_t entries,
                                  int64_t sequence_length, int64_t total, int64_t* index) {
  int64_t entry = 0, start = 0;
  index[0] = index[1] = 0;
  for (int64_t j = 1; j <= total; ++j) {
    const int64_t position = j * sequence_length;
    while (entry + 1 < entries && start + sizes[documents[entry]] <= position) start += sizes[documents[entry++]];
    index[2 * j] = entry;
    index[2 * j + 1] = position - start;
  }
}

namespace {

// The Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998) on a state that is kept elsewhere.
struct Twister {
  static constexpr int64_t kLength = 624, kMiddle = 397;
  uint32_t* key;
  int64_t position;

  void refill() {
    for (int64_t i = 0; i < kLength; ++i) {
      const uint32_t joined = (key[i] & 0x80000000u) | (key[(i + 1) % kLength] & 0x7fffffffu);
      key[i] = key[(i + kMiddle) % kLength] ^ (joined >> 1) ^ (joined & 1 ? 0x9908b0dfu : 0u);
    }
    position = 0;
  }

  uint32_t next() {
    if (position == kLength) refill();
    uint32_t word = key[position++];
    word ^= word >> 11;
    word ^= (word << 7) & 0x9d2c5680u;
    word ^= (word << 15) & 0xefc60000u;
    return word ^ (word >> 18);
  }

  // 0 … most, alike often: words under the smallest mask that holds `most`, until one is not above it.
  uint32_t below(uint32_t most) {
    const uint32_t mask = 0xffffffffu >> __builtin_clz(most);
    uint32_t word;
    do word = next() & mask;
    while (word > most);
    return word;
  }
};

template <typename Number>
void shuffle(Twister& twister, Number* numbers, int64_t count) {
  constexpr int64_t kBlock = 256;
  uint32_t partners[kBlock];
  int64_t last = count - 1;
  while (last > 0) {
    const int64_t block = last < kBlock ? last : kBlock;
    // Where to is drawn ahead of the exchanges, so that memory answers meanwhile: it is what the time goes into.
    for (int64_t k = 0; k < block; ++k) {
      partners[k] = twister.below(static_cast<uint32_t>(last - k));
      __builtin_prefetch(numbers + partners[k], 1);
    }
    for (int64_t k = 0; k < block; ++k) {
      const Number kept = numbers[last - k];
      numbers[last - k] = numbers[partners[k]];
      numbers[partners[k]] = kept;
    }
    last -= block;
  }
}

}  // namespace

// The Fisher-Yates shuffle of numpy's RandomState: `key` and `position` are its state before and after. `bytes` is the
// size of a number, 4 or 8; 0 if it is, and if there are at most 2^32 of them.
EXPORT int megatron_shuffle(uint32_t* key, int64_t* position, void* numbers, int64_t bytes, int64_t count) {
  if (count > (int64_t{1} << 32)) return -1;
  Twister twister{key, *position};
  if (bytes == 4) {
    shuffle(twister, static_cast<uint32_t*>(numbers), count);
  } else if (bytes == 8) {
    shuffle(twister, static_cast<uint64_t*>(numbers), count);
  } else {
    return -1;
  }
  *position = twister.position;
  return 0;
}
