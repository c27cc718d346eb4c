// lookup: gather codes into rows of any layout and dtype, in place of gather + cast + permute.
#include "cpu/gather.h"

namespace vqk {
namespace {

template <class In, class Out>
void run(const vqk_codes &codebook, const int64_t *indices, const vqk_rows &out, IndexCheck &check) {
  const gather::Blocks blocks(out);
  parallel_for(0, blocks.count, blocks.grain(out.size[3]), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const gather::Place place(blocks, block);
      gather::write<Out>(gather::Codes<In>(codebook, indices, place, check), place, out);
    }
  });
}

}  // namespace
}  // namespace vqk

int32_t vqk_cpu_lookup(const vqk_codes *codebook, const int64_t *indices, const vqk_rows *out) {
  using namespace vqk;
  IndexCheck check(codebook->size[1]);
  const vqk_rows rows = with_long_rows(*out);
  with_dtype(codebook->dtype, [&](auto in) {
    with_dtype(rows.dtype, [&](auto result) { run<decltype(in), decltype(result)>(*codebook, indices, rows, check); });
  });
  return check.status("lookup", indices);
}
