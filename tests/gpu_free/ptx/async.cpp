// Fences between proxies, setmaxnreg, and what is left of clusters and dependent launches when each is a single block.
#include "async.h"
#include "races.h"

namespace ptx {
namespace {

Outcome nothing(Warp &, const Instruction &, Lanes) { return Outcome::next; }

enum Fenced { barriers, stores };  // a fence for stores is one for barriers too

// The header's approximation: what was stored so far is visible to the async proxy, whoever stored it.
Outcome fence_proxy(Warp &w, const Instruction &in, Lanes) {
  if (in.detail[0] == stores) std::fill(w.block.shared.unfenced.begin(), w.block.shared.unfenced.end(), 0);
  for (auto &[offset, barrier] : async_state(w.block).barriers) barrier.fenced = true;
  return Outcome::next;
}

// ---- setmaxnreg ----

// Registers per thread that a kernel starts with, where its directives say so: 0 if they do not.
int launch_registers(const Grid &grid) {
  const auto found = grid.module.where.find(grid.function.name);
  if (found == grid.module.where.end()) return 0;
  const std::string head = grid.module.text.substr(found->second, grid.module.text.find('{', found->second) - found->second);
  const auto number = [&](const char *directive) {
    const size_t at = head.find(directive);
    return at == std::string::npos ? 0 : std::atoi(head.c_str() + at + std::strlen(directive));
  };
  if (const int given = number(".maxnreg")) return given;
  if (head.find(".maxntid") == std::string::npos && head.find(".reqntid") == std::string::npos) return 0;
  const int blocks = std::max(1, number(".minnctapersm"));
  return std::min(256, 65536 / (grid.function.max_threads * blocks) / 8 * 8);
}

Outcome setmaxnreg(Warp &w, const Instruction &in, Lanes lanes) {
  if (lanes != w.live) return Outcome::wait;
  AsyncState &state = async_state(w.block);
  if (state.registers == -1) {
    const int each = launch_registers(w.block.grid);
    state.registers = each ? 0 : -2;
    for (auto &warp : state.warps) warp.registers = each;
  }
  if (static_cast<size_t>(w.index / 4 * 4 + 4) > w.block.warps.size()) w.fail(in, -1, "its warp group is not whole");
  if (state.registers == -2) return Outcome::next;
  int &mine = state.warps[static_cast<size_t>(w.index)].registers;
  const int wanted = in.detail[1], more = (wanted - mine) * 32;
  if (in.detail[0] ? more < 0 : more > 0)
    w.fail(in, -1, "from " + std::to_string(mine) + " to " + std::to_string(wanted) + " registers: the wrong way");
  if (more > state.registers) return Outcome::wait;
  state.registers -= more;
  mine = wanted;
  return Outcome::next;
}

// griddepcontrol.wait: launches come one after another, so there is nothing to wait for.
Outcome wait_for_launches(Warp &w, const Instruction &in, Lanes lanes) {
  Grid &grid = w.block.grid;
  if (grid.module.capability() < 90) w.fail(in, -1, "there is no griddepcontrol before sm_90");
  w.early &= ~lanes;
  watch(w);
  grid.waited = true;
  return Outcome::next;
}

// ---- clusters of one block ----

bool all_arrived(Block &block) {
  AsyncState &state = async_state(block);
  if (state.arrived < block.threads - block.exited) return false;
  state.arrived = 0;
  ++state.generation;
  return true;
}

Outcome cluster_arrive(Warp &w, const Instruction &in, Lanes lanes) {
  if (in.detail[0] && lanes != w.live) return Outcome::wait;
  AsyncState &state = async_state(w.block);
  for_lanes(lanes, [&](int lane) {
    uint64_t &mine = state.generation_of[static_cast<size_t>(w.thread(lane))];
    if (mine) w.fail(in, lane, "arrives a second time before it waits");
    mine = state.generation;
    ++state.arrived;
  });
  if (w.block.races && !has(in, "relaxed")) w.block.races->come(w, lanes, Races::cluster);
  all_arrived(w.block);
  return Outcome::next;
}

Outcome cluster_wait(Warp &w, const Instruction &in, Lanes lanes) {
  if (in.detail[0] && lanes != w.live) return Outcome::wait;
  AsyncState &state = async_state(w.block);
  bool ready = true;
  for_lanes(lanes, [&](int lane) {
    const uint64_t mine = state.generation_of[static_cast<size_t>(w.thread(lane))];
    if (!mine) w.fail(in, lane, "waits without having arrived");
    ready &= mine < state.generation || (all_arrived(w.block) && mine < state.generation);
  });
  if (!ready) return Outcome::wait;
  if (w.block.races) w.block.races->go_on(w, lanes, Races::cluster);
  for_lanes(lanes, [&](int lane) { state.generation_of[static_cast<size_t>(w.thread(lane))] = 0; });
  return Outcome::next;
}

Outcome mapa(Warp &w, const Instruction &in, Lanes lanes) {
  for_lanes(lanes, [&](int lane) {
    if (w.get(in.operands[2], lane)) w.fail(in, lane, "there is no such block in the cluster");
    w.set(in.operands[0], lane, w.get(in.operands[1], lane));
  });
  return Outcome::next;
}

}  // namespace

bool decode_async(Instruction &in) {
  const std::string &name = in.words[0];
  const std::string second = in.words.size() > 1 ? in.words[1] : "";
  if (name == "mbarrier") return in.words.size() > 1 && decode_mbarrier(in);
  if (name == "cp") return decode_copy(in);
  if (name == "fence" && second == "mbarrier_init") {
    in.execute = fence_proxy;
    in.detail[0] = barriers;
  } else if (name == "fence" && second == "proxy") {
    const std::string proxy = in.words.size() > 2 ? in.words[2] : "";
    const bool global = has(in, "global") || proxy == "async::global";
    if (proxy == "alias" || (proxy.compare(0, 5, "async") == 0 && global)) {
      in.execute = nothing;
    } else if (proxy == "async" || proxy == "async::generic") {
      in.execute = fence_proxy;
      in.detail[0] = stores;
    } else {
      return false;
    }
  } else if (name == "setmaxnreg") {
    in.execute = setmaxnreg;
    in.detail[0] = second == "inc";
    const uint64_t count = in.operands[0].bits;
    if (count < 24 || count > 256 || count % 8) return false;
    in.detail[1] = static_cast<int>(count);
  } else if (name == "griddepcontrol") {
    if (second != "wait" && second != "launch_dependents") return false;
    in.execute = second == "wait" ? wait_for_launches : nothing;
  } else if (name == "barrier" && second == "cluster") {
    in.execute = has(in, "arrive") ? cluster_arrive : cluster_wait;
    in.detail[0] = has(in, "aligned");
  } else if (name == "mapa") {
    in.execute = mapa;
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx
