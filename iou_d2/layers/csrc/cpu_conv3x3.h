// The tiles of a 3 x 3 convolution by Winograd's algorithm, and what moves them between maps and
// slots, a block of tiles at a time.
//
// C channels of the input, H x W pixels of one of its maps, D channels of the output, h x w pixels.
// F is an algorithm of cpu_winograd.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu_winograd.h"

namespace iou_d2::cpu {

// Numbers in the slots of a block, of input and output together: 12 MB, few enough for the last
// cache, enough for matrix products at full speed.
constexpr int64_t BLOCK = 3 << 20;
// Tiles from which on F4 takes less time than F2, and with which weights are worth transposing.
constexpr int64_t MANY = 64, WORTH_TRANSPOSING = 128;
constexpr int64_t MULTIPLE = 16;  // of channels, which every vector divides

constexpr auto LAST = at::MemoryFormat::ChannelsLast;

// A map of the input and the output that is made of it, and its tiles.
struct Map {
  int64_t H, W, h, w, rows, columns;
  int64_t first, last;  // tiles of all maps, of which `last` is not one of this map
};

// The tiles of the outputs of maps that share weights, and where they lie in them and in the maps.
template <typename F>
class Tiles {
 public:
  Tiles(at::TensorList xs, int64_t padding) : padding(padding) {
    for (const at::Tensor& x : xs) {
      const int64_t H = x.size(2), W = x.size(3), h = H + 2 * padding - 2, w = W + 2 * padding - 2,
                    rows = (h + F::TILE - 1) / F::TILE, columns = (w + F::TILE - 1) / F::TILE;
      maps.push_back({H, W, h, w, rows, columns, count(), count() + x.size(0) * rows * columns});
    }
  }

  int64_t count() const {
    return maps.empty() ? 0 : maps.back().last;
  }

  const Map& operator[](int64_t map) const {
    return maps[map];
  }

  // The map of tile `t`.
  IOU_D2_INLINE int64_t map_of(int64_t t) const {
    int64_t map = 0;
    while (t >= maps[map].last) ++map;
    return map;
  }

  // Pixels of its map `x` that tile `t` sees, `none` outside.
  template <typename T>
  IOU_D2_INLINE void of_input(int64_t t, const Map& map, T* x, int64_t C, T* none,
                              T** pixels) const {
    pixels_of<F::SIDE>(t, map, x, map.H, map.W, padding, C, none, pixels);
  }

  // Pixels of its output `y` in tile `t`, `none` outside.
  template <typename T>
  IOU_D2_INLINE void of_output(int64_t t, const Map& map, T* y, int64_t D, T* none,
                               T** pixels) const {
    pixels_of<F::TILE>(t, map, y, map.h, map.w, 0, D, none, pixels);
  }

 private:
  int64_t padding;
  std::vector<Map> maps;

