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
#include "cpu_ends_by_edges.h"
#include "cpu_table.h"

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "Compile with OpenMP: at::parallel_for is a loop on one thread without it."
#endif

namespace iou_d2::cpu {

template <typename T>
struct Plan {
  Roi roi;
  Bins<T> y, x;
  std::vector<EdgePixels> edges_y, edges_x;  // for the gradient of the RoI alone
  Plan() = default;
  explicit Plan(const Roi& r) : roi(r), y(r.y), x(r.x) {}
  void set_slopes() {
    y.set_slopes(roi.y);
    x.set_slopes(roi.x);
  }
  void set_edges() {
    for (int64_t e = 0; e <= roi.y.bins; ++e) edges_y.emplace_back(roi.y, y.origin, e);
    for (int64_t e = 0; e <= roi.x.bins; ++e) edges_x.emplace_back(roi.x, x.origin, e);
  }
  bool empty() const {
    return y.extent == 0 || x.extent == 0;
  }
  double pixels() const {
    return static_cast<double>(y.extent) * static_cast<double>(x.extent);
  }
};

// Everything about the RoIs that all channels share, computed once a call.
template <typename T>
struct Plans {
  // A RoI of more pixels a bin than LARGE costs less by way of a table; sweeping over that pays
  // from TABLE_COST maps' worth of such RoIs on, and bringing whole rows of the map into a strip
  // from RoIs of STRIP_COST maps on (estimates).
  static constexpr double LARGE = 64, TABLE_COST = 16, STRIP_COST = 0.5;
  static constexpr int64_t BAND = 8;  // rows
  static constexpr int64_t GROUP_BYTES = 1 << 22;  // of the bins of a group's RoIs

  Shape shape;
  std::vector<Plan<T>> direct;  // by RoI
  std::vector<bool> large;      // by RoI: pooled by way of a table
  std::vector<int64_t> order;   // of the other RoIs in the map, so that neighbours share pixels
  std::vector<Group> groups;    // of the large RoIs
  int64_t strip_rows = 1;       // as many as a band's RoIs need
  bool dense = false;           // whether the RoIs in `order` cover enough for a strip

  Plans(const at::Tensor& rois, const Shape& s, double scale, bool aligned)
      : shape(s), direct(s.R), large(s.R) {
    set_bins(rois.to(at::kDouble).contiguous(), scale, aligned);
    const double map = static_cast<double>(s.N * s.H * s.W);
    double in_table = 0, pixels = 0;
    for (int64_t r = 0; r < s.R; ++r) {
      large[r] = direct[r].pixels() > LARGE * static_cast<double>(s.P * s.Q);
      pixels += direct[r].pixels();
      if (large[r]) in_table += direct[r].pixels();
    }
    if (in_table < TABLE_COST * map) large.assign(s.R, false), in_table = 0;
    dense = pixels - in_table > STRIP_COST * map;
    set_order();
    set_groups();
  }
  // For the gradient of the RoIs alone: by edges or, without a table, by products.
  void set_edges() {
    for_rois([&](int64_t r) { direct[r].set_edges(); });
  }
  void set_slopes() {
    for_rois([&](int64_t r) {
      if (!large[r]) direct[r].set_slopes();
    });
  }
  // The first of an image's RoIs in the order.
  std::vector<int64_t>::const_iterator first_of(int64_t image) const {
    return std::lower_bound(order.begin(), order.end(), image,
                            [&](int64_t r, int64_t i) { return direct[r].roi.image < i; });
  }
  // The first row of a RoI's band: no later RoI of the order needs the rows above.
  int64_t band(int64_t r) const {
    return direct[r].y.origin / BAND * BAND;
  }

