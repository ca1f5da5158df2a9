// One token id from one row of logits (docs/noise.md), bit for bit what reference_sampling.py computes.
#include <algorithm>
#include <utility>
#include <vector>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "arrays.hpp"
#include "fixed_math.hpp"
#include "isa.hpp"

namespace edge {
namespace {

using Logits = Array<const double, 1>;

std::size_t checked_argmax(const Logits& logits) {
  require(logits.size() > 0 && logits.size() < 0xFFFFFFFFu, "sampling needs one row of logits that is not empty");
  const double* l = logits.data();
  std::size_t best = 0;
  bool is_nan = false;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    is_nan |= l[i] != l[i];
    if (l[i] > l[best]) best = i;
  }
  require(!is_nan && l[best] <= 0x1.fffffffffffffp+1023 && l[best] >= -0x1.fffffffffffffp+1023,
          "logits must have no NaN, no +inf, and one that is finite");
  return best;
}

class Candidates {
 public:
  Candidates(const double* logits, std::size_t size, double largest, double temperature) : d_(size), weights_(size) {
    for (std::size_t i = 0; i < size; ++i) d_[i] = (logits[i] - largest) / temperature;
    kernels().exp_all(d_.data(), weights_.data(), static_cast<std::int64_t>(size));
    kept_.reserve(size);
    for (std::size_t i = 0; i < size; ++i)
      if (weights_[i] > 0.0) kept_.push_back(static_cast<std::uint32_t>(i));
  }

  void keep_top_k(std::int64_t k) {
    if (k <= 0 || static_cast<std::size_t>(k) >= kept_.size()) return;
    std::nth_element(kept_.begin(), kept_.begin() + k, kept_.end(), before());
    kept_.resize(static_cast<std::size_t>(k));
    std::sort(kept_.begin(), kept_.end());
  }

  // The shortest prefix (most likely first) that holds top_p of the weight; the sum to compare with is in id order.
  void keep_top_p(double top_p) {
    if (top_p >= 1.0) return;
    double total = 0.0;
    for (const std::uint32_t id : kept_) total += weights_[id];
    const auto after = [b = before()](std::uint32_t x, std::uint32_t y) { return b(y, x); };
    std::make_heap(kept_.begin(), kept_.end(), after);
    double sum = 0.0;
    auto end = kept_.end();
    while (end != kept_.begin()) {
      std::pop_heap(kept_.begin(), end, after);
      sum += weights_[*--end];
      if (sum >= top_p * total) break;
    }
    kept_.erase(kept_.begin(), end);
    std::sort(kept_.begin(), kept_.end());
  }

  void keep_min_p(double min_p) {
    if (min_p <= 0.0) return;
    kept_.erase(std::remove_if(kept_.begin(), kept_.end(), [&](std::uint32_t id) { return !(weights_[id] >= min_p); }),
                kept_.end());
  }

  // Argmax of d + noise, ties to the lowest id. Noise is at most -log(1 - u), so most candidates are ruled out by
  // their uniform alone; the margin is far above the rounding of what is compared.
  std::uint32_t pick(std::uint64_t seed, std::uint32_t position, std::uint32_t most_likely) const {
    double best = d_[most_likely] + gumbel(uniform(seed, position, most_likely));
    double reach = fixed_exp(-best) * (1.0 + 1e-9);
    std::uint32_t choice = most_likely;
    constexpr std::size_t kBlockIds = 512;
    double uniforms[kBlockIds];
    for (std::size_t first = 0; first < kept_.size(); first += kBlockIds) {
      const std::size_t count = std::min(kBlockIds, kept_.size() - first);
      kernels().uniform_all(seed, position, kept_.data() + first, uniforms, static_cast<std::int64_t>(count));
      for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t id = kept_[first + i];
        if (1.0 - uniforms[i] > weights_[id] * reach) continue;
        const double value = d_[id] + gumbel(uniforms[i]);
        if (value > best || (value == best && id < choice)) {
          best = value;
          choice = id;
          reach = fixed_exp(-best) * (1.0 + 1e-9);
        }
      }
    }
    return choice;
  }

