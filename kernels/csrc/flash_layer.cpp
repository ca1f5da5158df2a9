// The experts of one layer behind a cache, in one call: which are here, who goes for those that are not, their reads,
// their checks (or no checks yet), and the products of all.
#include <memory>
#include <string>

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "expert_slots.hpp"
#include "experts_arriving.hpp"

namespace edge {

using namespace expert_layer;

namespace {

using Bytes = Array<std::uint8_t, 1>;
using Numbers = Array<const std::int64_t, 1>;

// Where a layer's experts lie on flash: expert e is `stride` bytes of `file` from first_byte + e * stride on, its planes
// one behind the other. Its key in the table is first_key + e.
struct Place {
  int file;
  std::int64_t first_byte, first_key, experts;
};

class FlashLayer {
 public:
  // The slots are those of `memory`, one behind the other. digests [experts * planes, 32].
  FlashLayer(ExpertSlots& slots, FlashReads& reads, Bytes memory, std::tuple<int, std::int64_t, std::int64_t, std::int64_t> place,
             Numbers plane_bytes, Array<const std::uint8_t, 2> digests, const std::string& format, std::int64_t hidden,
             std::int64_t intermediate, std::int64_t stride_bytes, Numbers offsets)
      : slots_(slots), reads_(reads), memory_(memory),
        place_{std::get<0>(place), std::get<1>(place), std::get<2>(place), std::get<3>(place)},
        planes_(plane_bytes.data(), plane_bytes.data() + plane_bytes.shape(0)), digests_(digests),
        layer_(checked_layer(memory, format, slots.slots(), hidden, intermediate, stride_bytes, offsets)) {
    require(place_.first_byte >= 0 && place_.experts > 0 && place_.first_key >= 0 && place_.first_key <= slots.keys() - place_.experts,
            "the table must have a key for every expert");
    std::int64_t total_bytes = 0;
    for (const std::int64_t bytes : planes_) {
      require(bytes > 0 && bytes % (2 * kBlake3ChunkBytes) == 0, "planes are multiples of 2 KiB");
      total_bytes += bytes;
    }
    require(total_bytes <= stride_bytes && slots.slots() * stride_bytes <= static_cast<std::int64_t>(memory.size()),
            "the planes of an expert must fit its slot, and the slots their memory");
    require(digests.shape(0) == planes_.size() * static_cast<std::size_t>(place_.experts) && digests.shape(1) == kBlake3DigestBytes,
            "every plane needs a digest");
  }

  // (experts that were here, experts read, seconds waited for flash, what became of each plane read: key
  // expert * planes + plane). `y` is only made where all came right. All experts stay pinned otherwise.
  // `owner`: -1, or checks are put off: `y` is made where all came, and `FlashReads.check` says later what was wrong, by
  // that number and key; nothing is said of planes that came.
  std::tuple<int, int, double, FlashReads::Landed> run(Array<const float, 2> x, Array<const std::int32_t, 2> ids,
                                                       Array<const float, 2> gates, std::int64_t step, Array<float, 2> y,
                                                       int threads, std::int64_t owner) {
    const std::size_t uses = ids.shape(0) * ids.shape(1), hidden = static_cast<std::size_t>(layer_.hidden);
    require(x.shape(0) == ids.shape(0) && x.shape(1) == hidden && y.shape(0) == x.shape(0) && y.shape(1) == hidden,
            "rows and results must have the experts' hidden width");
    require(gates.shape(0) == ids.shape(0) && gates.shape(1) == ids.shape(1), "every id needs a gate");
    require(static_cast<std::int64_t>(uses) <= slots_.slots(), "more experts than there are slots");
    for (std::size_t i = 0; i < uses; ++i)
      require(ids.data()[i] >= 0 && ids.data()[i] < place_.experts, "an expert id is out of range");
    require(reads_.parts() == 0, "other reads are on their way");
    std::vector<std::int32_t> at(ids.data(), ids.data() + uses);
    const std::vector<Group> groups = group_by_expert(at.data(), static_cast<std::int64_t>(uses), place_.experts);
    const std::vector<std::size_t> absent = look_up(groups, step, &at);
    admit(groups, absent, step, threads, owner, &at);
    const auto rows = static_cast<std::int64_t>(x.shape(0)), top_k = static_cast<std::int64_t>(ids.shape(1));
    FlashReads::Landed landed;
    bool is_whole = true;
    const double waited = reads_.waited_seconds();
    {
      nb::gil_scoped_release released;
      const Run run(layer_, x.data(), at.data(), gates.data(), y.data(), rows, top_k);
      if (absent.empty())
        run(threads);
      else
        is_whole = run_arriving(run, rows, threads, owner >= 0, &landed);
    }
    if (is_whole) slots_.unpin_all();
    if (!absent.empty()) reads_.forget_memory();
    return {static_cast<int>(groups.size() - absent.size()), static_cast<int>(absent.size()), reads_.waited_seconds() - waited, landed};
  }