 private:
  // In parallel: of small RoIs this is up to a tenth of the work.
  template <typename F>
  void for_rois(const F& body) {
    at::parallel_for(0, shape.R, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) body(r);
    });
  }
  void set_bins(const at::Tensor& boxes, double scale, bool aligned) {
    const Shape& s = shape;
    const double* box = boxes.const_data_ptr<double>();
    for (int64_t r = 0; r < s.R; ++r) {
      const double image = box[r * 5];
      TORCH_CHECK_INDEX(image >= 0 && image < static_cast<double>(s.N), "prroi_pool: rois[", r,
                        ", 0] = ", image, " is no index into a batch of ", s.N, " images.");
    }
    for_rois([&](int64_t r) {
      const Roi roi = read_roi(box + r * 5, scale, aligned ? 0.5 : 0, s.P, s.Q, s.H, s.W);
      direct[r] = Plan<T>(roi);
    });
  }
  void set_order() {
    for (int64_t r = 0; r < shape.R; ++r) {
      if (large[r]) continue;
      order.push_back(r);
      strip_rows = std::max(strip_rows, direct[r].y.origin + direct[r].y.extent - band(r));
    }
    strip_rows = std::min(strip_rows + strip_rows / 2, shape.H);  // rows are seldom moved up
    const auto key = [&](int64_t r) {
      return std::tuple(direct[r].roi.image, band(r), direct[r].x.origin, r);
    };
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
  }
  void set_groups() {
    const int64_t most =
        std::max<int64_t>(GROUP_BYTES / (shape.P * shape.Q * WIDEST), 64);
    std::vector<int64_t> open(shape.N, -1);  // the group of an image that takes its next RoI
    for (int64_t r = 0; r < shape.R; ++r) {
      if (!large[r]) continue;
      int64_t& group = open[direct[r].roi.image];
      if (group < 0 || static_cast<int64_t>(groups[group].rois.size()) == most) {
        group = static_cast<int64_t>(groups.size());
        groups.emplace_back();
        groups.back().image = direct[r].roi.image;
      }
      groups[group].add(r, direct[r].roi);
    }
    for (Group& group : groups) group.sort();
  }
};

constexpr at::MemoryFormat kChannelsLast = at::MemoryFormat::ChannelsLast;

// What a thread works in.
template <typename V>
struct Scratch {
  Tile<V> pixels, bins;
  GatheredBins<V> grads, outputs;
  Strip<V> strip;
  int64_t image = -1;  // whose rows the strip has
  // For the table: a row of the map, the bins of a group, and what edges leave for the next.
  Tile<V, 1> line, group_bins;
  std::vector<Line<Doubles<V>>> edges;
};

// Calls body(scratch, task) in parallel. Tasks are handed out one by one, for they differ in size
// and cores in what else they do.
template <typename V, typename F>
void hand_out(int64_t tasks, const F& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    Scratch<V> scratch;
    for (int64_t task = next++; task < tasks; task = next++) body(scratch, task);
  });
}

// Splits C channels into blocks and R RoIs into parts and calls body(scratch, c0, c1, r0, r1) for
// each pair in parallel. Where channels are neighbours a task takes all of them; else those of a
// tile, whose planes neighbouring RoIs share.
template <typename V, typename T, typename F>
void for_tasks(const Plans<T>& plans, bool in_place, const F& body) {
  const int64_t C = plans.shape.C, R = static_cast<int64_t>(plans.order.size());
  const int64_t threads = at::get_num_threads();
  const int64_t block = in_place ? C : Tile<V>::LANES, blocks = (C + block - 1) / block;
  const int64_t parts = std::min(R, in_place ? 8 * threads : (threads + blocks - 1) / blocks);
  hand_out<V>(blocks * parts, [&](Scratch<V>& scratch, int64_t task) {
    const int64_t c = task / parts * block, part = task % parts;
    scratch.image = -1;
    body(scratch, c, std::min(c + block, C), part * R / parts, (part + 1) * R / parts);
  });
}

// Calls body(group, rows of its table, scratch, c0, c1) in parallel over blocks of channels.
template <typename V, typename T, typename F>
void for_tables(const Plans<T>& plans, const F& body) {
  constexpr int64_t LANES = V::LANES;
  const Shape& s = plans.shape;
  if (plans.groups.empty()) return;
  at::parallel_for(0, (s.C + LANES - 1) / LANES, 1, [&](int64_t begin, int64_t end) {
    Rows<V> rows(s.W);
    Scratch<V> scratch;
    for (int64_t block = begin; block < end; ++block) {
      for (const Group& group : plans.groups)
        body(group, rows, scratch, block * LANES, std::min((block + 1) * LANES, s.C));
    }
  });
}

}  // namespace iou_d2::cpu