 private:
  struct Before {
    const double* d;
    bool operator()(std::uint32_t x, std::uint32_t y) const { return d[x] > d[y] || (d[x] == d[y] && x < y); }
  };
  Before before() const { return {d_.data()}; }

  std::vector<double> d_;
  std::vector<double> weights_;
  std::vector<std::uint32_t> kept_;  // ascending
};

std::uint32_t sample(Logits logits, std::uint64_t seed, std::uint32_t position, double temperature, std::int64_t top_k,
                     double top_p, double min_p) {
  const std::size_t best = checked_argmax(logits);
  require(temperature >= 0.0 && top_k >= 0 && top_p > 0.0 && top_p <= 1.0 && min_p >= 0.0 && min_p <= 1.0,
          "temperature and top_k must be at least 0, top_p in (0, 1], min_p in [0, 1]");
  if (temperature == 0.0) return static_cast<std::uint32_t>(best);
  nb::gil_scoped_release released;
  Candidates candidates(logits.data(), logits.size(), logits.data()[best], temperature);
  candidates.keep_top_k(top_k);
  candidates.keep_top_p(top_p);
  candidates.keep_min_p(min_p);
  return candidates.pick(seed, position, static_cast<std::uint32_t>(best));
}

std::pair<double, std::vector<std::pair<std::uint32_t, double>>> log_probabilities(Logits logits, std::uint32_t chosen,
                                                                                   std::uint32_t top) {
  const double* l = logits.data();
  const double largest = l[checked_argmax(logits)];
  require(chosen < logits.size(), "the chosen id lies outside the vocabulary");
  nb::gil_scoped_release released;
  std::vector<double> weights(logits.size());
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = l[i] - largest;
  kernels().exp_all(weights.data(), weights.data(), static_cast<std::int64_t>(weights.size()));
  double total = 0.0;
  for (const double weight : weights) total += weight;
  const double normalizer = fixed_log(total);
  std::vector<std::uint32_t> ids(logits.size());
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::uint32_t>(i);
  const std::size_t count = std::min<std::size_t>(top, ids.size());
  std::partial_sort(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(count), ids.end(),
                    [&](std::uint32_t x, std::uint32_t y) { return l[x] > l[y] || (l[x] == l[y] && x < y); });
  std::vector<std::pair<std::uint32_t, double>> best;
  for (std::size_t i = 0; i < count; ++i) best.emplace_back(ids[i], (l[ids[i]] - largest) - normalizer);
  return {(l[chosen] - largest) - normalizer, best};
}

void threefry_words(std::uint32_t k0, std::uint32_t k1, Array<const std::uint32_t, 1> c0,
                    Array<const std::uint32_t, 1> c1, Array<std::uint32_t, 1> x0, Array<std::uint32_t, 1> x1) {
  require(c0.size() == c1.size() && c0.size() == x0.size() && c0.size() == x1.size(), "counters must have one length");
  for (std::size_t i = 0; i < c0.size(); ++i) {
    const Words words = threefry(k0, k1, c0.data()[i], c1.data()[i]);
    x0.data()[i] = words.first;
    x1.data()[i] = words.second;
  }
}

void gumbel_noise(std::uint64_t seed, std::uint32_t position, Array<const std::uint32_t, 1> ids, Array<double, 1> out) {
  require(ids.size() == out.size(), "noise needs one place for each id");
  for (std::size_t i = 0; i < ids.size(); ++i) out.data()[i] = gumbel(uniform(seed, position, ids.data()[i]));
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("threefry", &threefry_words);
  m.def("gumbel_noise", &gumbel_noise);
  m.def("sample", &sample);
  m.def("log_probabilities", &log_probabilities);
}

}  // namespace edge
