// Winograd's F(m x m, 3 x 3), Lavin and Gray, arXiv 1509.09308.
//
// A tile has m x m pixels of the output, which see (m + 2) x (m + 2) of the input. With d those and
// g the weights, y = At [(G g Gt) * (Bt d B)] A, where * is element by element: (m + 2)^2 products
// where 9 m^2 were. A and B say what a polynomial has at some points, which are those of `F2` and
// `F4`.
//
// A slot is one of the (m + 2)^2 products, and slots lie `stride` numbers apart. All functions work
// on packs of neighbouring channels.
#pragma once

#include "cpu_simd.h"

namespace iou_d2::cpu {

// The points 0, 1, -1 and infinity: 16 products for 4 pixels, which take no multiplication else.
struct F2 {
  static constexpr int TILE = 2, SIDE = 4, SLOTS = 16;

  // Bt d
  template <typename P>
  IOU_D2_INLINE static void input(const P* d, P* v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  // G g
  template <typename P>
  IOU_D2_INLINE static void weights(const P* g, P* u) {
    const P ends = .5f * (g[0] + g[2]), middle = .5f * g[1];
    u[0] = g[0];
    u[1] = ends + middle;
    u[2] = ends - middle;
    u[3] = g[2];
  }
  // At m
  template <typename P>
  IOU_D2_INLINE static void output(const P* m, P* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  // A y: the gradient of `output`.
  template <typename P>
  IOU_D2_INLINE static void gradient(const P* y, P* m) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = -y[1];
  }
  // Gt u: the gradient of `weights`.
  template <typename P>
  IOU_D2_INLINE static void weight_gradient(const P* u, P* g) {
    const P half = .5f * (u[1] + u[2]);
    g[0] = u[0] + half;
    g[1] = .5f * (u[1] - u[2]);
    g[2] = half + u[3];
  }
};

// The points 0, a, -a, b, -b and infinity with a = sqrt(1/2), b = sqrt(2): 36 products for 16
// pixels. Those of the paper, 0, 1, -1, 2, -2, lose one more digit in float32.
struct F4 {
  static constexpr int TILE = 4, SIDE = 6, SLOTS = 36;
  static constexpr float A = 0.70710678118654752f, B = 1.41421356237309505f;