  template <int SIDE, typename T>
  IOU_D2_INLINE void pixels_of(int64_t t, const Map& map, T* at, int64_t height, int64_t width,
                               int64_t before, int64_t channels, T* none, T** pixels) const {
    const int64_t k = t - map.first, n = k / (map.rows * map.columns),
                  y0 = k / map.columns % map.rows * F::TILE - before,
                  x0 = k % map.columns * F::TILE - before;
    for (int64_t i = 0; i < SIDE; ++i) {
      for (int64_t j = 0; j < SIDE; ++j) {
        const int64_t y = y0 + i, x = x0 + j;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        pixels[SIDE * i + j] = inside ? at + ((n * height + y) * width + x) * channels : none;
      }
    }
  }
};

// Where the numbers of each map begin.
template <typename T>
std::vector<T*> starts_of(at::TensorList tensors) {
  std::vector<T*> starts;
  for (const at::Tensor& t : tensors) {
    if constexpr (std::is_const_v<T>) {
      starts.push_back(t.const_data_ptr<float>());
    } else {
      starts.push_back(t.mutable_data_ptr<float>());
    }
  }
  return starts;
}

// Calls body(F()) with the algorithm for the outputs of `xs`.
template <typename Body>
auto with_tiles(at::TensorList xs, int64_t padding, const Body& body) {
  TORCH_CHECK_VALUE(padding >= 0 && padding <= 2, "conv3x3: the padding must be 0, 1 or 2, got ",
                    padding, ".");
  const Tiles<F4> tiles(xs, padding);
  for (size_t k = 0; k < xs.size(); ++k) {
    const Map& map = tiles[k];
    TORCH_CHECK_VALUE(map.h > 0 && map.w > 0, "conv3x3: an input of ", map.H, " x ", map.W,
                      " pixels is too small for 3 x 3 weights with padding ", padding, ".");
  }
  return tiles.count() < MANY ? body(F2()) : body(F4());
}

// Tiles in the largest block.
template <typename F>
int64_t block_of(const Tiles<F>& tiles, int64_t channels) {
  return std::min(tiles.count(), std::max<int64_t>(BLOCK / (F::SLOTS * channels), 1));
}

// Calls body(first tile, tiles) for blocks of nearly one size.
template <typename F, typename Body>
void for_blocks(const Tiles<F>& tiles, int64_t channels, const Body& body) {
  const int64_t count = tiles.count(), most = std::max<int64_t>(block_of(tiles, channels), 1),
                blocks = (count + most - 1) / most;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t first = count * k / blocks;
    body(first, count * (k + 1) / blocks - first);
  }
}

// Calls body(k) for 0 <= k < count, in parts of at least `grain`.
template <typename V, typename F>
void in_parallel(int64_t count, int64_t grain, const F& body) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    V::run([&]() IOU_D2_INLINE_LAMBDA {
      for (int64_t k = begin; k < end; ++k) body(k);
    });
  });
}

// Memory for a block of tiles, reused by the next.
template <typename F>
class Slots {
 public:
  Slots(int64_t tiles, int64_t channels, const at::TensorOptions& options)
      : channels(channels), numbers(at::empty({F::SLOTS * tiles * channels}, options)) {}

  // (slots, tiles, channels)
  at::Tensor of(int64_t tiles) const {
    return numbers.narrow(0, 0, F::SLOTS * tiles * channels).view({F::SLOTS, tiles, channels});
  }

 private:
  int64_t channels;
  at::Tensor numbers;
};

// `channels` and as many more as make a multiple.
inline int64_t widened(int64_t channels) {
  return (channels + MULTIPLE - 1) / MULTIPLE * MULTIPLE;
}

// to[column * to_row + k] = from[k * from_row + column] of MULTIPLE columns and `count` rows.
IOU_D2_INLINE void transpose(const float* from, int64_t from_row, int64_t count, float* to,
                             int64_t to_row) {
  for (int64_t column = 0; column < MULTIPLE; ++column) {
    for (int64_t k = 0; k < count; ++k) to[column * to_row + k] = from[k * from_row + column];
  }
}

// (D, C, 3, 3) -> (slots, widened D, C), of the weights turned by 180 degrees if `turned`, with
// zeros behind D.
template <typename F, typename V>
at::Tensor slots_of_weights(const at::Tensor& weight, bool turned) {
  const int64_t D = weight.size(0), C = weight.size(1), wide = widened(D);
  const int64_t first = turned ? 8 * C : 0, step = turned ? -C : C;
  at::Tensor slots = at::empty({F::SLOTS, wide, C}, weight.options(), at::MemoryFormat::Contiguous);
  const float* from = weight.const_data_ptr<float>() + first;
  float* to = slots.mutable_data_ptr<float>();
  in_parallel<V>(D, 4, [=](int64_t d) IOU_D2_INLINE_LAMBDA {
    transform_weights<F, V>(from + 9 * C * d, step, C, to + C * d, wide * C);
  });
  slots.narrow(1, D, wide - D).zero_();
  return slots;
}

