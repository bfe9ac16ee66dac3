// How kernels read quantized weights: a group of 32 columns of one tile's 16 rows at a time.
//
// A format is a struct that loads a group's codes as eight words of bytes (byte j of word w is column 4 * w + j) and
// its kScales scales, each for kGroup / kScales columns. A value is scale * (byte - kOffset), plus min if kHasMins.
// `kByteBits` says how large a byte less kOffset can be.
#pragma once

#include "packed.h"
#include "vec.h"

namespace jinn::JINN_ISA {

constexpr int kGroupWords = kGroup / 4;  // words of four columns

// One tile.
struct Tile {
  const uint8_t* words;

  Tile(const PackedTensor& weight, int64_t tile) : words(weight.tile(tile)) {}

  u32x16 word(int64_t w) const { return load_as<u32x16>(words + 4 * kLanes * w); }
};

// What a block of a tile keeps beside its codes, and which of its groups is meant.
struct BlockScales {
  const uint8_t* sub_scales;
  const uint8_t* scales;
  const uint8_t* mins;
  int group;

  u32x16 sub_word(int w) const { return load_as<u32x16>(sub_scales + 4 * kLanes * w); }
  f32x16 scale(int i) const { return half(scales, i); }
  f32x16 min(int i) const { return half(mins, i); }

 private:
  static f32x16 half(const uint8_t* halves, int i) {
    return load_f16(reinterpret_cast<const uint16_t*>(halves) + i * kLanes);
  }
};

// Shifts left, or right where `bits` is negative.
JINN_INLINE u32x16 shifted(u32x16 words, int bits) { return bits < 0 ? words >> -bits : words << bits; }

// Codes of LowBits + HighBits bits.
template <int LowBits, int HighBits, int Offset>
struct PlainCodes {
  static constexpr int kBits = LowBits + HighBits;
  static constexpr int kByteBits = kBits;
  static constexpr int kOffset = Offset;

  JINN_INLINE void load_group(const uint8_t* codes, u32x16* words) {
    load_fields<LowBits>(codes, 0, words);
    if constexpr (HighBits > 0) {
      u32x16 high[kGroupWords];
      load_fields<HighBits>(codes + 4 * kLanes * LowBits, LowBits, high);
      for (int w = 0; w < kGroupWords; ++w) words[w] |= high[w];
    }
  }

  // The codes of one column of a group.
  JINN_INLINE u32x16 load_code(const uint8_t* codes, uint32_t col) {
    u32x16 code = load_field<LowBits>(codes, col);
    if constexpr (HighBits > 0) code |= load_field<HighBits>(codes + 4 * kLanes * LowBits, col) << LowBits;
    return code;
  }

 private:
  // The fields of as many words as they have bits, each in a byte of its own, `to` bits up.
  template <int Bits>
  JINN_INLINE void load_fields(const uint8_t* from, int to, u32x16* out) {
    constexpr int kPerByte = 8 / Bits;
    const uint32_t mask = 0x01010101u * (((1u << Bits) - 1) << to);
#pragma GCC unroll 8
    for (int w = 0; w < kGroupWords; ++w) {
      const u32x16 word = load_as<u32x16>(from + 4 * kLanes * (w / kPerByte));
      out[w] = shifted(word, to - Bits * (w % kPerByte)) & mask;
    }
  }

  template <int Bits>
  JINN_INLINE u32x16 load_field(const uint8_t* from, uint32_t col) {
    constexpr int kPerByte = 8 / Bits;
    const uint32_t word = col / 4, shift = 8 * (col % 4) + Bits * (word % kPerByte);
    return (load_as<u32x16>(from + 4 * kLanes * (word / kPerByte)) >> (u32x16{} + shift)) & ((1u << Bits) - 1);
  }
};

// Codes of 4 bits that stand for the 16 values of llama.cpp's kvalues_iq4nl, here 128 higher.
struct CodebookCodes {
  static constexpr int kBits = 4;
  static constexpr int kByteBits = 8;
  static constexpr int kOffset = 128;

