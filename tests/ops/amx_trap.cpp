// Runs the compiled build for AMX on a processor without: each instruction of the tile unit ends in SIGILL there, and
// this handler decodes its bytes and carries it out on the emulated unit (cuda/host/amx_emulation.h).
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstring>

#include "amx_emulation.h"

namespace {

struct sigaction before;
std::atomic<int64_t> products{0};
std::atomic<int> fault{0};

int64_t reg(const ucontext_t* u, int number) {
  static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return u->uc_mcontext.gregs[names[number]];
}

template <class T> T read(const uint8_t*& at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  at += sizeof value;
  return value;
}

// A three-byte VEX prefix, opcode, ModRM and what belongs to them (Intel's manual, volume 2, chapter 2).
struct Instruction {
  bool known = false, in_memory = false, has_index = false;
  int prefix, opcode, reg_field, rm_field, third;
  int64_t base = 0, index = 0;  // of the memory operand, the index scaled
  const uint8_t* end;
};

enum Prefix { NO_PREFIX, PREFIX_66, PREFIX_F3, PREFIX_F2 };

Instruction decoded(const ucontext_t* u) {
  const uint8_t* at = (const uint8_t*)u->uc_mcontext.gregs[REG_RIP];
  Instruction i;
  if (read<uint8_t>(at) != 0xc4) return i;
  const uint8_t first = read<uint8_t>(at), second = read<uint8_t>(at);
  const int more_reg = first & 0x80 ? 0 : 8, more_index = first & 0x40 ? 0 : 8, more_base = first & 0x20 ? 0 : 8;
  if ((first & 0x1f) != 2 || second & 0x84) return i;  // map 0F38, W and L of 0
  i.prefix = second & 3;
  i.third = ~second >> 3 & 15;
  i.opcode = read<uint8_t>(at);
  const uint8_t modrm = read<uint8_t>(at);
  const int mod = modrm >> 6, rm = modrm & 7;
  i.reg_field = (modrm >> 3 & 7) + more_reg;
  i.rm_field = rm + more_base;
  i.in_memory = mod != 3;
  bool no_base = false;
  if (i.in_memory) {
    int base = rm;
    if (rm == 4) {
      const uint8_t sib = read<uint8_t>(at);
      base = sib & 7;
      const int index = (sib >> 3 & 7) + more_index;
      i.has_index = index != 4;
      if (i.has_index) i.index = reg(u, index) * (1 << (sib >> 6));
    }
    no_base = mod == 0 && base == 5;
    if (!no_base) i.base = reg(u, base + more_base);
    if (mod == 1) i.base += read<int8_t>(at);
    if (mod == 2 || no_base) i.base += read<int32_t>(at);
    if (no_base && rm == 5) i.base += (int64_t)at;  // relative to the next instruction
  }
  i.end = at;
  i.known = true;
  return i;
}

bool carried_out(const Instruction& i) {
  auto& unit = amx_emulation::unit();
  if (i.opcode == 0x49 && i.prefix == NO_PREFIX && i.in_memory && i.reg_field == 0)
    unit.configure((const void*)(i.base + i.index));
  else if (i.opcode == 0x49 && i.prefix == NO_PREFIX && !i.in_memory && i.reg_field == 0 && i.rm_field == 0)
    unit.release();
  else if (i.opcode == 0x49 && i.prefix == PREFIX_F2 && !i.in_memory && i.rm_field == 0)
    unit.zero(i.reg_field);
  else if (i.opcode == 0x4b && i.prefix == PREFIX_F2 && i.in_memory)
    unit.load(i.reg_field, (const void*)i.base, i.index);
  else if (i.opcode == 0x4b && i.prefix == PREFIX_F3 && i.in_memory)
    unit.store(i.reg_field, (void*)i.base, i.index);
  else if (i.opcode == 0x5c && i.prefix == PREFIX_F3 && !i.in_memory && products++ + 1)
    unit.dpbf16ps(i.reg_field, i.rm_field, i.third);
  else if (i.opcode == 0x5e && i.prefix == PREFIX_F2 && !i.in_memory && products++ + 1)
    unit.dpbssd(i.reg_field, i.rm_field, i.third);
  else
    return false;
  if (fault && (i.opcode == 0x5c || i.opcode == 0x5e)) unit.flip(i.reg_field, fault);
  return true;
}

void handle(int, siginfo_t*, void* context) {
  ucontext_t* u = (ucontext_t*)context;
  const Instruction i = decoded(u);
  if (i.known && carried_out(i))
    u->uc_mcontext.gregs[REG_RIP] = (int64_t)i.end;
  else
    sigaction(SIGILL, &before, nullptr);  // comes again, and ends as it would have
}

}  // namespace

extern "C" int amx_trap_install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, &before);
}
extern "C" int amx_trap_remove() { return sigaction(SIGILL, &before, nullptr); }
// How many products of tiles were carried out.
extern "C" int64_t amx_trap_products() { return products; }
extern "C" int amx_trap_configured_units() { return amx_emulation::configured_units; }
// From now on this row (1 to 15; 0: none) of every product of tiles is wrong.
extern "C" void amx_trap_fault(int row) { fault = row; }
