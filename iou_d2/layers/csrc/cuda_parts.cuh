// What the CUDA kernels are made of: neighbouring channels, bins and edges of a RoI, sums.
#pragma once

#include <cstdint>

#include "prroi_pool.h"

namespace iou_d2::cuda {

constexpr int THREADS = 256;
constexpr int WARP = 32;

// A (N, C, H, W) or (R, C, P, Q) tensor with any strides.
template <typename T>
struct Strided {
  T* data;
  int64_t outer, channel, row, column;

  __device__ __forceinline__ T* at(int64_t n, int64_t c) const {
    return data + n * outer + c * channel;
  }
};

// V neighbouring channels as a thread computes with them.
template <typename A, int V>
struct Pack {
  A values[V] = {};

  __device__ __forceinline__ void add(A factor, const Pack& other) {
  #pragma unroll
  for (int v = 0; v < V; ++v) values[v] += factor * other.values[v];
  }
};

// The same as they lie in memory: one access.
template <typename T, int V>
struct alignas(sizeof(T) * V) Chunk {
  T values[V];
};

template <typename A, int V, typename T>
__device__ __forceinline__ Pack<A, V> load(const T* from) {
  const Chunk<T, V> chunk = *reinterpret_cast<const Chunk<T, V>*>(from);
  Pack<A, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.values[v] = static_cast<A>(chunk.values[v]);
  return pack;
}

template <typename A, int V, typename T>
__device__ __forceinline__ void store(const Pack<A, V>& pack, T* to) {
  Chunk<T, V> chunk;
#pragma unroll
  for (int v = 0; v < V; ++v) chunk.values[v] = static_cast<T>(pack.values[v]);
  // By name, since of a plain assignment the compiler makes V accesses.
  if constexpr (sizeof(chunk) == sizeof(uint4))
    __stwb(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&chunk));
  else if constexpr (sizeof(chunk) == sizeof(uint2))
    __stwb(reinterpret_cast<uint2*>(to), *reinterpret_cast<const uint2*>(&chunk));
  else
    *reinterpret_cast<Chunk<T, V>*>(to) = chunk;
}

template <typename A, int V>
__device__ __forceinline__ void add_atomically(const Pack<A, V>& pack, A* to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (V == 4 && sizeof(A) == sizeof(float)) {
    const A* from = pack.values;
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
    return;
  }
#endif
#pragma unroll
  for (int v = 0; v < V; ++v) atomicAdd(to + v, pack.values[v]);
}

template <typename A, int V>
__device__ __forceinline__ A dot(const Pack<A, V>& a, const Pack<A, V>& b) {
  A total = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) total += a.values[v] * b.values[v];
  return total;
}

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

// Sum over a bin's pixels of weight times value(pixel). The ends are looked up whether a short bin
// has them or not, so that no load waits for another.
template <typename A, int V, typename Value>
__device__ __forceinline__ Pack<A, V> weighted(const Bin<A>& bin, const Value& value) {
  const int first = bin.begin, last = bin.end - 1, pixels = bin.end - bin.begin;
  Pack<A, V> total, middle;
  if (pixels <= 0) return total;
  const Pack<A, V> ends[4] = {value(first), value(min(first + 1, last)),
                              value(max(last - 1, first)), value(last)};
  total.add(bin.weights[4], ends[3]);
  if (pixels > 1) total.add(bin.weights[3], ends[2]);
  if (pixels > 2) total.add(bin.weights[0], ends[0]);
  if (pixels > 3) total.add(bin.weights[1], ends[1]);
  for (int i = first + 2; i < last - 1; ++i) middle.add(1, value(i));
  total.add(bin.weights[2], middle);
  return total;
}

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

// The packs of V channels that a block has; the launch keeps counts of (pack, bin) pairs below
// 2^31.
template <int V>
struct Packs {
  int64_t begin;
  int count;

  __device__ explicit Packs(int64_t channels) {
    const int64_t all = channels / V, share = (all + gridDim.y - 1) / gridDim.y;
    begin = min(all, static_cast<int64_t>(blockIdx.y) * share);
    count = static_cast<int>(min(all - begin, share));
  }
  __device__ __forceinline__ int64_t channel(int pack) const {
    return (begin + pack) * V;
  }
};

// Item t of a block's (bins, packs), in the order in which they lie side by side in memory.
struct Item {
  int bin, pack;

  __device__ __forceinline__ Item(int t, int bins, int packs, bool channels_last)
      : bin(channels_last ? t / packs : t % bins), pack(channels_last ? t % packs : t / bins) {}
};

// (R, 5) boxes as the caller has them.
struct Boxes {
  const void* data;
  bool is_double;

  __device__ __forceinline__ double at(int64_t i) const {
    return is_double ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
};

__device__ inline Roi roi_of_block(const Boxes& rois, double scale, double shift, const Shape& s) {
  double box[5];
  for (int d = 0; d < 5; ++d) box[d] = rois.at(5 * static_cast<int64_t>(blockIdx.x) + d);
  CUDA_KERNEL_ASSERT(box[0] >= 0 && box[0] < static_cast<double>(s.N) &&
                     "prroi_pool: batch index out of range");
  return read_roi(box, scale, shift, s.P, s.Q, s.H, s.W);
}

// A RoI's bins of y and then of x, and its edges likewise; the block's threads share the work and
// have to meet before they read them.
template <typename A>
__device__ Bin<A>* set_bins(const Roi& roi, char* shared) {
  Bin<A>* bins = reinterpret_cast<Bin<A>*>(shared);
  const int P = static_cast<int>(roi.y.bins), all = P + static_cast<int>(roi.x.bins);
  for (int k = threadIdx.x; k < all; k += THREADS) {
    if (k < P)
      bins[k].set(roi.y, k);
    else
      bins[k].set(roi.x, k - P);
  }
  return bins;
}

template <typename A>
__device__ Edge<A>* set_edges(const Roi& roi, char* shared) {
  Edge<A>* edges = reinterpret_cast<Edge<A>*>(shared);
  const int P = static_cast<int>(roi.y.bins), all = P + static_cast<int>(roi.x.bins) + 2;
  for (int e = threadIdx.x; e < all; e += THREADS) {
    if (e <= P)
      edges[e].set(roi.y, e);
    else
      edges[e].set(roi.x, e - P - 1);
  }
  return edges;
}

// The sums over the block's threads of 5 numbers each, in its first thread; fixed order.
template <typename A>
__device__ void block_sums(const A* mine, double* sums) {
  constexpr int WARPS = THREADS / WARP;
  __shared__ double of_warps[WARPS][5];
  for (int d = 0; d < 5; ++d) {
    double total = static_cast<double>(mine[d]);
    for (int half = WARP / 2; half > 0; half /= 2) total += __shfl_down_sync(~0u, total, half);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP][d] = total;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int d = 0; d < 5; ++d) {
    sums[d] = 0;
    for (int warp = 0; warp < WARPS; ++warp) sums[d] += of_warps[warp][d];
  }
}

}  // namespace iou_d2::cuda
