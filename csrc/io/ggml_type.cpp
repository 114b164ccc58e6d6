#include "ggml_type.h"

#include <cstring>

namespace mixtral {
namespace {

constexpr GgmlType kTypes[] = {
    {0, "F32", 1, 4},         {1, "F16", 1, 2},         {2, "Q4_0", 32, 18},      {3, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},      {8, "Q8_0", 32, 34},      {9, "Q8_1", 32, 40},
    {10, "Q2_K", 256, 84},    {11, "Q3_K", 256, 110},   {12, "Q4_K", 256, 144},   {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210},   {15, "Q8_K", 256, 292},   {16, "IQ2_XXS", 256, 66}, {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},   {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},   {23, "IQ4_XS", 256, 136}, {24, "I8", 1, 1},         {25, "I16", 1, 2},
    {26, "I32", 1, 4},        {27, "I64", 1, 8},        {28, "F64", 1, 8},        {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2},       {34, "TQ1_0", 256, 54},   {35, "TQ2_0", 256, 66},   {39, "MXFP4", 32, 17}};

float half_to_float(const uint8_t* bytes) {
  const uint32_t half = bytes[0] | static_cast<uint32_t>(bytes[1]) << 8;
  const uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
  if (exponent == 0) {  // zero and subnormal numbers: fraction * 2^-24
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 0x1f ? 0xffu : exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// In every block below, products and differences are rounded one by one; the library is built without contraction.

// scale (f16), 32 i8
void block_q8_0(const uint8_t* block, float* out) {
  const float scale = half_to_float(block);
  for (int i = 0; i < 32; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(block[2 + i]));
}

// scale (f16), 16 bytes: the low halves are the first 16 numbers, the high halves the others
void block_q4_0(const uint8_t* block, float* out) {
  const float scale = half_to_float(block);
  for (int i = 0; i < 16; ++i) {
    out[i] = scale * static_cast<float>((block[2 + i] & 15) - 8);
    out[16 + i] = scale * static_cast<float>((block[2 + i] >> 4) - 8);
  }
}

// The 6-bit scale and minimum of group g of 8, in 12 bytes: scales 0 to 3, minima 0 to 3, then the low 4 bits of the
// other scales and minima, whose high 2 bits are on top of the first 8 bytes.
void group_scale(const uint8_t* packed, int g, float& scale, float& minimum) {
  if (g < 4) {
    scale = static_cast<float>(packed[g] & 63);
    minimum = static_cast<float>(packed[g + 4] & 63);
  } else {
    scale = static_cast<float>((packed[g + 4] & 15) | (packed[g - 4] >> 6) << 4);
    minimum = static_cast<float>(packed[g + 4] >> 4 | (packed[g] >> 6) << 4);
  }
}

// scale (f16), scale of minima (f16), 12 bytes of group scales; Q5_K: 32 bytes with the fifth bits, bit g of byte i for
// number i of group g; 128 bytes: 32 for each pair of groups, the low halves are the first one's
void block_q4_k_or_q5_k(const uint8_t* block, bool has_fifth_bit, float* out) {
  const float scale = half_to_float(block), minimum_scale = half_to_float(block + 2);
  const uint8_t* const fifth = block + 16;
  const uint8_t* const low = fifth + (has_fifth_bit ? 32 : 0);
  for (int g = 0; g < 8; ++g) {
    float group, group_minimum;
    group_scale(block + 4, g, group, group_minimum);
    const float d = scale * group, m = minimum_scale * group_minimum;
    for (int i = 0; i < 32; ++i) {
      const int high = has_fifth_bit ? (fifth[i] >> g & 1) << 4 : 0;
      const int number = (low[g / 2 * 32 + i] >> (g % 2 * 4) & 15) | high;
      out[32 * g + i] = d * static_cast<float>(number) - m;
    }
  }
}

// 128 bytes with the low 4 bits, 64 bytes with the high 2 bits, 16 i8 scales of 16 numbers each, scale (f16)
void block_q6_k(const uint8_t* block, float* out) {
  const float scale = half_to_float(block + 208);
  for (int run = 0; run < 16; ++run) {  // of 16 numbers: two in each quarter of each half
    const int half = run / 8, quarter = run % 8 / 2, column = run % 2 * 16;
    const uint8_t* const low = block + 64 * half + 32 * (quarter % 2) + column;
    const uint8_t* const high = block + 128 + 32 * half + column;
    const float group = scale * static_cast<float>(static_cast<int8_t>(block[192 + run]));
    for (int i = 0; i < 16; ++i) {
      const int number = (low[i] >> (quarter / 2 * 4) & 15) | (high[i] >> (2 * quarter) & 3) << 4;
      out[16 * run + i] = group * static_cast<float>(number - 32);
    }
  }
}

const GgmlType* find_quantized(const std::string& name) {
  for (const GgmlType& type : kTypes) {
    for (const uint32_t id : {2u, 8u, 12u, 13u, 14u}) {
      if (type.id == id && type.name == name) return &type;
    }
  }
  return nullptr;
}

}  // namespace

const GgmlType* find_ggml_type(uint32_t id) {
  for (const GgmlType& type : kTypes) {
    if (type.id == id) return &type;
  }
  return nullptr;
}

bool is_ggml_quantized(const std::string& name) { return find_quantized(name) != nullptr; }

int64_t ggml_block_size(const std::string& name) {
  const GgmlType* type = find_quantized(name);
  return type ? type->elements : 1;
}

void dequantize_ggml(const std::string& name, const uint8_t* blocks, int64_t count, float* out) {
  const GgmlType& type = *find_quantized(name);
  for (int64_t i = 0; i < count; i += type.elements, blocks += type.bytes, out += type.elements) {
    switch (type.id) {
      case 2:
        block_q4_0(blocks, out);
        break;
      case 8:
        block_q8_0(blocks, out);
        break;
      case 12:
      case 13:
        block_q4_k_or_q5_k(blocks, type.id == 13, out);
        break;
      default:
        block_q6_k(blocks, out);
    }
  }
}

}  // namespace mixtral
