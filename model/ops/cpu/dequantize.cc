// Blocks of small integers, as GGUF files have them (ggml-quants.c), turned into numbers. Products and sums are done in
// ggml's order, so that float32 comes out as ggml makes it.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

float half(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) return std::copysign(float(fraction) * 0x1p-24f, std::bit_cast<float>(sign));
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

// Half of 2^(e - 127), which is how mxfp4's table has its numbers doubled.
float half_exponent(uint8_t e) { return std::bit_cast<float>(e < 2 ? 0x00200000u << e : uint32_t(e - 1) << 23); }

constexpr int8_t kNonLinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kMxfp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Each: SIZE bytes at b become NUMBERS floats at y.

struct Q8_0 {
  static constexpr int kSize = 34, kNumbers = 32;
  static void read(const uint8_t* b, float* y) {
    const float d = half(b);
    for (int i = 0; i < 32; ++i) y[i] = d * float(int8_t(b[2 + i]));
  }
};

struct Q4_0 {
  static constexpr int kSize = 18, kNumbers = 32;
  static void read(const uint8_t* b, float* y) {
    const float d = half(b);
    for (int i = 0; i < 16; ++i) y[i] = d * float((b[2 + i] & 15) - 8);
    for (int i = 0; i < 16; ++i) y[16 + i] = d * float((b[2 + i] >> 4) - 8);
  }
};

struct Q4_1 {
  static constexpr int kSize = 20, kNumbers = 32;
  static void read(const uint8_t* b, float* y) {
    const float d = half(b), m = half(b + 2);
    for (int i = 0; i < 16; ++i) y[i] = d * float(b[4 + i] & 15) + m;
    for (int i = 0; i < 16; ++i) y[16 + i] = d * float(b[4 + i] >> 4) + m;
  }
};

// The fifth bits, 32 of them, at `high`; the others, two a byte, at `low`.
inline void five_bits(const uint8_t* high, const uint8_t* low, int32_t* q) {
  uint32_t bits;
  std::memcpy(&bits, high, 4);
  for (int i = 0; i < 16; ++i) q[i] = (low[i] & 15) | (bits >> i & 1) << 4;
  for (int i = 0; i < 16; ++i) q[16 + i] = (low[i] >> 4) | (bits >> (16 + i) & 1) << 4;
}

struct Q5_0 {
  static constexpr int kSize = 22, kNumbers = 32;
  static void read(const uint8_t* b, float* y) {
    const float d = half(b);
    int32_t q[32];
    five_bits(b + 2, b + 6, q);
    for (int i = 0; i < 32; ++i) y[i] = d * float(q[i] - 16);
  }
};

struct Q5_1 {
  static constexpr int kSize = 24, kNumbers = 32;
  static void read(const uint8_t* b, float* y) {
    const float d = half(b), m = half(b + 2);
    int32_t q[32];
    five_bits(b + 4, b + 8, q);
    for (int i = 0; i < 32; ++i) y[i] = d * float(q[i]) + m;
  }
};

struct Q2_K {
  static constexpr int kSize = 84, kNumbers = 256;
  static void read(const uint8_t* b, float* y) {
    const float d = half(b + 80), least = half(b + 82);
    for (int group = 0; group < 16; ++group) {
      const float scale = d * float(b[group] & 15), offset = least * float(b[group] >> 4);
      const uint8_t* q = b + 16 + group / 8 * 32 + group % 2 * 16;
      const int shift = group % 8 / 2 * 2;
      for (int i = 0; i < 16; ++i) y[group * 16 + i] = scale * float(q[i] >> shift & 3) - offset;
    }
  }
};

struct Q3_K {
  static constexpr int kSize = 110, kNumbers = 256;
  static void read(const uint8_t* b, float* y) {
    const uint8_t* packed = b + 96;
    const float d = half(b + 108);
    for (int group = 0; group < 16; ++group) {
      const int low = group < 8 ? packed[group] & 15 : packed[group - 8] >> 4;
      const int high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
      const float scale = d * float((low | high << 4) - 32);
      const uint8_t* q = b + 32 + group / 8 * 32 + group % 2 * 16;
      const uint8_t* mask = b + group % 2 * 16;
      const int shift = group % 8 / 2 * 2, bit = group / 2;
      for (int i = 0; i < 16; ++i)
        y[group * 16 + i] = scale * float((q[i] >> shift & 3) - (mask[i] >> bit & 1 ? 0 : 4));
    }
  }
};

