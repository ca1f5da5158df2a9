#include "isa.hpp"

#include <atomic>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace edge {
namespace {

std::vector<const KernelTable*> detect() {
  std::vector<const KernelTable*> found;
#if defined(__x86_64__) || defined(_M_X64)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&kAvx512Kernels);
  if (avx2) found.push_back(&kAvx2Kernels);
#elif defined(__aarch64__)
#if defined(__APPLE__)
  found.push_back(&kNeonDotKernels);
#elif defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(&kNeonDotKernels);
#endif
  found.push_back(&kNeonKernels);
#endif
  found.push_back(&kScalarKernels);
  return found;
}

const std::vector<const KernelTable*>& available() {
  static const std::vector<const KernelTable*> tables = detect();
  return tables;
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = chosen.load(std::memory_order_relaxed);
  return table ? *table : *available().front();
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : available()) names.emplace_back(table->name);
  return names;
}

void set_isa(const std::string& name) {
  for (const KernelTable* table : available())
    if (name == table->name) {
      chosen.store(table, std::memory_order_relaxed);
      return;
    }
  throw std::invalid_argument("this processor has no kernels named '" + name + "'");
}

}  // namespace edge