  JINN_INLINE void load_group(const uint8_t* codes, u32x16* words) {
    PlainCodes<4, 0, 0>::load_group(codes, words);
    for (int w = 0; w < kGroupWords; ++w) words[w] = look_up(kCodebook, words[w]);
  }
  JINN_INLINE u32x16 load_code(const uint8_t* codes, uint32_t col) {
    return look_up(kCodebook, PlainCodes<4, 0, 0>::load_code(codes, col)) & 255u;
  }

 private:
  static constexpr uint8_t kCodebook[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
};

// A scale, and a minimum, per group.
template <bool HasMins>
struct GroupScales {
  static constexpr int kElems = kGroup, kSubScaleBytes = 0;
  static constexpr int kScales = 1;
  static constexpr bool kHasMins = HasMins;

  JINN_INLINE void load_scales(const BlockScales& of, f32x16* scale, f32x16* min) {
    *scale = of.scale(of.group);
    if constexpr (HasMins) *min = of.min(of.group);
  }
};

// Q4_K, Q5_K: the first four groups' scales and minima are the low 6 bits of words 0 and 1; the other groups' low bits
// are the nibbles of word 2, and their high 2 bits the rest of words 0 and 1.
struct SixBitScalesAndMins {
  static constexpr int kElems = 256, kSubScaleBytes = 12;
  static constexpr int kScales = 1;
  static constexpr bool kHasMins = true;

  JINN_INLINE void load_scales(const BlockScales& of, f32x16* scale, f32x16* min) {
    const int shift = 8 * (of.group % 4);
    const u32x16 scales = of.sub_word(0) >> shift, mins = of.sub_word(1) >> shift, lows = of.sub_word(2) >> shift;
    const bool is_first = of.group < 4;
    const u32x16 sub_scale = is_first ? scales & 63u : (lows & 15u) | ((scales >> 2) & 48u);
    const u32x16 sub_min = is_first ? mins & 63u : ((lows >> 4) & 15u) | ((mins >> 2) & 48u);
    *scale = of.scale(0) * to_float((i32x16)sub_scale);
    *min = -(of.min(0) * to_float((i32x16)sub_min));
  }
};

// Q3_K: scale i of 16 has its low 4 bits in byte i % 8 of words 0 and 1, its high 2 bits in byte i % 4 of word 2.
struct SixBitScales {
  static constexpr int kElems = 256, kSubScaleBytes = 12;
  static constexpr int kScales = 2;
  static constexpr bool kHasMins = false;

  JINN_INLINE void load_scales(const BlockScales& of, f32x16* scale, f32x16*) {
    const f32x16 block = of.scale(0);
    const u32x16 lows = of.sub_word(of.group / 2 % 2) >> (4 * (of.group / 4));
    const u32x16 highs = of.sub_word(2) >> (2 * (of.group / 2));
    for (int i = 0; i < kScales; ++i) {
      const int shift = 8 * (of.group % 2 * 2 + i);
      const u32x16 code = ((lows >> shift) & 15u) | (((highs >> shift) & 3u) << 4);
      scale[i] = block * to_float((i32x16)code - 32);
    }
  }
};

// Q6_K: 16 signed bytes.
struct ByteScales {
  static constexpr int kElems = 256, kSubScaleBytes = 16;
  static constexpr int kScales = 2;
  static constexpr bool kHasMins = false;

  JINN_INLINE void load_scales(const BlockScales& of, f32x16* scale, f32x16*) {
    const f32x16 block = of.scale(0);
    const u32x16 codes = of.sub_word(of.group / 2);
    for (int i = 0; i < kScales; ++i) {
      const int byte = of.group % 2 * 2 + i;
      scale[i] = block * to_float((i32x16)(codes << (24 - 8 * byte)) >> 24);
    }
  }
};

// Q2_K: 16 bytes, a scale in the low half and a minimum in the high one.
struct NibbleScalesAndMins {
  static constexpr int kElems = 256, kSubScaleBytes = 16;
  static constexpr int kScales = 2;
  static constexpr bool kHasMins = true;

  JINN_INLINE void load_scales(const BlockScales& of, f32x16* scale, f32x16* min) {
    const f32x16 block = of.scale(0), block_min = of.min(0);
    for (int i = 0; i < kScales; ++i) {
      const u32x16 code = of.sub_word(of.group / 2) >> (8 * (of.group % 2 * 2 + i));
      scale[i] = block * to_float((i32x16)(code & 15u));
      min[i] = -(block_min * to_float((i32x16)((code >> 4) & 15u)));
    }
  }
};

// IQ4_XS: a half with the high 2 bits of the groups' scales, then a word with their low 4.
struct SplitScales {
  static constexpr int kElems = 256, kSubScaleBytes = 6;
  static constexpr int kScales = 1;
  static constexpr bool kHasMins = false;

