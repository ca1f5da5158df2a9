// One run of a chain: where each value lies, and what each phase does.
#pragma once

#include <cstring>
#include <vector>

#include "chain.hpp"
#include "isa.hpp"
#include "parallel.hpp"
#include "program_chunk.hpp"

namespace edge {

constexpr std::int64_t kAheadBytes = 96 << 10;  // of weights that fit the second cache beside what is in use

template <typename Element>
class Chain::Step {
 public:
  Step(const Chain& chain, const Batch& batch, const KvPool& pool, Element* memory, int threads)
      : chain_(chain), batch_(batch), pool_(pool), memory_(memory), threads_(threads), kernels_(kernels()) {}

  std::size_t scratch_floats() const {
    std::int64_t floats = 0, most = 0;
    for (const std::int64_t width : chain_.widths_) floats += width * batch_.rows;
    for (const Part& part : chain_.parts_)
      if (part.program) most = std::max(most, part.program->scratch_width() * batch_.rows);
    return static_cast<std::size_t>(floats + most + chain_.prepared_width_ * batch_.rows +
                                    threads_ * kAttentionScratchFloats);
  }

  void place(const float* x, float* out, float* scratch) {
    attention_scratch_ = scratch;
    scratch += threads_ * kAttentionScratchFloats;
    prepared_ = scratch;
    scratch += chain_.prepared_width_ * batch_.rows;
    for (const std::int64_t width : chain_.widths_) {
      values_.push_back(scratch);
      scratch += width * batch_.rows;
    }
    values_.front() = const_cast<float*>(x);  // nothing writes to value 0
    values_[static_cast<std::size_t>(chain_.result_)] = out;
    for (std::size_t part = 0; part < chain_.parts_.size(); ++part) {
      if (chain_.parts_[part].program)
        place_program(part, scratch);
      else
        place_attention(part);
    }
  }

  void run() const {
    std::vector<std::int64_t> items;
    for (const Place& place : places_) items.push_back(place.items);
    run_phases(
        threads_, std::move(items), [&](int phase, std::int64_t item, int thread) { work(phase, item, thread); }, ahead());
  }

 private:
  struct Place {
    std::size_t part;
    int phase;  // of its part: of an attention, 0 prepares and stores, 1 attends
    std::int64_t items;
  };

  float* value(const Part& part, std::size_t index) const { return values_[static_cast<std::size_t>(part.values[index])]; }

  void place_program(std::size_t index, float* scratch) {
    const Part& part = chain_.parts_[index];
    Program::Chunk chunk(*part.program, scratch, batch_.rows);
    for (std::size_t slot = 0; slot < part.values.size(); ++slot) chunk.set(static_cast<int>(slot), value(part, slot));
    for (int phase = 0; phase < chunk.phases(); ++phase) places_.push_back({index, phase, chunk.items(phase)});
    chunks_.push_back(std::move(chunk));
    which_.push_back(chunks_.size() - 1);
  }

  void place_attention(std::size_t index) {
    const Part& part = chain_.parts_[index];
    std::int64_t work = 0;
    tiles_.push_back(cut<Element>(batch_, pool_, part.attention.shape, prepared_, value(part, 3), layer(part), threads_, &work));
    which_.push_back(tiles_.size() - 1);
    places_.push_back({index, 0, batch_.rows});
    places_.push_back({index, 1, static_cast<std::int64_t>(tiles_.back().size())});
  }

  // After each phase, what each thread reads first of the next phase with weights.
  std::vector<Ahead> ahead() const {
    const auto threads = static_cast<std::size_t>(threads_);
    if (threads_ == 1) return {};
    std::vector<Ahead> found(places_.size() * threads);
    for (std::size_t phase = places_.size() - 1; phase-- > 0;)
      for (std::size_t thread = 0; thread < threads; ++thread) {
        const WeightBytes next = weights(places_[phase + 1], static_cast<int>(thread));
        found[phase * threads + thread] =
            next.data ? Ahead{next.data, std::min(kAheadBytes, next.size_bytes)} : found[(phase + 1) * threads + thread];
      }
    return found;
  }

  WeightBytes weights(const Place& place, int thread) const {
    if (!chain_.parts_[place.part].program) return {nullptr, 0};
    return chunks_[which_[place.part]].weights(place.phase, first_item(place.items, threads_, thread));
  }

  Element* layer(const Part& part) const { return memory_ + part.attention.layer * 2 * pool_.part_stride(); }

  void work(int phase, std::int64_t item, int thread) const {
    const Place& place = places_[static_cast<std::size_t>(phase)];
    const Part& part = chain_.parts_[place.part];
    if (part.program)
      chunks_[which_[place.part]].work(place.phase, item);
    else if (place.phase == 0)
      prepare(part, item);
    else
      kernels_.attend(tiles_[which_[place.part]][static_cast<std::size_t>(item)],
                      attention_scratch_ + thread * kAttentionScratchFloats);
  }

  void prepare(const Part& part, std::int64_t row) const {
    const Attention& attention = part.attention;
    const std::int64_t q_width = attention.q.heads * attention.q.head_dim, k_width = attention.k.heads * attention.k.head_dim;
    float *q = prepared_ + row * q_width, *k = prepared_ + batch_.rows * q_width + row * k_width;
    std::memcpy(q, value(part, 0) + row * q_width, static_cast<std::size_t>(q_width) * sizeof(float));
    std::memcpy(k, value(part, 1) + row * k_width, static_cast<std::size_t>(k_width) * sizeof(float));
    prepare_row(attention.q, q, batch_.positions[row]);
    prepare_row(attention.k, k, batch_.positions[row]);
    store_row(batch_, pool_, layer(part), row, prepared_ + batch_.rows * q_width, value(part, 2));
  }

  const Chain& chain_;
  const Batch& batch_;
  const KvPool& pool_;
  Element* const memory_;
  const int threads_;
  const KernelTable& kernels_;
  float* attention_scratch_ = nullptr;
  float* prepared_ = nullptr;  // queries, then keys, after norm and rotation
  std::vector<float*> values_;
  std::vector<Place> places_;
  std::vector<std::size_t> which_;  // of each part: its chunk, or its tiles
  std::vector<Program::Chunk> chunks_;
  std::vector<std::vector<AttentionTile>> tiles_;
};

}  // namespace edge