  template <typename P>
  IOU_D2_INLINE static void input(const P* d, P* v) {
    const P even_a = d[4] - 2.f * d[2], odd_a = A * (d[3] - 2.f * d[1]);
    const P even_b = d[4] - .5f * d[2], odd_b = B * (d[3] - .5f * d[1]);
    v[0] = d[0] - 2.5f * d[2] + d[4];
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = d[1] - 2.5f * d[3] + d[5];
  }
  template <typename P>
  IOU_D2_INLINE static void weights(const P* g, P* u) {
    const P even_a = -2.f / 3 * (g[0] + .5f * g[2]), odd_a = -2.f / 3 * A * g[1];
    const P even_b = 1.f / 6 * (g[0] + 2.f * g[2]), odd_b = 1.f / 6 * B * g[1];
    u[0] = g[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
  }
  template <typename P>
  IOU_D2_INLINE static void output(const P* m, P* y) {
    const P even_a = m[1] + m[2], odd_a = A * (m[1] - m[2]);
    const P even_b = m[3] + m[4], odd_b = B * (m[3] - m[4]);
    y[0] = m[0] + even_a + even_b;
    y[1] = odd_a + odd_b;
    y[2] = .5f * even_a + 2.f * even_b;
    y[3] = .5f * odd_a + 2.f * odd_b + m[5];
  }
  template <typename P>
  IOU_D2_INLINE static void gradient(const P* y, P* m) {
    const P even_a = y[0] + .5f * y[2], odd_a = A * (y[1] + .5f * y[3]);
    const P even_b = y[0] + 2.f * y[2], odd_b = B * (y[1] + 2.f * y[3]);
    m[0] = y[0];
    m[1] = even_a + odd_a;
    m[2] = even_a - odd_a;
    m[3] = even_b + odd_b;
    m[4] = even_b - odd_b;
    m[5] = y[3];
  }
  template <typename P>
  IOU_D2_INLINE static void weight_gradient(const P* u, P* g) {
    const P even_a = -2.f / 3 * (u[1] + u[2]), odd_a = -2.f / 3 * A * (u[1] - u[2]);
    const P even_b = 1.f / 6 * (u[3] + u[4]), odd_b = 1.f / 6 * B * (u[3] - u[4]);
    g[0] = u[0] + even_a + even_b;
    g[1] = odd_a + odd_b;
    g[2] = .5f * even_a + 2.f * even_b + u[5];
  }
};

// L x Lt of the IN x IN packs load(row, column), where `line` is L: calls store(row, column, pack)
// for OUT x OUT.
template <typename P, int IN, int OUT, typename Line, typename Load, typename Store>
IOU_D2_INLINE void on_both_axes(const Line& line, const Load& load, const Store& store) {
  P half[OUT][IN];
  for (int j = 0; j < IN; ++j) {
    P column[IN], made[OUT];
    for (int i = 0; i < IN; ++i) column[i] = load(i, j);
    line(column, made);
    for (int i = 0; i < OUT; ++i) half[i][j] = made[i];
  }
  for (int i = 0; i < OUT; ++i) {
    P made[OUT];
    line(half[i], made);
    for (int j = 0; j < OUT; ++j) store(i, j, made[j]);
  }
}

// Of the pixels d[SIDE * row + column].
template <typename F, typename V>
IOU_D2_INLINE void transform_input(const float* const* d, int64_t C, float* slots, int64_t stride) {
  using P = typename V::Pack;
  for (int64_t c = 0; c < C; c += V::LANES) {
    on_both_axes<P, F::SIDE, F::SIDE>(
        [](const P* x, P* y) IOU_D2_INLINE_LAMBDA { F::input(x, y); },
        [=](int i, int j) IOU_D2_INLINE_LAMBDA { return pack<V>(d[F::SIDE * i + j] + c); },
        [=](int i, int j, const P& value) IOU_D2_INLINE_LAMBDA {
          pack<V>(slots + (F::SIDE * i + j) * stride + c) = value;
        });
  }
}

// Of the weights, that of row i and column j of the nine at g + (3 * i + j) * step.
template <typename F, typename V>
IOU_D2_INLINE void transform_weights(const float* g, int64_t step, int64_t C, float* slots,
                                     int64_t stride) {
  using P = typename V::Pack;
  for (int64_t c = 0; c < C; c += V::LANES) {
    on_both_axes<P, 3, F::SIDE>(
        [](const P* x, P* y) IOU_D2_INLINE_LAMBDA { F::weights(x, y); },
        [=](int i, int j) IOU_D2_INLINE_LAMBDA { return pack<V>(g + (3 * i + j) * step + c); },
        [=](int i, int j, const P& value) IOU_D2_INLINE_LAMBDA {
          pack<V>(slots + (F::SIDE * i + j) * stride + c) = value;
        });
  }
}

// Calls write(pixel TILE * row + column, c, pack).
template <typename F, typename V, typename Write>
IOU_D2_INLINE void transform_output(const float* slots, int64_t stride, int64_t C,
                                    const Write& write) {
  using P = typename V::Pack;
  for (int64_t c = 0; c < C; c += V::LANES) {
    on_both_axes<P, F::SIDE, F::TILE>(
        [](const P* x, P* y) IOU_D2_INLINE_LAMBDA { F::output(x, y); },
        [=](int i, int j) IOU_D2_INLINE_LAMBDA {
          return pack<V>(slots + (F::SIDE * i + j) * stride + c);
        },
        [=, &write](int i, int j, const P& value) IOU_D2_INLINE_LAMBDA {
          write(F::TILE * i + j, c, value);
        });
  }
}

// Of the gradients y[TILE * row + column].
template <typename F, typename V>
IOU_D2_INLINE void transform_gradient(const float* const* y, int64_t C, float* slots,
                                      int64_t stride) {
  using P = typename V::Pack;
  for (int64_t c = 0; c < C; c += V::LANES) {
    on_both_axes<P, F::TILE, F::SIDE>(
        [](const P* x, P* m) IOU_D2_INLINE_LAMBDA { F::gradient(x, m); },
        [=](int i, int j) IOU_D2_INLINE_LAMBDA { return pack<V>(y[F::TILE * i + j] + c); },
        [=](int i, int j, const P& value) IOU_D2_INLINE_LAMBDA {
          pack<V>(slots + (F::SIDE * i + j) * stride + c) = value;
        });
  }
}

// To g[3 * row + column].
template <typename F, typename V>
IOU_D2_INLINE void transform_weight_gradient(const float* slots, int64_t stride, int64_t C,
                                             float* g) {
  using P = typename V::Pack;
  for (int64_t c = 0; c < C; c += V::LANES) {
    on_both_axes<P, F::SIDE, 3>(
        [](const P* x, P* y) IOU_D2_INLINE_LAMBDA { F::weight_gradient(x, y); },
        [=](int i, int j) IOU_D2_INLINE_LAMBDA {
          return pack<V>(slots + (F::SIDE * i + j) * stride + c);
        },
        [=](int i, int j, const P& value) IOU_D2_INLINE_LAMBDA {
          pack<V>(g + (3 * i + j) * C + c) = value;
        });
  }
}

}  // namespace iou_d2::cpu