// (D, C, 3, 3) -> (slots, C, widened D), with zeros behind D. This takes longer, and the matrix
// products of many tiles less time.
template <typename F, typename V>
at::Tensor transposed_slots_of_weights(const at::Tensor& weight) {
  const int64_t D = weight.size(0), C = weight.size(1), wide = widened(D);
  const int64_t row = wide + MULTIPLE;  // Rows of a power of two would share few sets of the cache.
  at::Tensor slots = at::empty({F::SLOTS, C, wide}, weight.options(), at::MemoryFormat::Contiguous);
  const float* from = weight.const_data_ptr<float>();
  float* to = slots.mutable_data_ptr<float>();
  at::parallel_for(0, C / MULTIPLE, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> transposed(MULTIPLE * 9 * row);
    float* rows = transposed.data();
    V::run([=]() IOU_D2_INLINE_LAMBDA {
      for (int64_t c = MULTIPLE * begin; c < MULTIPLE * end; c += MULTIPLE) {
        for (int64_t d = 0; d < D; d += MULTIPLE) {
          const int64_t count = std::min(MULTIPLE, D - d);
          for (int64_t k = 0; k < 9; ++k) {
            transpose(from + (9 * d + k) * C + c, 9 * C, count, rows + k * row + d, 9 * row);
          }
        }
        for (int64_t i = 0; i < MULTIPLE; ++i) {
          transform_weights<F, V>(rows + 9 * row * i, row, wide, to + (c + i) * wide, C * wide);
        }
      }
    });
  });
  return slots;
}

// Tiles [first, first + count) of the maps `xs`, transformed.
template <typename V, typename F>
void fill_slots(const Tiles<F>& tiles, const std::vector<const float*>& xs, int64_t C,
                int64_t first, const at::Tensor& slots) {
  const std::vector<float> zeros(C);
  const float* none = zeros.data();
  float* to = slots.mutable_data_ptr<float>();
  const int64_t count = slots.size(1);
  in_parallel<V>(count, 8, [=, &tiles, &xs](int64_t k) IOU_D2_INLINE_LAMBDA {
    const float* pixels[F::SLOTS];
    const int64_t map = tiles.map_of(first + k);
    tiles.of_input(first + k, tiles[map], xs[map], C, none, pixels);
    transform_input<F, V>(pixels, C, to + C * k, C * count);
  });
}

// y = clamp(x + bias + addend, low, high)
struct Finish {
  const float* bias;                  // or none
  std::vector<const float*> addends;  // of each map, or of none
  float low, high;
};

// Writes tiles [first, first + count) of the outputs `ys`.
template <typename V, typename F>
void empty_slots(const Tiles<F>& tiles, const at::Tensor& slots, int64_t first,
                 const Finish& finish, const std::vector<float*>& ys) {
  const int64_t count = slots.size(1), D = slots.size(2);
  const float* from = slots.const_data_ptr<float>();
  at::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> outside(D);
    V::run([&]() IOU_D2_INLINE_LAMBDA {
      for (int64_t k = begin; k < end; ++k) {
        float* to[F::TILE * F::TILE];
        const int64_t map = tiles.map_of(first + k);
        const float* addend = finish.addends.empty() ? nullptr : finish.addends[map];
        float* y = ys[map];
        tiles.of_output(first + k, tiles[map], y, D, outside.data(), to);
        const auto write = [&](int pixel, int64_t c, const typename V::Pack& sum)
            IOU_D2_INLINE_LAMBDA {
          float* at = to[pixel] + c;
          typename V::Pack value = sum;
          if (finish.bias) value += pack<V>(finish.bias + c);
          if (addend && to[pixel] != outside.data()) value += pack<V>(addend + (at - y));
          pack<V>(at) = value;
          for (int64_t lane = 0; lane < V::LANES; ++lane) {
            const float z = at[lane] < finish.low ? finish.low : at[lane];
            at[lane] = z > finish.high ? finish.high : z;
          }
        };
        transform_output<F, V>(from + D * k, D * count, D, write);
      }
    });
  });
}

}  // namespace iou_d2::cpu
