#include "packed_matrix.hpp"

#include <algorithm>
#include <cmath>
#include <new>

#include "parallel.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace edge {

#if defined(__unix__) || defined(__APPLE__)
SystemMemory::SystemMemory(std::size_t size_bytes) : size_bytes_(size_bytes) {
  if (size_bytes == 0) return;
  void* mapped = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::uint8_t*>(mapped);
#if defined(MADV_HUGEPAGE)
  madvise(mapped, size_bytes, MADV_HUGEPAGE);
#endif
}
SystemMemory::~SystemMemory() {
  if (data_) munmap(data_, size_bytes_);
}
#else
SystemMemory::SystemMemory(std::size_t size_bytes) : size_bytes_(size_bytes) {
  if (size_bytes) data_ = static_cast<std::uint8_t*>(::operator new(size_bytes, std::align_val_t{64}));
}
SystemMemory::~SystemMemory() {
  if (data_) ::operator delete(data_, std::align_val_t{64});
}
#endif

namespace {

// Round to nearest, ties to even, for |x| below 2^15.
std::uint16_t half_of(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (magnitude < 0x1p-14f)  // a subnormal half counts steps of 2^-24; nearbyint rounds ties to even
    return sign | static_cast<std::uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  const std::uint32_t rest = bits & 0x7FFFFFFF;
  const std::uint32_t rounded = rest + 0xFFF + (rest >> 13 & 1);
  return sign | static_cast<std::uint16_t>((rounded - (112u << 23)) >> 13);
}

std::uint32_t load_four(const std::uint8_t* p) {
  std::uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return four;
}
void store_four(std::uint8_t* p, std::uint32_t four) { __builtin_memcpy(p, &four, 4); }

// Four nibbles into the low halves of four bytes.
std::uint32_t spread(std::uint32_t x) {
  x = (x | x << 8) & 0x00FF00FF;
  return (x | x << 4) & 0x0F0F0F0F;
}

// The power of two that brings the largest scale into [2^14, 2^15): smaller ones have 28 powers of two below that to be
// precise in.
float power_for(const float* scales, std::int64_t count) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    require(std::isfinite(scales[i]), "a matrix has a scale that is not finite");
    largest = std::max(largest, std::fabs(scales[i]));
  }
  if (largest == 0.0f) return 1.0f;
  return std::ldexp(1.0f, std::clamp(15 - (std::ilogb(largest) + 1), -100, 100));
}

// Two blocks of a tile: codes and half floats.
std::int64_t pair_bytes_of(int bits) { return 2 * (kTileOutputs * kBlock * bits / 8 + kTileOutputs * 2); }

std::int64_t tile_bytes_of(int bits, std::int64_t blocks) {
  return (blocks + 1) / 2 * pair_bytes_of(bits);
}

std::int64_t checked(bool holds, const char* message, std::int64_t value) {
  require(holds, message);
  return value;
}

}  // namespace

PackedMatrix::PackedMatrix(Array<const std::uint8_t, 3> data, Array<const float, 2> scales, std::int64_t columns,
                           int threads)
    : outputs_(checked(data.shape(0) >= 1 && data.shape(0) < (1u << 28), "a matrix has impossible sizes",
                       static_cast<std::int64_t>(data.shape(0)))),
      columns_(checked(columns >= 1 && columns < (1 << 28), "a matrix has impossible sizes", columns)),
      bits_(static_cast<int>(data.shape(2) * 8 / kBlock)),
      tile_bytes_(tile_bytes_of(bits_, blocks())),
      memory_(static_cast<std::size_t>(
          checked((data.shape(2) == 16 || data.shape(2) == 32) && static_cast<int>(data.shape(1)) == blocks() &&
                      scales.shape(0) == data.shape(0) && scales.shape(1) == data.shape(1),
                  "a quantized matrix has data [outputs, blocks, 16 or 32] and scales [outputs, blocks]",
                  tiles() * tile_bytes_))) {
  const float power = power_for(scales.data(), static_cast<std::int64_t>(scales.size()));
  unit_ = 1.0f / power;
  nb::gil_scoped_release released;
  run_phases(threads, {tiles()}, [&](int, std::int64_t tile, int) { pack_tile(data.data(), scales.data(), tile); });
}

PackedMatrix::PackedMatrix(Array<const float, 2> weights, int threads)
    : outputs_(checked(weights.size() > 0 && weights.shape(0) < (1u << 28), "a matrix has impossible sizes",
                       static_cast<std::int64_t>(weights.shape(0)))),
      columns_(checked(weights.shape(1) < (1u << 28), "a matrix has impossible sizes",
                       static_cast<std::int64_t>(weights.shape(1)))),
      bits_(32),
      tile_bytes_(columns_ * kTileOutputs * 4),
      memory_(static_cast<std::size_t>(tiles() * tile_bytes_)) {
  nb::gil_scoped_release released;
  run_phases(threads, {tiles()}, [&](int, std::int64_t tile, int) {
    auto* to = reinterpret_cast<float*>(memory_.data() + tile * tile_bytes_);
    const std::int64_t first = tile * kTileOutputs, count = std::min<std::int64_t>(kTileOutputs, outputs_ - first);
    for (std::int64_t c = 0; c < columns_; ++c)
      for (std::int64_t o = 0; o < count; ++o) to[c * kTileOutputs + o] = weights.data()[(first + o) * columns_ + c];
  });
}

void PackedMatrix::pack_tile(const std::uint8_t* data, const float* scales, std::int64_t index) {
  const std::int64_t block_count = blocks(), block_bytes = kBlock * bits_ / 8, first = index * kTileOutputs;
  const int outputs = static_cast<int>(std::min<std::int64_t>(kTileOutputs, outputs_ - first));
  for (std::int64_t block = 0; block < block_count; ++block) {
    std::uint8_t* pair = memory_.data() + index * tile_bytes_ + block / 2 * pair_bytes_of(bits_);
    std::uint8_t* codes = pair + block % 2 * kTileOutputs * block_bytes;
    auto* halves = reinterpret_cast<std::uint16_t*>(pair + 2 * kTileOutputs * block_bytes) + block % 2 * kTileOutputs;
    for (int o = 0; o < outputs; ++o) {
      const std::int64_t at = (first + o) * block_count + block;
      const std::uint8_t* from = data + at * block_bytes;
      halves[o] = half_of(scales[at] * (1.0f / unit_));
      for (int four = 0; four < block_bytes; four += 4) {
        const std::uint32_t bytes = load_four(from + four);
        store_four(codes + 16 * four + 4 * o, bits_ == 8 ? bytes : spread(bytes & 0xFFFF) | spread(bytes >> 16) << 4);
      }
    }
  }
}

}  // namespace edge
