// Device code of the CUDA kernels; see prroi_pool_cuda.cu.
#pragma once

#include <cstdint>

#include "prroi_pool.h"

namespace iou_d2::cuda {

constexpr int THREADS = 256;

// A (N, C, H, W) or (R, C, P, Q) tensor with any strides.
template <typename T>
struct Strided {
  T* data;
  int64_t outer, channel, row, column;

  __device__ __forceinline__ T* at(int64_t n, int64_t c) const {
    return data + n * outer + c * channel;
  }
};

// Pixels [begin, end) under a bin, and the weights of the first two, of all between, and of the
// last two.
template <typename A>
struct Bin {
  int begin, end;
  A weights[5];

  __device__ void set(const Axis& axis, int64_t k) {
    begin = static_cast<int>(axis.bin_first(k));
    end = static_cast<int>(axis.bin_last(k));
    if (end <= begin) return;
    const int64_t last = end - 1;
    for (int64_t d = 0; d < 2; ++d) {
      weights[d] = static_cast<A>(axis.weight(k, begin + d));
      weights[4 - d] = static_cast<A>(axis.weight(k, last - d));
    }
    weights[2] = static_cast<A>(static_cast<double>(axis.bins) / axis.length);
  }
  __device__ __forceinline__ A weight(int i) const {
    const int after = i - begin, before = end - 1 - i;
    return weights[before < 2 ? 4 - before : after < 2 ? after : 2];
  }
  __device__ __forceinline__ bool covers(int i) const {
    return begin <= i && i < end;
  }
};

// The two pixels around an edge and their hats; hat 0 outside the map.
template <typename A>
struct Edge {
  int pixel[2];
  A hats[2];

  __device__ void set(const Axis& axis, int64_t e) {
    const double at = axis.edge(e);
    const int left = static_cast<int>(floor(clamp(at, -1, static_cast<double>(axis.size))));
    for (int s = 0; s < 2; ++s) {
      const bool inside = axis.length > 0 && left + s >= 0 && left + s < axis.size;
      hats[s] = inside ? static_cast<A>(hat(at - (left + s))) : A(0);
      pixel[s] = hats[s] != A(0) ? left + s : -1;
    }
  }
};

// The part of the channels that a block has; the launch keeps counts of (channel, bin) pairs below
// 2^31.
struct Channels {
  int64_t begin;
  int count;

  __device__ explicit Channels(int64_t all) {
    const int64_t share = (all + gridDim.y - 1) / gridDim.y;
    begin = min(all, static_cast<int64_t>(blockIdx.y) * share);
    count = static_cast<int>(min(all - begin, share));
  }
};

// Item t of a block's (bins, channels), in the order in which they lie side by side in memory.
struct Item {
  int bin, channel;