 private:
  static void put(const Group& group, std::int32_t slot, std::vector<std::int32_t>* at) {
    for (const std::int64_t use : group.slots) (*at)[static_cast<std::size_t>(use)] = slot;
  }

  // Pins what is here. Groups that are not.
  std::vector<std::size_t> look_up(const std::vector<Group>& groups, std::int64_t step, std::vector<std::int32_t>* at) {
    std::vector<std::size_t> absent;
    for (std::size_t i = 0; i < groups.size(); ++i) {
      const std::int32_t slot = slots_.use(place_.first_key + groups[i].expert, step, static_cast<std::int64_t>(groups[i].slots.size()));
      if (slot == ExpertSlots::kAbsent)
        absent.push_back(i);
      else
        put(groups[i], slot, at);
    }
    return absent;
  }

  void admit(const std::vector<Group>& groups, const std::vector<std::size_t>& absent, std::int64_t step, int threads,
             std::int64_t owner, std::vector<std::int32_t>* at) {
    if (absent.empty()) return;
    reads_.begin(memory_);
    for (const std::size_t i : absent) {
      const std::int64_t expert = groups[i].expert;
      const std::int32_t slot = slots_.admit(place_.first_key + expert, step, static_cast<std::int64_t>(groups[i].slots.size()));
      require(slot != ExpertSlots::kAbsent, "slots are held that a batch needs");
      put(groups[i], slot, at);
      if (reads_.is_unchecked(memory_.data() + slot * layer_.stride_bytes, layer_.stride_bytes)) reads_.hash_put_off(threads);
      ask(expert, slot, static_cast<std::int64_t>(i), owner);
    }
  }

  void ask(std::int64_t expert, std::int64_t slot, std::int64_t group, std::int64_t owner) {
    const auto planes = static_cast<std::int64_t>(planes_.size());
    std::int64_t start = 0;
    for (std::int64_t plane = 0; plane < planes; ++plane) {
      const std::int64_t key = expert * planes + plane, bytes = planes_[static_cast<std::size_t>(plane)];
      reads_.ask({key, place_.file, place_.first_byte + expert * layer_.stride_bytes + start, bytes,
                  memory_.data() + slot * layer_.stride_bytes + start, digests_.data() + key * kBlake3DigestBytes, group, owner});
      start += bytes;
    }
  }

  bool run_arriving(const Run& run, std::int64_t rows, int threads, bool checks_later, FlashReads::Landed* landed) {
    for (std::int64_t row = 0; row < rows; ++row) run.prepare(row);
    Arriving arriving(run, reads_, checks_later);
    arriving(threads);
    if (checks_later && arriving.is_whole())
      reads_.put_off(arriving.leave_checks());
    else
      reads_.leave(landed);
    if (arriving.is_whole())
      for (std::int64_t row = 0; row < rows; ++row) run.combine(row);
    return arriving.is_whole();
  }

  ExpertSlots& slots_;
  FlashReads& reads_;
  const Bytes memory_;
  const Place place_;
  const std::vector<std::int64_t> planes_;
  const Array<const std::uint8_t, 2> digests_;
  const Layer layer_;
};

}  // namespace

void bind_flash_layer(nb::module_& m) {
  nb::class_<FlashLayer>(m, "FlashLayer")
      .def(nb::init<ExpertSlots&, FlashReads&, Bytes, std::tuple<int, std::int64_t, std::int64_t, std::int64_t>, Numbers,
                    Array<const std::uint8_t, 2>, const std::string&, std::int64_t, std::int64_t, std::int64_t, Numbers>(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("run", &FlashLayer::run, nb::arg("x"), nb::arg("ids"), nb::arg("gates"), nb::arg("step"), nb::arg("y"),
           nb::arg("threads"), nb::arg("owner") = -1);
}

}  // namespace edge
