// Between nearest.cpp, which defines these, and the searches made of its blocks (residual_nearest.cpp).
#ifndef VQK_CPU_NEAREST_SEARCH_H
#define VQK_CPU_NEAREST_SEARCH_H

#include "cpu/nearest.h"

namespace vqk {

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

const Kernels *kernels_for(int32_t isa, int64_t dim);  // nullptr: not on this machine
int32_t check_codes(const vqk_codes *codebook);

// Rows of a block: one for each thread at least, as long as each still fills the register tile.
int64_t rows_per_block(const Kernels *kernels, int64_t heads, int64_t rows);

// Carves the scratch of a block of at most `rows` rows from `base`, or counts its bytes if `block` is null. `head` is a packed
// one, with the plan of its codebook.
int64_t block_bytes(const vqk_rows *x, const PackedHead *head, const Kernels *kernels, int64_t rows, char *base, Block *block);

// Memory of this thread, 64-byte aligned and kept between calls; null if there is none. A second call may move it.
char *thread_memory(int64_t bytes);

}  // namespace vqk

#endif
