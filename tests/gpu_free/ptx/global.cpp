// What a grid may access of global memory, and when.
#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace ptx {
namespace {

thread_local std::vector<Range> given;

std::string hex(uint64_t address) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

std::string bytes_of(uint64_t count) { return std::to_string(count) + (count == 1 ? " byte" : " bytes"); }

Range workspace(const Grid &grid) {
  const uint64_t begin = reinterpret_cast<uint64_t>(grid.workspace.data());
  return {begin, begin + grid.workspace.size() * sizeof(uint64_t)};
}

bool contains(const Range &range, uint64_t address, uint64_t bytes) {
  return address >= range.begin && address + bytes <= range.end;
}

// Where bytes that are in no range lie, from the nearest one.
std::string whereabouts(const std::vector<Range> &ranges, uint64_t address, uint64_t bytes) {
  const auto distance = [&](const Range &range) {
    if (address >= range.end) return address - range.end;
    return address + bytes <= range.begin ? range.begin - (address + bytes) : 0;
  };
  const Range nearest =
      *std::min_element(ranges.begin(), ranges.end(), [&](const Range &a, const Range &b) { return distance(a) < distance(b); });
  const std::string range = bytes_of(nearest.end - nearest.begin) + " at " + hex(nearest.begin);
  if (address >= nearest.end) return bytes_of(address - nearest.end) + " behind the end of " + range;
  if (address + bytes <= nearest.begin) return bytes_of(nearest.begin - address) + " before the start of " + range;
  if (address < nearest.begin) return bytes_of(nearest.begin - address) + " of them before the start of " + range;
  return bytes_of(address + bytes - nearest.end) + " of them behind the end of " + range;
}

}  // namespace

void set_global(std::vector<Range> ranges) { given = std::move(ranges); }

std::vector<Range> accessible(const Grid &grid) {
  std::vector<Range> ranges = given;
  if (ranges.empty()) return ranges;
  ranges.push_back(workspace(grid));
  ranges.insert(ranges.end(), grid.module.variables.begin(), grid.module.variables.end());
  std::sort(ranges.begin(), ranges.end(), [](const Range &a, const Range &b) { return a.begin < b.begin; });
  return ranges;
}

void watch(Warp &w) { w.watched = w.block.grid.memory.empty() ? w.early : ~Lanes{0}; }

void check_global(Warp &w, const Instruction &i, int lane, uint64_t address, size_t bytes, bool constant) {
  const Grid &grid = w.block.grid;
  // Nobody but this launch writes its workspace.
  if (w.early >> lane & 1 && !constant && !contains(workspace(grid), address, bytes))
    w.fail(i, lane, "global memory is accessed before griddepcontrol.wait, in a programmatic launch");
  if (grid.memory.empty()) return;
  // Ranges may overlap: views of one storage, of which each was given.
  for (const Range &range : grid.memory) {
    if (range.begin > address) break;
    if (contains(range, address, bytes)) return;
  }
  w.fail(i, lane, bytes_of(bytes) + " at " + hex(address) + ": " + whereabouts(grid.memory, address, bytes));
}

}  // namespace ptx
