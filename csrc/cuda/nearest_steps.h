// The steps of a search on CUDA, for calls that share some of them among several searches. nearest.cu has the kernels.
#ifndef VQK_CUDA_NEAREST_STEPS_H
#define VQK_CUDA_NEAREST_STEPS_H

#include "cuda/nearest.h"
#include "cuda/runtime.cuh"

namespace vqk {
namespace nearest {

int32_t check(const vqk_rows *x, const vqk_codes *e, int32_t metric, const vqk_cuda_search_plan *plan);
// Everything but memory and results.
void prepare(const vqk_rows *x, const vqk_codes *e, int32_t metric, int32_t precision, const vqk_cuda_search_plan *plan,
             Search *s);
// Packed codes, which may serve several searches; what a search of rows needs besides.
void take_codes(Search *s, Workspace &space);
void take_rows(Search *s, Workspace &space);
// With a screen: pack the codes (3 launches); search all rows with packed codes (6 launches per chunk of rows).
int32_t pack(const Search &s, void *stream);
int32_t search(Search s, const vqk_cuda_search_plan *plan, void *stream);

}  // namespace nearest
}  // namespace vqk

#endif