  JINN_INLINE void load_scales(const BlockScales& of, f32x16* scale, f32x16*) {
    const u32x16 highs = load_u16(of.sub_scales) >> (2 * of.group);
    const u32x16 lows = load_as<u32x16>(of.sub_scales + 2 * kLanes) >> (4 * of.group);
    *scale = of.scale(0) * to_float((i32x16)((lows & 15u) | ((highs & 3u) << 4)) - 32);
  }
};

template <class Codes, class Scales>
struct BlockCodes : Codes, Scales {
  static constexpr BlockLayout kLayout{Codes::kBits, Scales::kElems, Scales::kSubScaleBytes, Scales::kHasMins};

  JINN_INLINE void load_codes(const Tile& tile, int64_t group, u32x16* words) {
    Codes::load_group(codes(tile, group), words);
  }
  JINN_INLINE void load_scales(const Tile& tile, int64_t group, f32x16* scale, f32x16* min) {
    const uint8_t* from = block(tile, group);
    const int at = static_cast<int>(group % kLayout.groups);
    Scales::load_scales({from + kLayout.sub_scales, from + kLayout.scales, from + kLayout.mins, at}, scale, min);
  }
  // The weights of one column of a group, whose scales and minima are loaded.
  JINN_INLINE f32x16 load_column(const Tile& tile, int64_t group, uint32_t col, const f32x16* scales,
                                 const f32x16* mins) {
    const uint32_t part = Scales::kScales > 1 ? col / (kGroup / Scales::kScales) : 0;
    const f32x16 code = to_float((i32x16)Codes::load_code(codes(tile, group), col) - Codes::kOffset);
    return Scales::kHasMins ? fma(code, scales[part], mins[part]) : code * scales[part];
  }

 private:
  JINN_INLINE const uint8_t* block(const Tile& tile, int64_t group) {
    return tile.words + group / kLayout.groups * kLayout.bytes;
  }
  JINN_INLINE const uint8_t* codes(const Tile& tile, int64_t group) {
    return block(tile, group) + group % kLayout.groups * kLayout.group_bytes;
  }
};

// Calls `use` with the BlockCodes of a quantized format.
template <class Use>
void with_block_codes(Format format, const Use& use) {
  switch (format) {
    case Format::Q8_0:
      return use(BlockCodes<PlainCodes<8, 0, 128>, GroupScales<false>>());
    case Format::Q4_0:
      return use(BlockCodes<PlainCodes<4, 0, 8>, GroupScales<false>>());
    case Format::Q4_1:
      return use(BlockCodes<PlainCodes<4, 0, 0>, GroupScales<true>>());
    case Format::Q5_0:
      return use(BlockCodes<PlainCodes<4, 1, 16>, GroupScales<false>>());
    case Format::Q5_1:
      return use(BlockCodes<PlainCodes<4, 1, 0>, GroupScales<true>>());
    case Format::Q2_K:
      return use(BlockCodes<PlainCodes<2, 0, 0>, NibbleScalesAndMins>());
    case Format::Q3_K:
      return use(BlockCodes<PlainCodes<2, 1, 4>, SixBitScales>());
    case Format::Q4_K:
      return use(BlockCodes<PlainCodes<4, 0, 0>, SixBitScalesAndMins>());
    case Format::Q5_K:
      return use(BlockCodes<PlainCodes<4, 1, 0>, SixBitScalesAndMins>());
    case Format::Q6_K:
      return use(BlockCodes<PlainCodes<4, 2, 32>, ByteScales>());
    case Format::IQ4_NL:
      return use(BlockCodes<CodebookCodes, GroupScales<false>>());
    case Format::IQ4_XS:
      return use(BlockCodes<CodebookCodes, SplitScales>());
    case Format::F32:
    case Format::F16:
    case Format::BF16:
      break;  // not quantized
  }
}

}  // namespace jinn::JINN_ISA
