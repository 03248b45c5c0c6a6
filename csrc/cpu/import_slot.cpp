#include "import_slot.h"

#include <dlfcn.h>

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

namespace {

void* address_of(const char* name) { return dlsym(RTLD_DEFAULT, name); }

}  // namespace

#if defined(FDG_IMPORT_SLOTS)
namespace {

// Of slots for calls, which the loader may fill at the first call, and of those for addresses,
// through which some compilers call too.
#if defined(__x86_64__)
constexpr uint32_t kCallSlot = R_X86_64_JUMP_SLOT, kAddressSlot = R_X86_64_GLOB_DAT;
#else
constexpr uint32_t kCallSlot = R_AARCH64_JUMP_SLOT, kAddressSlot = R_AARCH64_GLOB_DAT;
#endif

// What is looked up by name is, before the loader's list is gone through: both take locks of its.
struct Wanted {
  Import import;
  void* address;
};

struct Search {
  const char* library;
  std::vector<Wanted> wanted;
  bool done = false;
};

struct Table {
  const ElfW(Rela) * entries = nullptr;
  size_t bytes = 0;
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

std::vector<void**> find_slots(const dl_phdr_info& info, const char* function) {
  const ElfW(Dyn)* dynamic = nullptr;
  for (int i = 0; i < info.dlpi_phnum; ++i) {
    if (info.dlpi_phdr[i].p_type == PT_DYNAMIC) {
      dynamic = reinterpret_cast<const ElfW(Dyn)*>(info.dlpi_addr + info.dlpi_phdr[i].p_vaddr);
    }
  }
  std::vector<void**> slots;
  if (dynamic == nullptr) return slots;
  Table calls, others;
  const ElfW(Sym)* symbols = nullptr;
  const char* strings = nullptr;
  for (; dynamic->d_tag != DT_NULL; ++dynamic) {
    const auto address = dynamic->d_un.d_ptr;
    const auto bytes = dynamic->d_un.d_val;
    switch (dynamic->d_tag) {
      case DT_JMPREL:
        calls.entries = at<const ElfW(Rela)>(info.dlpi_addr, address);
        break;
      case DT_PLTRELSZ:
        calls.bytes = bytes;
        break;
      case DT_RELA:
        others.entries = at<const ElfW(Rela)>(info.dlpi_addr, address);
        break;
      case DT_RELASZ:
        others.bytes = bytes;
        break;
      case DT_SYMTAB:
        symbols = at<const ElfW(Sym)>(info.dlpi_addr, address);
        break;
      case DT_STRTAB:
        strings = at<const char>(info.dlpi_addr, address);
        break;
      default:
        break;
    }
  }
  if (symbols == nullptr || strings == nullptr) return slots;
  for (const Table& table : {calls, others}) {
    if (table.entries == nullptr) continue;
    for (size_t i = 0; i < table.bytes / sizeof(ElfW(Rela)); ++i) {
      const ElfW(Rela) & entry = table.entries[i];
      const auto type = ELF64_R_TYPE(entry.r_info);
      if (type != kCallSlot && type != kAddressSlot) continue;
      if (std::strcmp(strings + symbols[ELF64_R_SYM(entry.r_info)].st_name, function) == 0) {
        slots.push_back(reinterpret_cast<void**>(info.dlpi_addr + entry.r_offset));
      }
    }
  }
  return slots;
}

bool is_within(const dl_phdr_info& info, const void* address) {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  for (int i = 0; i < info.dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = info.dlpi_phdr[i];
    const uintptr_t begin = info.dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD && begin <= wanted && wanted < begin + part.p_memsz) return true;
  }
  return false;
}

uintptr_t page_size() { return static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)); }

uintptr_t page_of(uintptr_t address) { return address / page_size() * page_size(); }

// Whether the loader made the slot's page read-only behind writing it; it does so for whole pages.
bool is_read_only(const dl_phdr_info& info, void** slot) {
  const auto address = reinterpret_cast<uintptr_t>(slot);
  for (int i = 0; i < info.dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = info.dlpi_phdr[i];
    const uintptr_t begin = info.dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_GNU_RELRO && page_of(begin) <= address &&
        address < page_of(begin + part.p_memsz)) {
      return true;
    }
  }
  return false;
}

bool write_slot(const dl_phdr_info& info, void** slot, void* value) {
  const bool read_only = is_read_only(info, slot);
  void* page = reinterpret_cast<void*>(page_of(reinterpret_cast<uintptr_t>(slot)));
  if (read_only && mprotect(page, page_size(), PROT_READ | PROT_WRITE) != 0) return false;
  __atomic_store_n(slot, value, __ATOMIC_RELEASE);  // others may be calling
  if (read_only) mprotect(page, page_size(), PROT_READ);
  return true;
}

struct Lent {
  const char* name;
  void* address;
  void* function;
  bool leads_there = false;
};

// The program itself, which is the first.
int look_at_program(dl_phdr_info* info, size_t, void* data) {
  auto& lent = *static_cast<Lent*>(data);
  if (!is_within(*info, lent.address)) return 1;
  const auto slots = find_slots(*info, lent.name);
  for (void** slot : slots) {
    if (*slot == lent.address) continue;  // the way there
    lent.leads_there = *slot == lent.function;
    if (!lent.leads_there) break;
  }
  return 1;
}

int redirect_in(dl_phdr_info* info, size_t, void* data) {
  auto& search = *static_cast<Search*>(data);
  if (info->dlpi_name == nullptr || !is_named(info->dlpi_name, search.library)) return 0;
  struct Found {
    void** slot;
    void* before;
    void* replacement;
  };
  std::vector<Found> found;
  for (const auto& [import, address] : search.wanted) {
    const auto slots = find_slots(*info, import.name);
    if (slots.empty()) return 1;
    for (void** slot : slots) {
      // The name's address may be lent. The loader's own code, in the library itself, stands where
      // there was no call yet.
      if (*slot != import.now && *slot != address && !is_within(*info, *slot)) {
        return 1;
      }
      found.push_back({slot, *slot, import.replacement});
    }
  }
  for (size_t i = 0; i < found.size(); ++i) {
    if (write_slot(*info, found[i].slot, found[i].replacement)) continue;
    while (i-- > 0) write_slot(*info, found[i].slot, found[i].before);
    return 1;
  }
  search.done = true;
  return 1;
}

}  // namespace

bool calls_lead_to(const char* name, void* function) {
  Lent lent{name, address_of(name), function};
  if (lent.address == function) return true;
  if (lent.address != nullptr) dl_iterate_phdr(look_at_program, &lent);
  return lent.leads_there;
}

bool redirect_imports(const char* library, const std::vector<Import>& imports) {
  Search search{library, {}};
  for (const Import& import : imports) {
    if (!calls_lead_to(import.name, import.now)) return false;
    search.wanted.push_back({import, address_of(import.name)});
  }
  dl_iterate_phdr(redirect_in, &search);
  return search.done;
}
#else
bool calls_lead_to(const char* name, void* function) { return address_of(name) == function; }
bool redirect_imports(const char*, const std::vector<Import>&) { return false; }
#endif

}  // namespace fdg::cpu