  __device__ __forceinline__ Item(int t, int bins, int channels, bool channels_last)
      : bin(channels_last ? t / channels : t % bins),
        channel(channels_last ? t % channels : t / bins) {}
};

template <typename A>
__device__ Bin<A>* set_bins(const Roi& roi, char* shared) {
  Bin<A>* bins = reinterpret_cast<Bin<A>*>(shared);
  const int P = static_cast<int>(roi.y.bins), all = P + static_cast<int>(roi.x.bins);
  for (int k = threadIdx.x; k < all; k += blockDim.x) {
    if (k < P)
      bins[k].set(roi.y, k);
    else
      bins[k].set(roi.x, k - P);
  }
  return bins;
}

__device__ inline Roi roi_of_block(const double* rois, double scale, double shift, const Shape& s) {
  const double* box = rois + 5 * static_cast<int64_t>(blockIdx.x);
  CUDA_KERNEL_ASSERT(box[0] >= 0 && box[0] < static_cast<double>(s.N) &&
                     "prroi_pool: batch index out of range");
  return read_roi(box, scale, shift, s.P, s.Q, s.H, s.W);
}

template <typename T, typename A>
__global__ void forward_kernel(Strided<const T> features, const double* rois, double scale,
                               double shift, Shape s, bool channels_last, Strided<T> out) {
  extern __shared__ double shared[];
  const Roi roi = roi_of_block(rois, scale, shift, s);
  const Bin<A>* y = set_bins<A>(roi, reinterpret_cast<char*>(shared));
  const Bin<A>* x = y + s.P;
  __syncthreads();
  const Channels channels(s.C);
  const int bins = static_cast<int>(s.P * s.Q), Q = static_cast<int>(s.Q);
  for (int t = threadIdx.x; t < channels.count * bins; t += blockDim.x) {
    const Item item(t, bins, channels.count, channels_last);
    const int64_t c = channels.begin + item.channel;
    const int p = item.bin / Q, q = item.bin % Q;
    const T* map = features.at(roi.image, c);
    A total = 0;
    for (int i = y[p].begin; i < y[p].end; ++i) {
      const T* row = map + i * features.row;
      A line = 0;
      for (int j = x[q].begin; j < x[q].end; ++j)
        line += x[q].weight(j) * static_cast<A>(row[j * features.column]);
      total += y[p].weight(i) * line;
    }
    out.at(blockIdx.x, c)[p * out.row + q * out.column] = static_cast<T>(total);
  }
}

// First bin that may cover pixel i; bins are in order and each reaches at least as far as the one
// before.
template <typename A>
__device__ __forceinline__ int first_bin(const Bin<A>* bins, int count, int i) {
  int low = 0;
  while (low < count && bins[low].end <= i) ++low;
  return low;
}

// One thread a pixel and channel, and so one atomic addition.
template <typename T, typename A>
__global__ void backward_features_kernel(Strided<const T> grad, const double* rois, double scale,
                                         double shift, Shape s, bool channels_last,
                                         Strided<A> out) {
  extern __shared__ double shared[];
  const Roi roi = roi_of_block(rois, scale, shift, s);
  const Bin<A>* y = set_bins<A>(roi, reinterpret_cast<char*>(shared));
  const Bin<A>* x = y + s.P;
  __syncthreads();
  if (!(roi.x.length > 0)) return;
  const Channels channels(s.C);
  const int P = static_cast<int>(s.P), Q = static_cast<int>(s.Q);
  const int top = y[0].begin, left = x[0].begin, width = x[Q - 1].end - left;
  if (width <= 0) return;
  for (int i = top; i < y[P - 1].end; ++i) {
    const int p0 = first_bin(y, P, i);
    for (int t = threadIdx.x; t < channels.count * width; t += blockDim.x) {
      const Item item(t, width, channels.count, channels_last);
      const int64_t c = channels.begin + item.channel;
      const int j = left + item.bin;
      const T* bin = grad.at(blockIdx.x, c);
      const int q0 = first_bin(x, Q, j);
      A total = 0;
      for (int p = p0; p < P && y[p].covers(i); ++p) {
        A line = 0;
        for (int q = q0; q < Q && x[q].covers(j); ++q)
          line += x[q].weight(j) * static_cast<A>(bin[p * grad.row + q * grad.column]);
        total += y[p].weight(i) * line;
      }
      atomicAdd(out.at(roi.image, c) + i * out.row + j * out.column, total);
    }
  }
}

// Mean along `across` of the map at an edge of the other axis.
template <typename T, typename A>
__device__ __forceinline__ A edge_mean(const T* map, const Edge<A>& edge, int64_t along,
                                       const Bin<A>& bin, int64_t across) {
  A total = 0;
  for (int s = 0; s < 2; ++s) {
    if (edge.pixel[s] < 0) continue;
    const T* line = map + edge.pixel[s] * along;
    A mean = 0;
    for (int i = bin.begin; i < bin.end; ++i)
      mean += bin.weight(i) * static_cast<A>(line[i * across]);
    total += edge.hats[s] * mean;
  }
  return total;
}

// Adds what moving the edges of one axis does to the loss, for the axis' two ends. `grad_along`
// steps to the next bin along the moving axis, `grad_across` to the next across it.
template <typename T, typename A>
__device__ void add_edges(const Strided<const T>& features, const Strided<const T>& grad,
                          int64_t image, const Channels& channels, bool channels_last,
                          const Edge<A>* edges, int count, int64_t along, int64_t grad_along,
                          const Bin<A>* bins, int bin_count, int64_t across, int64_t grad_across,
                          A* start, A* end) {
  const int edge_count = count + 1, pairs = edge_count * bin_count;
  for (int t = threadIdx.x; t < channels.count * pairs; t += blockDim.x) {
    const Item item(t, pairs, channels.count, channels_last);
    const int e = item.bin % edge_count, k = item.bin / edge_count;
    const int64_t c = channels.begin + item.channel;
    const T* g = grad.at(blockIdx.x, c) + k * grad_across;
    const A before = e > 0 ? static_cast<A>(g[(e - 1) * grad_along]) : A(0);
    const A after = e < count ? static_cast<A>(g[e * grad_along]) : A(0);
    const A moved =
        (before - after) * edge_mean(features.at(image, c), edges[e], along, bins[k], across);
    const A share = static_cast<A>(e) / static_cast<A>(count);
    *start += (1 - share) * moved;
    *end += share * moved;
  }
}

// Writes the sum over the block's threads of 5 numbers each to `sums`; fixed order.
template <typename A>
__device__ void block_sum(const A* mine, double* scratch, double* sums) {
  for (int d = 0; d < 5; ++d) {
    __syncthreads();
    scratch[threadIdx.x] = static_cast<double>(mine[d]);
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[d] = scratch[0];
  }
}

// partial (groups, R, 5): a group of channels' share of the gradient of x1, y1, x2, y2 behind a
// column of zeros.
template <typename T, typename A>
__global__ void backward_rois_kernel(Strided<const T> grad, Strided<const T> features,
                                     Strided<const T> output, const double* rois, double scale,
                                     double shift, Shape s, bool channels_last, double* partial) {
  extern __shared__ double shared[];
  __shared__ double scratch[THREADS];
  const Roi roi = roi_of_block(rois, scale, shift, s);
  const int P = static_cast<int>(s.P), Q = static_cast<int>(s.Q);
  const Bin<A>* y = set_bins<A>(roi, reinterpret_cast<char*>(shared));
  const Bin<A>* x = y + P;
  Edge<A>* edges =
      reinterpret_cast<Edge<A>*>(reinterpret_cast<char*>(shared) + (P + Q) * sizeof(Bin<A>));
  for (int e = threadIdx.x; e < P + Q + 2; e += blockDim.x) {
    if (e <= P)
      edges[e].set(roi.y, e);
    else
      edges[e].set(roi.x, e - P - 1);
  }
  __syncthreads();
  if (!(roi.x.length > 0)) return;  // partial is 0 already
  const Channels channels(s.C);
  A mine[5] = {};  // x1, y1, x2, y2, sum of gradient * output
  add_edges(features, grad, roi.image, channels, channels_last, edges + P + 1, Q, features.column,
            grad.column, y, P, features.row, grad.row, mine, mine + 2);
  add_edges(features, grad, roi.image, channels, channels_last, edges, P, features.row, grad.row, x,
            Q, features.column, grad.column, mine + 1, mine + 3);
  for (int t = threadIdx.x; t < channels.count * P * Q; t += blockDim.x) {
    const Item item(t, P * Q, channels.count, channels_last);
    const int64_t c = channels.begin + item.channel;
    const int p = item.bin / Q, q = item.bin % Q;
    mine[4] += static_cast<A>(grad.at(blockIdx.x, c)[p * grad.row + q * grad.column]) *
               static_cast<A>(output.at(blockIdx.x, c)[p * output.row + q * output.column]);
  }
  double sums[5];
  block_sum(mine, scratch, sums);
  if (threadIdx.x > 0) return;
  double* to = partial + (static_cast<int64_t>(blockIdx.y) * s.R + blockIdx.x) * 5;
  to[1] = scale * (sums[0] * Q + sums[4]) / roi.x.length;
  to[2] = scale * (sums[1] * P + sums[4]) / roi.y.length;
  to[3] = scale * (sums[2] * Q - sums[4]) / roi.x.length;
  to[4] = scale * (sums[3] * P - sums[4]) / roi.y.length;
}

}  // namespace iou_d2::cuda
