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

template <typename Token>
void widen(const void* tokens, const int64_t* starts, const int64_t* targets, const int64_t* lengths, int64_t count,
           int64_t* rows) {
  for (int64_t piece = 0; piece < count; ++piece) {
    const Token* from = static_cast<const Token*>(tokens) + starts[piece];
    int64_t* to = rows + targets[piece];
    for (int64_t i = 0, length = lengths[piece]; i < length; ++i) to[i] = static_cast<int64_t>(from[i]);
  }
}

}  // namespace

// Pieces of a token stream into i64 rows: piece k is tokens starts[k] … starts[k] + lengths[k] − 1 and goes to
// rows[targets[k]] onwards. `dtype` is the code of the format (1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16). 0 if it is known.
EXPORT int megatron_gather(int dtype, const void* tokens, const int64_t* starts, const int64_t* targets,
                           const int64_t* lengths, int64_t count, int64_t* rows) {
  switch (dtype) {
    case 1: widen<uint8_t>(tokens, starts, targets, lengths, count, rows); return 0;
    case 2: widen<int8_t>(tokens, starts, targets, lengths, count, rows); return 0;
    case 3: widen<int16_t>(tokens, starts, targets, lengths, count, rows); return 0;
    case 4: widen<int32_t>(tokens, starts, targets, lengths, count, rows); return 0;
    case 5: widen<int64_t>(tokens, starts, targets, lengths, count, rows); return 0;
    case 8: widen<uint16_t>(tokens, starts, targets, lengths, count, rows); return 0;
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
