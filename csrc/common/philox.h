// Philox4x32-10, a counter-based generator: 128 random bits that depend on a counter and a key alone, so that a kernel draws the same in any order and on any
// device (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MODALIGN_PHILOX __host__ __device__ __forceinline__
#else
#define MODALIGN_PHILOX inline
#endif

namespace modalign {

// Word is std::uint32_t, or a vector of them whose lanes have counters of their own.
template <class Word>
struct PhiloxBits {
  Word word[4];
};

// product(factor, x, high, low): the halves of the 64-bit products of 32-bit numbers. Its type also keeps instances of different instruction sets apart.
template <class Word, class Product>
MODALIGN_PHILOX PhiloxBits<Word> philox(PhiloxBits<Word> counter, std::uint64_t key, const Product& product) {
  std::uint32_t low_key = static_cast<std::uint32_t>(key), high_key = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    Word high[2], low[2];
    product(0xD2511F53u, counter.word[0], high[0], low[0]);
    product(0xCD9E8D57u, counter.word[2], high[1], low[1]);
    counter = {high[1] ^ counter.word[1] ^ low_key, low[1], high[0] ^ counter.word[3] ^ high_key, low[0]};
    low_key += 0x9E3779B9u;
    high_key += 0xBB67AE85u;
  }
  return counter;
}

struct ScalarProduct {
  MODALIGN_PHILOX void operator()(std::uint32_t factor, std::uint32_t x, std::uint32_t& high, std::uint32_t& low) const {
    const std::uint64_t product = static_cast<std::uint64_t>(factor) * x;
    high = static_cast<std::uint32_t>(product >> 32);
    low = static_cast<std::uint32_t>(product);
  }
};

}  // namespace modalign