// Q4_K's and Q5_K's scales and minima: eight of each, of six bits, in twelve bytes.
inline void scale_and_least(const uint8_t* packed, int group, int& scale, int& least) {
  if (group < 4) {
    scale = packed[group] & 63;
    least = packed[group + 4] & 63;
  } else {
    scale = (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4;
    least = packed[group + 4] >> 4 | packed[group] >> 6 << 4;
  }
}

struct Q4_K {
  static constexpr int kSize = 144, kNumbers = 256;
  static void read(const uint8_t* b, float* y) {
    const float d = half(b), least = half(b + 2);
    for (int group = 0; group < 8; ++group) {
      int s, m;
      scale_and_least(b + 4, group, s, m);
      const float scale = d * float(s), offset = least * float(m);
      const uint8_t* q = b + 16 + group / 2 * 32;
      const int shift = group % 2 * 4;
      for (int i = 0; i < 32; ++i) y[group * 32 + i] = scale * float(q[i] >> shift & 15) - offset;
    }
  }
};

struct Q5_K {
  static constexpr int kSize = 176, kNumbers = 256;
  static void read(const uint8_t* b, float* y) {
    const float d = half(b), least = half(b + 2);
    for (int group = 0; group < 8; ++group) {
      int s, m;
      scale_and_least(b + 4, group, s, m);
      const float scale = d * float(s), offset = least * float(m);
      const uint8_t *high = b + 16, *q = b + 48 + group / 2 * 32;
      const int shift = group % 2 * 4;
      for (int i = 0; i < 32; ++i)
        y[group * 32 + i] = scale * float((q[i] >> shift & 15) | (high[i] >> group & 1) << 4) - offset;
    }
  }
};

struct Q6_K {
  static constexpr int kSize = 210, kNumbers = 256;
  static void read(const uint8_t* b, float* y) {
    const float d = half(b + 208);
    for (int group = 0; group < 16; ++group) {
      const float scale = d * float(int8_t(b[192 + group]));
      const int part = group / 2 % 4;  // of a half's 128 numbers
      const uint8_t* low = b + group / 8 * 64 + part % 2 * 32 + group % 2 * 16;
      const uint8_t* high = b + 128 + group / 8 * 32 + group % 2 * 16;
      const int low_shift = part / 2 * 4, high_shift = part * 2;
      for (int i = 0; i < 16; ++i)
        y[group * 16 + i] = scale * float(((low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4) - 32);
    }
  }
};

inline void looked_up(float d, const int8_t* table, const uint8_t* q, float* y) {
  for (int i = 0; i < 16; ++i) y[i] = d * float(table[q[i] & 15]);
  for (int i = 0; i < 16; ++i) y[16 + i] = d * float(table[q[i] >> 4]);
}

struct IQ4_NL {
  static constexpr int kSize = 18, kNumbers = 32;
  static void read(const uint8_t* b, float* y) { looked_up(half(b), kNonLinear, b + 2, y); }
};

struct MXFP4 {
  static constexpr int kSize = 17, kNumbers = 32;
  static void read(const uint8_t* b, float* y) { looked_up(half_exponent(b[0]), kMxfp4, b + 1, y); }
};

void put(const float* y, int n, float* out) { std::memcpy(out, y, n * sizeof(float)); }

void put(const float* y, int n, uint16_t* out) {  // bfloat16, to the nearest
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(y[i]);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    out[i] = (bits & 0x7FFFFFFF) > 0x7F800000 ? uint16_t(bits >> 16 | 64) : uint16_t(rounded);
  }
}

template <typename Block, typename Out>
void turn(const uint8_t* rows, int64_t count, int64_t blocks, const int64_t* order, Out* out) {
  float y[Block::kNumbers];
  for (int64_t row = 0; row < count; ++row) {
    const uint8_t* b = rows + (order ? order[row] : row) * blocks * Block::kSize;
    for (int64_t i = 0; i < blocks; ++i, b += Block::kSize, out += Block::kNumbers) {
      Block::read(b, y);
      put(y, Block::kNumbers, out);
    }
  }
}

template <typename Out>
void turn_kind(int64_t kind, const uint8_t* rows, int64_t count, int64_t blocks, const int64_t* order, Out* out) {
  switch (kind) {  // ggml's numbers
    case 2: return turn<Q4_0>(rows, count, blocks, order, out);
    case 3: return turn<Q4_1>(rows, count, blocks, order, out);
    case 6: return turn<Q5_0>(rows, count, blocks, order, out);
    case 7: return turn<Q5_1>(rows, count, blocks, order, out);
    case 8: return turn<Q8_0>(rows, count, blocks, order, out);
    case 10: return turn<Q2_K>(rows, count, blocks, order, out);
    case 11: return turn<Q3_K>(rows, count, blocks, order, out);
    case 12: return turn<Q4_K>(rows, count, blocks, order, out);
    case 13: return turn<Q5_K>(rows, count, blocks, order, out);
    case 14: return turn<Q6_K>(rows, count, blocks, order, out);
    case 20: return turn<IQ4_NL>(rows, count, blocks, order, out);
    case 39: return turn<MXFP4>(rows, count, blocks, order, out);
  }
}

}  // namespace

// Called by name, not through XLA: weights are read before any program runs. out: float32, or bfloat16.
extern "C" void isthmus_dequantize(int64_t kind, int64_t narrow, const uint8_t* rows, int64_t count, int64_t blocks,
                                   const int64_t* order, void* out) {
  if (narrow)
    turn_kind(kind, rows, count, blocks, order, static_cast<uint16_t*>(out));
  else
    turn_kind(kind, rows, count, blocks, order, static_cast<float*>(out));
}
