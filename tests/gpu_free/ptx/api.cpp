// The machine for Python's ctypes.
#include "machine.h"

namespace {

thread_local std::string message;  // ptx_error()
thread_local std::string answer;   // ptx_kernels(), ptx_parameters()

}  // namespace

void *ptx_load(const char *text) {
  try {
    return new ptx::Module(text);
  } catch (const std::exception &error) {
    message = error.what();
    return nullptr;
  }
}

void ptx_unload(void *module) { delete static_cast<ptx::Module *>(module); }

const char *ptx_kernels(void *module) {
  answer.clear();
  for (const auto &kernel : static_cast<ptx::Module *>(module)->where) answer += kernel.first + "\n";
  return answer.c_str();
}

const char *ptx_parameters(void *module, const char *kernel) {
  try {
    answer.clear();
    for (const auto &parameter : static_cast<ptx::Module *>(module)->function(kernel).parameters)
      answer += std::to_string(parameter.size) + " ";
    return answer.c_str();
  } catch (const std::exception &error) {
    message = error.what();
    return nullptr;
  }
}

int ptx_launch(void *module, const char *kernel, const uint32_t *grid, const uint32_t *block, uint64_t dynamic_shared,
               void *const *arguments, int attributes) {
  try {
    ptx::launch(*static_cast<ptx::Module *>(module), kernel, grid, block, dynamic_shared, arguments,
                {(attributes & 1) != 0, (attributes & 2) != 0});
    return 0;
  } catch (const std::exception &error) {
    message = error.what();
    return 1;
  }
}

const char *ptx_error() { return message.c_str(); }
void ptx_seed(uint64_t seed) { ptx::set_seed(seed); }
void ptx_races(int on) { ptx::set_races(on != 0); }
void ptx_shared_limit(uint64_t bytes) { ptx::set_shared_limit(bytes); }
void ptx_global(const uint64_t *ranges, uint64_t count) {
  std::vector<ptx::Range> all(count);
  for (size_t k = 0; k < count; ++k) all[k] = {ranges[2 * k], ranges[2 * k + 1]};
  ptx::set_global(std::move(all));
}
uint64_t ptx_launches() { return ptx::counts().launches; }
uint64_t ptx_instructions() { return ptx::counts().instructions; }
