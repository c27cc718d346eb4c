// Where an access to memory goes, for scalar_memory.cpp and scalar_atomic.cpp.
#ifndef PTX_SCALAR_MEMORY_H
#define PTX_SCALAR_MEMORY_H

#include "scalar.h"

namespace ptx {

enum class Space : int { generic, global, constant, parameter, local, shared };

// Takes the word of a state space; generic if there is none.
Space take_space(Words &);

// `bytes` bytes at an address of a space; an Error where a GPU would fault.
unsigned char *located(Warp &, const Instruction &, int lane, Space, uint64_t address, size_t bytes, bool write);

inline Space space_of(uint64_t address) {
  switch (address & window_mask) {
    case shared_window: return Space::shared;
    case local_window: return Space::local;
    case param_window: return Space::parameter;
    default: return Space::global;
  }
}

}  // namespace ptx

#endif
