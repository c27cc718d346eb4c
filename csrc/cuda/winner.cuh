// Which of two codes wins, and the winner of a warp: the smaller value, of equal ones the lower index, in any order of lanes.
#ifndef VQK_CUDA_WINNER_CUH
#define VQK_CUDA_WINNER_CUH

#include "cuda/portable.cuh"

namespace vqk {

VQK_DEVICE bool beats(double value, int code, double best, int winner) {
  return value < best || (value == best && code < winner);
}

// Every lane gets the winner of the 32.
VQK_DEVICE void best_of_warp(double &best, int &winner) {
  for (int step = 16; step > 0; step /= 2) {
    const double value = __shfl_xor_sync(~0u, best, step);
    const int code = __shfl_xor_sync(~0u, winner, step);
    if (beats(value, code, best, winner)) {
      best = value;
      winner = code;
    }
  }
}

}  // namespace vqk

#endif
