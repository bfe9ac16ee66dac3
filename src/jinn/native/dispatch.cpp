// Which kernels this machine runs.
#if defined(JINN_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace jinn {
namespace {

#if defined(JINN_X86)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4) != 0;
}

// The system must also grant the tiles' state to this process (Linux 5.16).
bool has_amx() {
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kNeeded) != kNeeded) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

int available_kernels(const Kernels** out, int capacity) {
  int count = 0;
#if defined(JINN_X86)
  if (has_avx512() && has_amx() && count < capacity) out[count++] = &amx::kernels;
  if (has_avx512() && count < capacity) out[count++] = &avx512::kernels;
  if (has_avx_vnni() && count < capacity) out[count++] = &avx_vnni::kernels;
  if (has_avx2() && count < capacity) out[count++] = &avx2::kernels;
#endif
  if (count < capacity) out[count++] = &portable::kernels;
  return count;
}

const Kernels& choose_kernels(const char* name) {
  const Kernels* available[8];
  const int count = available_kernels(available, 8);
  if (name == nullptr || *name == '\0') return *available[0];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::string(name) == available[i]->name) return *available[i];
    names += std::string(i ? ", " : "") + available[i]->name;
  }
  throw std::invalid_argument("JINN_ISA=" + std::string(name) + " is not available on this machine; it has " + names);
}

int64_t activation_stride(ActivationType type, int64_t cols) {
  int64_t bytes = 4 * cols;
  if (type == ActivationType::BF16) bytes = (cols + 1) / 2 * 4;
  if (type == ActivationType::Int8) bytes = cols + cols / kGroup * 16;
  if (type == ActivationType::Mixed) bytes = cols + cols / kGroup * (16 + 5 * kMaxOutliers);
  if (type == ActivationType::Int12) bytes = 2 * cols + cols / kGroup * 16;
  return (bytes + 63) / 64 * 64;
}

}  // namespace jinn
