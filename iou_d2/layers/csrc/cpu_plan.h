// What all channels share: the bins of every RoI, and how the work is split between threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu_direct.h"
#include "cpu_table.h"

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "Compile with OpenMP: at::parallel_for is a loop on one thread without it."
#endif

namespace iou_d2::cpu {

template <typename T>
struct Plan {
  Roi roi;
  Bins<T> y, x;
  explicit Plan(const Roi& r) : roi(r), y(r.y), x(r.x) {}
};

// Everything about the RoIs that all channels share, computed once a call.
template <typename T>
struct Plans {
  // A RoI of more pixels a bin than LARGE costs less by way of a table; building that pays from
  // TABLE_COST maps' worth of such RoIs on (estimates).
  static constexpr double LARGE = 64, TABLE_COST = 16;

  Shape shape;
  std::vector<Plan<T>> direct;  // by RoI
  std::vector<bool> large;      // by RoI: pooled by way of a table
  std::vector<int64_t> order;   // of the RoIs in the map, so that neighbours share cached pixels

  Plans(const at::Tensor& rois, const Shape& s, double scale, bool aligned) : shape(s), large(s.R) {
    const at::Tensor boxes = rois.to(at::kDouble).contiguous();
    const double* box = boxes.const_data_ptr<double>();
    direct.reserve(s.R);
    double area = 0;  // of the large RoIs, in pixels
    for (int64_t r = 0; r < s.R; ++r, box += 5) {
      TORCH_CHECK_INDEX(box[0] >= 0 && box[0] < static_cast<double>(s.N), "prroi_pool: rois[", r,
                        ", 0] = ", box[0], " is no index into a batch of ", s.N, " images.");
      direct.emplace_back(read_roi(box, scale, aligned ? 0.5 : 0, s.P, s.Q, s.H, s.W));
      const double pixels =
          static_cast<double>(direct[r].y.extent) * static_cast<double>(direct[r].x.extent);
      large[r] = pixels > LARGE * static_cast<double>(s.P * s.Q);
      if (large[r]) area += pixels;
    }
    if (area < TABLE_COST * static_cast<double>(s.N * s.H * s.W)) large.assign(s.R, false);
    order.resize(s.R);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      const Plan<T>&p = direct[a], &q = direct[b];
      return std::tie(p.roi.image, p.y.origin, p.x.origin, a) <
             std::tie(q.roi.image, q.y.origin, q.x.origin, b);
    });
  }
  // Calls body(image, its large RoIs) for the images that have such.
  template <typename F>
  void for_large(const F& body) const {
    std::vector<std::vector<int64_t>> of_image(shape.N);
    for (int64_t r = 0; r < shape.R; ++r) {
      if (large[r]) of_image[direct[r].roi.image].push_back(r);
    }
    for (int64_t n = 0; n < shape.N; ++n) {
      if (!of_image[n].empty()) body(n, of_image[n]);
    }
  }
};

constexpr at::MemoryFormat kChannelsLast = at::MemoryFormat::ChannelsLast;

// Splits C channels into blocks and R RoIs into parts and calls body(c0, c1, r0, r1) for each pair
// in parallel. Where channels are neighbours a task takes all of them; else a block of LANES, whose
// planes neighbouring RoIs share.
template <typename T, typename F>
void for_tasks(const Shape& s, bool in_place, const F& body) {
  const int64_t threads = at::get_num_threads();
  const int64_t block = in_place ? s.C : Simd<T>::LANES, blocks = (s.C + block - 1) / block;
  const int64_t parts = std::min(s.R, in_place ? 8 * threads : (threads + blocks - 1) / blocks);
  // Tasks are handed out one by one, for RoIs differ in size and cores in what else they do.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, blocks * parts), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < blocks * parts; task = next++) {
      const int64_t c = task / parts * block, part = task % parts;
      body(c, std::min(c + block, s.C), part * s.R / parts, (part + 1) * s.R / parts);
    }
  });
}

// The same over blocks of channels of one image's table.
template <typename T, typename F>
void for_tables(const Plans<T>& plans, const F& body) {
  constexpr int64_t LANES = Table::LANES;
  const Shape& s = plans.shape;
  plans.for_large([&](int64_t n, const std::vector<int64_t>& large) {
    std::vector<Corners> corners;
    for (int64_t r : large) corners.emplace_back(plans.direct[r].roi);
    at::parallel_for(0, (s.C + LANES - 1) / LANES, 1, [&](int64_t begin, int64_t end) {
      Table table(s.H, s.W);
      for (int64_t block = begin; block < end; ++block) {
        body(table, n, block * LANES, std::min((block + 1) * LANES, s.C), large, corners);
      }
    });
  });
}

}  // namespace iou_d2::cpu
