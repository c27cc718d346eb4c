// Where an access to memory goes, for scalar_memory.cpp and scalar_atomic.cpp.
#ifndef PTX_SCALAR_MEMORY_H
#define PTX_SCALAR_MEMORY_H

#include "races.h"
#include "scalar.h"

namespace ptx {

enum class Space : int { generic, global, constant, parameter, local, shared };

// Takes what an access or a fence says of its scope: Races::far, or 0 if that is no more than the block.
int take_scope(Words &);
// Takes what an access says of its order, and its scope: of Races::Order. `plain` is that of one that says nothing.
int take_order(Words &, Instruction &, Races::Order plain = Races::weak);
// Takes the word of a state space; generic if there is none.
Space take_space(Words &);

inline Space space_of(uint64_t address) {
  switch (address & window_mask) {
    case shared_window: return Space::shared;
    case local_window: return Space::local;
    case param_window: return Space::parameter;
    default: return Space::global;
  }
}

constexpr uint64_t null_page = 4096;

// `bytes` bytes, a power of two, at an address of a space; an Error where a GPU would fault. checked() is for all that is not
// plainly right.
unsigned char *checked(Warp &, const Instruction &, int lane, Space, uint64_t address, size_t bytes, bool write);
inline unsigned char *located(Warp &w, const Instruction &i, int lane, Space space, uint64_t address, size_t bytes, bool write) {
  const bool aligned = (address & (bytes - 1)) == 0;
  if (space <= Space::constant && aligned && address >= null_page && space_of(address) == Space::global &&
      !(w.watched >> lane & 1))
    return reinterpret_cast<unsigned char *>(address);  // global memory is the host's own
  if (space == Space::shared && aligned && !write) {
    std::vector<unsigned char> &all = w.block.shared.bytes;
    if (bytes <= all.size() && address <= all.size() - bytes) return all.data() + address;
  }
  return checked(w, i, lane, space, address, bytes, write);
}

// The 32 addresses of a memory operand.
class Addresses {
 public:
  Addresses(const Warp &w, const Operand &o)
      : base_(values(w, o.items[0], room_)), offset_(o.bits), mask_(o.width == 32 ? 0xffffffff : ~uint64_t{0}) {}
  Addresses(const Addresses &) = delete;
  uint64_t operator[](int lane) const { return (base_[lane] + offset_) & mask_; }

 private:
  uint64_t room_[32];
  const uint64_t *base_;
  uint64_t offset_, mask_;
};

}  // namespace ptx

#endif
