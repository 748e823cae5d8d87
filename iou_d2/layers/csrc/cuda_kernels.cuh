// Device code of the CUDA kernels; see prroi_pool_cuda.cu.
#pragma once

#include <cstdint>

#include "cuda_parts.cuh"
#include "prroi_pool.h"

namespace iou_d2::cuda {

template <typename T, typename A, int V>
__global__ void __launch_bounds__(THREADS)
    forward_kernel(Strided<const T> features, Boxes rois, double scale, double shift,
                   Shape s, bool channels_last, Strided<T> out) {
  extern __shared__ double shared[];
  const Roi roi = roi_of_block(rois, scale, shift, s);
  const Bin<A>* y = set_bins<A>(roi, reinterpret_cast<char*>(shared));
  const Bin<A>* x = y + s.P;
  __syncthreads();
  const Packs<V> packs(s.C);
  const int bins = static_cast<int>(s.P * s.Q), Q = static_cast<int>(s.Q);
  for (int t = threadIdx.x; t < packs.count * bins; t += THREADS) {
    const Item item(t, bins, packs.count, channels_last);
    const int64_t c = packs.channel(item.pack);
    const int p = item.bin / Q, q = item.bin % Q;
    const T* map = features.at(roi.image, c);
    Pack<A, V> total;
    for (int i = y[p].begin; i < y[p].end; ++i) {
      const T* row = map + i * features.row;
      total.add(y[p].weight(i), weighted<A, V>(x[q], [&](int j) {
                  return load<A, V>(row + j * features.column);
                }));
    }
    store(total, out.at(blockIdx.x, c) + p * out.row + q * out.column);
  }
}

// First bin that may cover pixel i; bins are in order and each reaches at least as far as the one
// before.
template <typename A>
__device__ __forceinline__ int first_bin(const Bin<A>* bins, int count, int from, int i) {
  while (from < count && bins[from].end <= i) ++from;
  return from;
}

// A thread walks down a column of pixels, with one atomic addition a pixel.
template <typename T, typename A, int V>
__global__ void __launch_bounds__(THREADS)
    backward_features_kernel(Strided<const T> grad, Boxes rois, double scale, double shift,
                             Shape s, bool channels_last, Strided<A> out) {
  extern __shared__ double shared[];
  const Roi roi = roi_of_block(rois, scale, shift, s);
  const Bin<A>* y = set_bins<A>(roi, reinterpret_cast<char*>(shared));
  const Bin<A>* x = y + s.P;
  __syncthreads();
  if (!(roi.x.length > 0)) return;
  const Packs<V> packs(s.C);
  const int P = static_cast<int>(s.P), Q = static_cast<int>(s.Q);
  const int left = x[0].begin, width = x[Q - 1].end - left;
  for (int t = threadIdx.x; t < packs.count * width; t += THREADS) {
    const Item item(t, width, packs.count, channels_last);
    const int64_t c = packs.channel(item.pack);
    const int j = left + item.bin;
    const T* bin = grad.at(blockIdx.x, c);
    A* column = out.at(roi.image, c) + j * out.column;
    const int q0 = first_bin(x, Q, 0, j);
    int p0 = 0;
    for (int i = y[0].begin; i < y[P - 1].end; ++i) {
      p0 = first_bin(y, P, p0, i);
      Pack<A, V> total;
      for (int p = p0; p < P && y[p].covers(i); ++p) {
        Pack<A, V> line;
        for (int q = q0; q < Q && x[q].covers(j); ++q)
          line.add(x[q].weight(j), load<A, V>(bin + p * grad.row + q * grad.column));
        total.add(y[p].weight(i), line);
      }
      add_atomically(total, column + i * out.row);
    }
  }
}

// Mean along `across` of the map at an edge of the other axis.
template <typename A, int V, typename T>
__device__ __forceinline__ Pack<A, V> edge_mean(const T* map, const Edge<A>& edge, int64_t along,
                                                const Bin<A>& bin, int64_t across) {
  Pack<A, V> total;
  for (int side = 0; side < 2; ++side) {
    if (edge.pixel[side] < 0) continue;
    const T* line = map + edge.pixel[side] * along;
    total.add(edge.hats[side], weighted<A, V>(bin, [&](int i) {
                return load<A, V>(line + i * across);
              }));
  }
  return total;
}

// The axis whose edges move: its bins, and the strides along it of the map and of the gradient.
template <typename A>
struct Moving {
  const Edge<A>* edges;
  int bins;
  int64_t stride, grad_stride;
};

// The other one.
template <typename A>
struct Resting {
  const Bin<A>* bins;
  int count;
  int64_t stride, grad_stride;
};

// Adds what moving the edges of one axis does to the loss, for the axis' two ends.
template <typename A, int V, typename T>
__device__ void add_edges(const Strided<const T>& features, const Strided<const T>& grad,
                          int64_t image, const Packs<V>& packs, bool channels_last,
                          const Moving<A>& moving, const Resting<A>& resting, A* start, A* end) {
  const int edge_count = moving.bins + 1, pairs = edge_count * resting.count;
  for (int t = threadIdx.x; t < packs.count * pairs; t += THREADS) {
    const Item item(t, pairs, packs.count, channels_last);
    const int e = item.bin % edge_count, k = item.bin / edge_count;
    const int64_t c = packs.channel(item.pack);
    const T* g = grad.at(blockIdx.x, c) + k * resting.grad_stride + e * moving.grad_stride;
    Pack<A, V> change;  // of the loss, with the value at the edge
    if (e > 0) change.add(1, load<A, V>(g - moving.grad_stride));
    if (e < moving.bins) change.add(-1, load<A, V>(g));
    const A moved = dot(change, edge_mean<A, V>(features.at(image, c), moving.edges[e],
                                                moving.stride, resting.bins[k], resting.stride));
    const A share = static_cast<A>(e) / static_cast<A>(moving.bins);
    *start += (1 - share) * moved;
    *end += share * moved;
  }
}

// partial (groups, R, 5): a group of channels' share of the gradient of x1, y1, x2, y2 behind a
// column of zeros.
template <typename T, typename A, int V>
__global__ void __launch_bounds__(THREADS)
    backward_rois_kernel(Strided<const T> grad, Strided<const T> features, Strided<const T> output,
                         Boxes rois, double scale, double shift, Shape s,
                         bool channels_last, double* partial) {
  extern __shared__ double shared[];
  const Roi roi = roi_of_block(rois, scale, shift, s);
  const int P = static_cast<int>(s.P), Q = static_cast<int>(s.Q);
  const Bin<A>* y = set_bins<A>(roi, reinterpret_cast<char*>(shared));
  const Bin<A>* x = y + P;
  const Edge<A>* y_edges =
      set_edges<A>(roi, reinterpret_cast<char*>(shared) + (P + Q) * sizeof(Bin<A>));
  const Edge<A>* x_edges = y_edges + P + 1;
  __syncthreads();
  if (!(roi.x.length > 0)) return;  // partial is 0 already
  const Packs<V> packs(s.C);
  A mine[5] = {};  // x1, y1, x2, y2, sum of gradient * output
  add_edges<A, V>(features, grad, roi.image, packs, channels_last,
                  {x_edges, Q, features.column, grad.column}, {y, P, features.row, grad.row}, mine,
                  mine + 2);
  add_edges<A, V>(features, grad, roi.image, packs, channels_last,
                  {y_edges, P, features.row, grad.row}, {x, Q, features.column, grad.column},
                  mine + 1, mine + 3);
  for (int t = threadIdx.x; t < packs.count * P * Q; t += THREADS) {
    const Item item(t, P * Q, packs.count, channels_last);
    const int64_t c = packs.channel(item.pack);
    const int p = item.bin / Q, q = item.bin % Q;
    const T* g = grad.at(blockIdx.x, c) + p * grad.row + q * grad.column;
    const T* value = output.at(blockIdx.x, c) + p * output.row + q * output.column;
    mine[4] += dot(load<A, V>(g), load<A, V>(value));
  }
  double sums[5];
  block_sums(mine, sums);
  if (threadIdx.x > 0) return;
  double* to = partial + (static_cast<int64_t>(blockIdx.y) * s.R + blockIdx.x) * 5;
  to[1] = scale * (sums[0] * Q + sums[4]) / roi.x.length;
  to[2] = scale * (sums[1] * P + sums[4]) / roi.y.length;
  to[3] = scale * (sums[2] * Q - sums[4]) / roi.x.length;
  to[4] = scale * (sums[3] * P - sums[4]) / roi.y.length;
}

}  // namespace iou_d2::cuda
