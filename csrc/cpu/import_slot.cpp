#include "import_slot.h"

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#define FDG_IMPORT_SLOTS 1
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#endif

namespace fdg::cpu {

#if defined(FDG_IMPORT_SLOTS)
namespace {

#if defined(__x86_64__)
constexpr uint32_t kJumpSlot = R_X86_64_JUMP_SLOT;
#else
constexpr uint32_t kJumpSlot = R_AARCH64_JUMP_SLOT;
#endif

struct Search {
  const char* library;
  const char* function;
  void* replacement;
  bool done = false;
};

bool is_named(const char* path, const char* library) {
  const char* slash = std::strrchr(path, '/');
  return std::strcmp(slash == nullptr ? path : slash + 1, library) == 0;
}

// Some C libraries leave addresses in the dynamic section as the file has them, relative.
template <typename T>
T* at(ElfW(Addr) base, ElfW(Addr) address) {
  return reinterpret_cast<T*>(address < base ? base + address : address);
}

void** find_slot(const dl_phdr_info& info, const char* function) {
  const ElfW(Dyn)* dynamic = nullptr;
  for (int i = 0; i < info.dlpi_phnum; ++i) {
    if (info.dlpi_phdr[i].p_type == PT_DYNAMIC) {
      dynamic = reinterpret_cast<const ElfW(Dyn)*>(info.dlpi_addr + info.dlpi_phdr[i].p_vaddr);
    }
  }
  if (dynamic == nullptr) return nullptr;
  const ElfW(Rela)* relocations = nullptr;
  const ElfW(Sym)* symbols = nullptr;
  const char* strings = nullptr;
  size_t bytes = 0;
  for (; dynamic->d_tag != DT_NULL; ++dynamic) {
    const auto value = dynamic->d_un.d_ptr;
    switch (dynamic->d_tag) {
      case DT_JMPREL:
        relocations = at<const ElfW(Rela)>(info.dlpi_addr, value);
        break;
      case DT_PLTRELSZ:
        bytes = dynamic->d_un.d_val;
        break;
      case DT_SYMTAB:
        symbols = at<const ElfW(Sym)>(info.dlpi_addr, value);
        break;
      case DT_STRTAB:
        strings = at<const char>(info.dlpi_addr, value);
        break;
      default:
        break;
    }
  }
  if (relocations == nullptr || symbols == nullptr || strings == nullptr) return nullptr;
  for (size_t i = 0; i < bytes / sizeof(ElfW(Rela)); ++i) {
    const ElfW(Rela) & entry = relocations[i];
    if (ELF64_R_TYPE(entry.r_info) != kJumpSlot) continue;
    if (std::strcmp(strings + symbols[ELF64_R_SYM(entry.r_info)].st_name, function) == 0) {
      return reinterpret_cast<void**>(info.dlpi_addr + entry.r_offset);
    }
  }
  return nullptr;
}

// Whether the loader wrote the slot once and for all.
bool is_read_only(const dl_phdr_info& info, void** slot) {
  const auto address = reinterpret_cast<uintptr_t>(slot);
  for (int i = 0; i < info.dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = info.dlpi_phdr[i];
    const uintptr_t begin = info.dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_GNU_RELRO && begin <= address && address < begin + part.p_memsz) {
      return true;
    }
  }
  return false;
}

bool write_slot(void** slot, void* value, bool read_only) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  void* begin = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(slot) / page * page);
  if (read_only && mprotect(begin, page, PROT_READ | PROT_WRITE) != 0) return false;
  __atomic_store_n(slot, value, __ATOMIC_RELEASE);  // others may be calling
  if (read_only) mprotect(begin, page, PROT_READ);
  return true;
}

int redirect_in(dl_phdr_info* info, size_t, void* data) {
  auto& search = *static_cast<Search*>(data);
  if (info->dlpi_name == nullptr || !is_named(info->dlpi_name, search.library)) return 0;
  void** slot = find_slot(*info, search.function);
  search.done = slot != nullptr && write_slot(slot, search.replacement, is_read_only(*info, slot));
  return 1;
}

}  // namespace

bool redirect_import(const char* library, const char* function, void* replacement) {
  Search search{library, function, replacement};
  dl_iterate_phdr(redirect_in, &search);
  return search.done;
}
#else
bool redirect_import(const char*, const char*, void*) { return false; }
#endif

}  // namespace fdg::cpu
